"""Supervised command: its words, recipe and run folder."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mvd_scale.config import RunRecipe
from mvd_scale.elastic.lease_watch import LeaseWatch
from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.utils.events import EventLog

logger = logging.getLogger("mvd_scale")


@dataclass
class SupervisedCommand:
    """Command that trains in a run folder, and resumes there. Implements `coordinator.Hooks`."""

    words: tuple[str, ...]
    """Words after `mvd-scale`."""
    recipe: RunRecipe

    def __post_init__(self) -> None:
        """Begin to watch the run folder."""
        self._lease = LeaseWatch(RunFolder(self.recipe.run.folder).lease_file)

    @property
    def command(self) -> list[str]:
        """Words of the command of a rank."""
        return [sys.executable, "-m", "mvd_scale", *self.words]

    def digest(self, hosts: Sequence[str]) -> str:
        """Digest of the words and the hosts, by which hosts of one job know each other."""
        return hashlib.sha256(json.dumps([self.words, list(hosts)]).encode()).hexdigest()

    def allows(self, ranks: int) -> bool:
        """Whether the global batch can be split over a number of ranks."""
        if self.recipe.training.global_batch % ranks:
            return False
        try:
            self.recipe.micro_batch_and_accumulation(ranks)
        except UserError:
            return False
        return True

    def folder_holder(self) -> str | None:
        """Description of who trains in the run folder; None if it is free."""
        return self._lease.holder()

    def record_restart(self, reason: str, ranks: dict[str, int], attempt: int) -> None:
        """Write an event `restart`; arguments as `coordinator.Hooks`."""
        folder = RunFolder(self.recipe.run.folder)
        # Without a lease no rank has begun there; a file would make the folder look like that of somebody else.
        try:
            begun = folder.lease_file.exists()
        except OSError as error:
            logger.warning("%s cannot be read (%s): the restart is not recorded", folder.lease_file, error.strerror)
            return
        if begun:
            log = EventLog(folder.events)
            log.write("restart", reason=reason, hosts=list(ranks), ranks=sum(ranks.values()), attempt=attempt)
