"""What the launcher tells a process before anything is imported."""

from __future__ import annotations

import os


def launched_rank() -> int:
    """The rank that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def ranks_on_this_host(world_size: int) -> int:
    """Ranks that share this machine's cores; all of them without a launcher."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world_size)))
