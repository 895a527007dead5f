"""Supervised command: its words, recipe and run folder."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mvd_scale.config import RunRecipe
from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.utils.events import EventLog
from mvd_scale.utils.lease import RENEW_SECONDS, LeaseView, look_at_lease

_UNSEEN_SECONDS = 3 * RENEW_SECONDS
"""Time without a renewal after which ranks may try; they themselves watch a lease of another host for longer."""


@dataclass
class SupervisedCommand:
    """Command that trains in a run folder, and resumes there. Implements `coordinator.Hooks`."""

    words: tuple[str, ...]
    """Words after `mvd-scale`."""
    recipe: RunRecipe
    _seen: tuple[LeaseView, float] | None = field(default=None, init=False)
    """Lease of another host, and when it was first seen so."""

    @property
    def command(self) -> list[str]:
        """Words of the command of a rank."""
        return [sys.executable, "-m", "mvd_scale", *self.words]

    def digest(self, hosts: Sequence[str]) -> str:
        """Digest of the words and the hosts, by which hosts of one job know each other."""
        return hashlib.sha256(json.dumps([self.words, list(hosts)]).encode()).hexdigest()

    def allows(self, ranks: int) -> bool:
        """Whether the global batch can be split over a number of ranks."""
        try:
            self.recipe.micro_batch_and_accumulation(ranks)
        except UserError:
            return False
        return True

    def folder_holder(self) -> str | None:
        """Description of who trains in the run folder; None if it is free."""
        folder = RunFolder(self.recipe.run.folder)
        view = look_at_lease(folder.lease_file)
        if view.alive is None:
            # Of another host: only its next renewal tells.
            now = time.monotonic()
            if self._seen is None or self._seen[0] != view:
                self._seen = view, now
            alive = now - self._seen[1] < _UNSEEN_SECONDS
        else:
            alive = view.alive
        return f"{view.holder or 'another process'} trains in {folder.path}" if alive else None

    def record_restart(self, reason: str, ranks: dict[str, int], attempt: int) -> None:
        """Write an event `restart`; arguments as `coordinator.Hooks`."""
        folder = RunFolder(self.recipe.run.folder)
        # Without a lease no rank has begun there; a file would make the folder look like that of somebody else.
        if folder.lease_file.exists():
            log = EventLog(folder.events)
            log.write("restart", reason=reason, hosts=list(ranks), ranks=sum(ranks.values()), attempt=attempt)
