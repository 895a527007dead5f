"""Peak memory of a process or a GPU."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB: of tensors on a GPU, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # VmHWM starts at 0 with the program, whereas getrusage's maximum includes the memory of the parent process.
    peak = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return (int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20
