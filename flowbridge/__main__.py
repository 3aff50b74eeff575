"""``python -m flowbridge``: the command line."""

from .command_line import application

if __name__ == "__main__":
    application()
