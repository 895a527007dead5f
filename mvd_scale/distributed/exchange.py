"""Exchange of messages among ranks over the store of the process group, without collective operations.

Data loaders use it: they run between the collectives of the training step, and their messages are rare and small.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any


class StoreExchange:
    """`Exchange` over a store of torch.distributed.

    Args:
        store: store of the process group.
        rank: number of this rank. All ranks must create as many exchanges, in the same order.
        world_size: number of ranks.
        timeout: longest wait for another rank.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout: timedelta) -> None:
        self._store = store
        self._world_size = world_size
        self._timeout = timeout
        number = store.add(f"mvd_scale/exchanges of rank {rank}", 1)
        self._prefix = f"mvd_scale/exchange {number}"

    def post(self, name: str, lines: list[str]) -> None:
        """Publish the lines of this rank under a name, once per name; an empty list counts as well."""
        key = f"{self._prefix}/{name}"
        if lines:
            self._store.append(f"{key}/lines", "".join(f"{line}\n" for line in lines))
        # The last rank makes sure that there is a text to read, and says that nothing more will come.
        if self._store.add(f"{key}/posts", 1) == self._world_size:
            self._store.append(f"{key}/lines", "\n")
            self._store.set(f"{key}/complete", "1")

    def collect(self, name: str) -> list[str]:
        """Return the lines that all ranks published under a name, and wait for those that have not yet."""
        key = f"{self._prefix}/{name}"
        self._store.wait([f"{key}/complete"], self._timeout)
        text: str = self._store.get(f"{key}/lines").decode()
        return sorted(line for line in text.splitlines() if line)
