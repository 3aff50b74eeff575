"""``python -m flowbridge``: the command line."""

from .commands.application import application

if __name__ == "__main__":
    application()
