"""Memory that a worker has freed stays with it: the next clip causes no page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CLIPS = """
import resource, sys, threading
import numpy as np
from mvd_scale.data.worker_pool import keep_freed_memory

def clip():
    frames = [np.full(260_000, 1, np.uint8) for _ in range(48)]
    np.full(2_000_000, 1, np.uint8)

if sys.argv[1] == "keep":
    keep_freed_memory()
for n in range(6):
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=clip)
    thread.start()
    thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_memory_of_a_clip_is_used_again() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", CLIPS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "hand back")
    }
    assert faults["keep"] < 100
    assert faults["hand back"] > 1000
