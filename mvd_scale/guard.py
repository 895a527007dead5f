"""Runs a launcher and its ranks for as long as its own parent lives: `python -m mvd_scale.guard FD COMMAND...`.

FD is the reading end of a pipe that only the parent can write to: when it closes, however that happens, the job is
asked to end. It is started in a session of its own, since the `deepspeed` command hands no signals on to its ranks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    """Exit with the job's exit code."""
    alive, *command = sys.argv[1:]
    # Its own request to the group must not end it before the job.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    job = subprocess.Popen(command, preexec_fn=_end_on_request)
    threading.Thread(target=_end_with_parent, args=(int(alive),), daemon=True).start()
    sys.exit(job.wait())


def _end_on_request() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with_parent(alive: int) -> None:
    os.read(alive, 1)
    os.killpg(0, signal.SIGTERM)


if __name__ == "__main__":
    main()
