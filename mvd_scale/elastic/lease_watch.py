"""Watch over the lease of a run folder by a process that does not take part in it."""

from __future__ import annotations

import time
from pathlib import Path

from mvd_scale.utils.lease import RENEW_SECONDS, LeaseView, look_at_lease


class LeaseWatch:
    """Says who holds a lease. That of a process on another host counts as held until it was long not renewed.

    Ranks themselves watch such a lease for longer, before they take it over: this watch only keeps them from a start
    that the lease would refuse.

    Args:
        path: file of the lease.
        seconds: time without a renewal after which the process on another host counts as gone.
    """

    def __init__(self, path: Path, seconds: float = 2 * RENEW_SECONDS) -> None:
        self._path = path
        self._seconds = seconds
        self._seen: tuple[LeaseView, float] | None = None
        """Lease of another host, and when it was first seen so."""

    def holder(self) -> str | None:
        """Description of the process that holds the lease, or why nobody can tell; None if the folder is free."""
        try:
            view = look_at_lease(self._path)
        except OSError as error:
            # A network file system that does not answer for a moment has told nothing of a holder.
            return f"{self._path} cannot be read ({error.strerror})"
        alive = view.alive
        if alive is None:
            now = time.monotonic()
            if self._seen is None or self._seen[0] != view:
                self._seen = view, now
            alive = now - self._seen[1] < self._seconds
        return f"{view.holder or 'another process'} trains in {self._path.parent}" if alive else None
