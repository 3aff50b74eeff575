"""The ``flowbridge`` command: one module a command, which parses, calls a workflow, and prints."""
