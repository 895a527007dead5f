"""Exception whose message is meant for the user."""

from __future__ import annotations


class UserError(Exception):
    """Invalid input: a recipe, a path, a checkpoint, or a machine that lacks a required capability.

    The message names the fault, the expectation and the remedy. The command line prints the message without a traceback
    and exits with code 2; `--debug` prints the traceback.
    """
