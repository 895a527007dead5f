"""Exception whose message is meant for the user."""

from __future__ import annotations


class UserError(Exception):
    """Invalid input: a recipe, a path, a checkpoint, or a machine that lacks a required capability.

    The message names the fault, the expectation and the remedy. The command line prints the message without a traceback
    and exits with code 2; `--debug` prints the traceback.
    """

    reported = False
    """Whether another rank prints the message."""


class RunFault(Exception):
    """Failure of a rank, a host, a link or a device during a run, which the same command may survive when it restarts.

    The message names rank, host and phase. The command line prints it without a traceback and exits with `FAULT_CODE`,
    by which `mvd-scale supervise` and job schedulers tell it from invalid input (exit code 2), which no restart mends.
    """


FAULT_CODE = 75
"""Exit code after a `RunFault`: EX_TEMPFAIL of sysexits.h, a failure that may pass."""
