"""Environment variables that the launcher sets for each process."""

from __future__ import annotations

import os


def env_rank() -> int:
    """Rank of this process, from `RANK`; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_world_size(world_size: int) -> int:
    """Number of ranks on this host, from `LOCAL_SIZE` or `LOCAL_WORLD_SIZE`; `world_size` without a launcher."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world_size)))
