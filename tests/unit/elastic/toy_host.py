"""Supervisor of one host of a toy job: `python -m tests.unit.elastic.toy_host FOLDER HOSTS HOST PORT SLOTS BATCH`."""

from __future__ import annotations

import sys
from pathlib import Path

from mvd_scale.elastic.coordinator import Membership
from mvd_scale.elastic.lease_watch import LeaseWatch
from mvd_scale.elastic.meeting import find_site
from mvd_scale.elastic.policy import Limits
from mvd_scale.elastic.supervisor import SupervisedJob, Supervisor
from mvd_scale.utils.logging import configure_logging


class Hooks:
    def __init__(self, batch: int, log: Path) -> None:
        self.batch = batch
        self.log = log
        self.lease = LeaseWatch(log.with_name("lease.json"), seconds=1.5)

    def allows(self, ranks: int) -> bool:
        return self.batch % ranks == 0

    def folder_holder(self) -> str | None:
        return self.lease.holder()

    def record_restart(self, reason: str, ranks: dict[str, int], attempt: int) -> None:
        with self.log.open("a") as file:
            file.write(f"{attempt} {sum(ranks.values())} {','.join(ranks)} {reason}\n")


def main() -> None:
    folder, hosts, host, port, slots, batch = sys.argv[1:]
    configure_logging()
    site = find_site(hosts.split(","), host, int(port))
    job = SupervisedJob(
        command=[sys.executable, "-m", "tests.unit.elastic.toy_rank", folder],
        digest="toy",
        hooks=Hooks(int(batch), Path(folder) / "restarts.txt"),
        membership=Membership(site.hosts, join_seconds=1.0, wait_seconds=20),
        limits=Limits(restarts=5, backoff=0.1, longest_backoff=0.4),
        dead_seconds=3,
        takeover_seconds=0.5,
    )
    sys.exit(Supervisor(job, site, int(slots)).run())


if __name__ == "__main__":
    main()
