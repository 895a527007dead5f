"""Rank of a toy job, which files in its folder tell what to do: `python -m tests.unit.elastic.toy_rank FOLDER`.

The first rank leases the folder, or ends with code 2. A rank writes `started.jsonl`, ends by the file `finish` with
code 0, and by `fail-RANK` with the code in it, once. A stop signal ends it with 128 + its number.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from mvd_scale.errors import UserError
from mvd_scale.utils.lease import Lease


def main() -> None:
    folder = Path(sys.argv[1])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    if os.environ["RANK"] == "0":
        try:
            Lease(folder / "lease.json", renew_seconds=0.3)
        except UserError:
            sys.exit(2)
    line = {name: os.environ[name] for name in names} | {"pid": os.getpid(), "parent": os.getppid()}
    with (folder / "started.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    failure = folder / f"fail-{os.environ['RANK']}"
    while not (folder / "finish").exists():
        if failure.exists():
            code = int(failure.read_text())
            failure.unlink()
            sys.exit(code)
        time.sleep(0.02)


if __name__ == "__main__":
    main()
