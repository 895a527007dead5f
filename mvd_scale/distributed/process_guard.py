"""Guard process, which runs a job until the guard's parent ends.

    python -m mvd_scale.distributed.process_guard FD COMMAND...

FD is the read end of a pipe whose write end only the parent holds. When the parent ends for any reason, the pipe
closes, and the guard sends SIGTERM to its process group. The guard must be the leader of a session of its own, so that
the signal reaches all ranks: the `deepspeed` command does not forward signals to them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    """Run the command, and exit with its exit code."""
    alive, *command = sys.argv[1:]
    # The guard belongs to the process group that it signals: it must outlive the job to return its exit code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    job = subprocess.Popen(command, preexec_fn=_end_on_request)
    threading.Thread(target=_end_with_parent, args=(int(alive),), daemon=True).start()
    sys.exit(job.wait())


def _end_on_request() -> None:
    """Restore the default action of SIGTERM in the job, which inherits the ignored signal from the guard."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with_parent(alive: int) -> None:
    """Wait until the pipe closes, and send SIGTERM to the process group."""
    # The parent never writes: the read returns when the last write end is closed.
    os.read(alive, 1)
    os.killpg(0, signal.SIGTERM)


if __name__ == "__main__":
    main()
