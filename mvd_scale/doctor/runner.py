"""Runner of an examination: of this node, of the hosts of a launcher, or of those of a hostfile, which it starts."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from mvd_scale import __version__
from mvd_scale.config.launcher import launched_rank
from mvd_scale.doctor.all_hosts import Examined, examine_all
from mvd_scale.doctor.findings import hanging
from mvd_scale.doctor.one_host import examine_alone
from mvd_scale.doctor.report import Report
from mvd_scale.doctor.settings import Settings
from mvd_scale.doctor.start import examine_hostfile


def examine(settings: Settings, words: Sequence[str]) -> Report | None:
    """Make all checks.

    Args:
        settings: settings; with the hosts of a hostfile, and without a launcher, the ranks are started there.
        words: the same settings as options, for the ranks that are started.

    Returns:
        the report; None on a rank that has none.

    Raises:
        UserError: the launcher's environment is incomplete.
    """
    started, now = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    rank = launched_rank()
    if rank is not None:
        examined = examine_all(rank, settings)
    elif settings.hosts:
        examined = examine_hostfile(settings.hosts, words)
    else:
        examined = Examined((socket.gethostname(),), 1, examine_alone(settings))
    if examined is None:
        return None
    seconds = round(time.monotonic() - started, 1)
    return Report(__version__, now, seconds, examined.hosts, examined.ranks, tuple(examined.findings))


def leave(code: int) -> None:
    """End the process with an exit code, although a check may hang."""
    if hanging():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
