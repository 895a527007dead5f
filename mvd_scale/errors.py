"""Exception whose message is meant for the user."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Invalid input: a recipe, a path, a checkpoint, or a machine that lacks a required capability.

    The message names the fault, the expectation and the remedy. The command line prints the message without a traceback
    and exits with code 2; `--debug` prints the traceback.
    """

    reported = False
    """Whether another rank prints the message."""

    exit_code = 2
    """Exit code of the command; that of rank 0 on the other ranks, where rank 0 has failed otherwise."""


class SharedError(UserError):
    """Error that all ranks raise with the same message, which names the ranks at fault, their hosts and their phase.

    Args:
        message: text for the user.
        ranks: ranks at fault; empty if none can be told.
    """

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class Preempted(Exception):
    """Exception: the run ended before its last step on request; a checkpoint was saved and it can be resumed."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


FAULT_CODE = 75
"""Exit code after a failure of a rank, a host, a link or a device, which the same command may survive when it restarts.

It is EX_TEMPFAIL of sysexits.h, a failure that may pass. By it `mvd-scale supervise` and job schedulers tell a fault
from invalid input (exit code 2), which no restart mends.
"""

_NO_FAULTS_OF_DEVICES = (
    "out of memory",
    "alloc_failed",
    "device-side assert",
    "no kernel image",
    "invalid",
    "not supported",
    "not_supported",
)
"""Words in errors of a device that the program, its settings or its installation cause, and which a restart repeats."""


def is_device_fault(error: BaseException) -> bool:
    """Whether an exception is the failure of a GPU, such as by ECC or Xid, as far as its type and text tell."""
    # torch is not imported here: its type is known by its name. Later lines of the text are torch's general advice.
    text = str(error).partition("\n")[0]
    if not isinstance(error, RuntimeError) or not (
        type(error).__name__ == "AcceleratorError" or text.startswith("CUDA error")
    ):
        return False
    return not any(word in text.lower() for word in _NO_FAULTS_OF_DEVICES)
