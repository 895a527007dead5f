"""The one exception whose message is meant for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """Bad input from outside: a recipe, a path, a checkpoint, a machine that lacks something.

    The message names what was wrong, what was expected and what to do. The command prints it
    without a traceback and exits with code 2; `--debug` shows the traceback.
    """
