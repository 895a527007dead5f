"""Cable that delays and loses frames: TAP devices of two hosts, and a thread that passes frames from one to the other.

It does what `tc qdisc add dev eth0 root netem delay 200ms loss 5%` does on both hosts, on kernels without netem too.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest

_TUN = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
_MOST_BYTES = 65536


@contextmanager
def tap_device(name: str) -> Iterator[int]:
    """Make a network interface whose other end is a file descriptor, which reads and writes one frame at a time."""
    if not os.path.exists(_TUN):
        pytest.skip(f"a slow cable needs {_TUN}")
    device = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
        yield device
    finally:
        os.close(device)


@dataclass
class SlowCable:
    """Cable between two TAP devices. Its values can be changed at any time."""

    seconds: float = 0.0
    """Time that a frame takes, in each direction."""

    loss: float = 0.0
    """Share of frames that are lost, in each direction."""

    @contextmanager
    def between(self, one: int, other: int) -> Iterator[None]:
        """Pass frames from each device to the other in a `with` block."""
        ended = threading.Event()
        thread = threading.Thread(target=self._pass_on, args=(one, other, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _pass_on(self, one: int, other: int, ended: threading.Event) -> None:
        there = {one: other, other: one}
        draw, number = random.Random(0), itertools.count()
        under_way: list[tuple[float, int, int, bytes]] = []
        while not ended.is_set():
            wait = min(under_way[0][0] - time.monotonic(), 0.1) if under_way else 0.1
            ready, _, _ = select.select([one, other], [], [], max(wait, 0))
            for device in ready:
                frame = os.read(device, _MOST_BYTES)
                if draw.random() >= self.loss:
                    arrival = (time.monotonic() + self.seconds, next(number), there[device], frame)
                    heapq.heappush(under_way, arrival)
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, device, frame = heapq.heappop(under_way)
                # A frame to an interface that is down is lost.
                with suppress(OSError):
                    os.write(device, frame)
