"""Environment variables that the launcher sets for each process."""

from __future__ import annotations

import os


def env_rank() -> int:
    """Rank of this process, from `RANK`; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))
