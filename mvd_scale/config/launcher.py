"""What the launcher tells a process before anything is imported."""

from __future__ import annotations

import os


def launched_rank() -> int:
    """The rank that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))
