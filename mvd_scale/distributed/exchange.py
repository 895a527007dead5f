"""Exchange of messages among ranks over the store of the process group, without collective operations.

Data loaders and the writer of checkpoints use it: they run beside the collectives of the training step, and their
messages are rare and small. Every method costs each rank a fixed number of requests and the store one key for all
ranks, so that the traffic of a job grows linearly with its ranks; `bench ranks` counts it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from mvd_scale.errors import UserError


class StoreExchange:
    """`Exchange` over a store of torch.distributed. All ranks must make the same calls in the same order.

    Args:
        store: store of the process group, or a clone of it for a thread that must not block the others' requests.
        rank: number of this rank. All ranks must create as many exchanges, in the same order.
        world_size: number of ranks.
        timeout: longest wait for another rank.
        place: identifier of this rank's machine, for `gather`.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout: timedelta, place: str = "") -> None:
        self.rank = rank
        self._place = place
        self._store = store
        self._world_size = world_size
        self._timeout = timeout
        self._number = store.add(f"mvd_scale/exchanges of rank {rank}", 1)
        self._read: list[str] = []

    def post(self, name: str, lines: list[str]) -> None:
        """Publish the lines of this rank under a name, once per name; an empty list counts as well."""
        self._append(self._key(name), "".join(f"{line}\n" for line in lines))

    def collect(self, name: str) -> list[str]:
        """Return the lines that all ranks published under a name, and wait for those that have not yet."""
        key = self._key(name)
        lines = self._wait_for_lines(key)
        self._read += [f"{key}/lines", f"{key}/posts", f"{key}/complete"]
        return sorted(lines)

    def gather(self, name: str, mine: Any) -> dict[int, Any]:
        """Return the values of all ranks of this rank's machine, by rank.

        Args:
            name: name of the call, unique in the exchange.
            mine: value of this rank, serialisable as JSON.
        """
        key = self._key(name)
        here = f"{key}/at {self._place}"
        self._store.append(here, f"{json.dumps([self.rank, mine])}\n")
        self._append(key, "")
        self._store.wait([f"{key}/complete"], self._timeout)
        return dict(sorted(map(json.loads, self._store.get(here).decode().splitlines())))

    def decide(self, name: str, mine: Any, work: Callable[[list[Any]], Any]) -> Any:
        """Call a function with the values of all ranks on rank 0; all ranks return its result or raise its `UserError`.

        Args:
            name: name of the call, unique in the exchange.
            mine: value of this rank, serialisable as JSON.
            work: function from the values in the order of ranks to a result that is serialisable as JSON.
        """
        key = self._key(name)
        self._append(key, f"{json.dumps([self.rank, mine])}\n")
        try:
            return answer_from_rank0(self._store, key, self.rank, lambda: work(self._values_of_all(key)), self._timeout)
        finally:
            self._read += [f"{key}/lines", f"{key}/posts", f"{key}/complete", f"{key}/answer"]

    def wait_for_all(self, name: str) -> None:
        """Wait until all ranks have called this method with the same name, unique in the exchange."""
        key = self._key(name)
        self._append(key, "")
        self._store.wait([f"{key}/complete"], self._timeout)

    def _key(self, name: str) -> str:
        return f"mvd_scale/exchange {self._number}/{name}"

    def _append(self, key: str, text: str) -> None:
        """Add the text of this rank; the last one says that nothing more will come, and deletes what all have read."""
        if text:
            self._store.append(f"{key}/lines", text)
        read, self._read = self._read, []
        if self._store.add(f"{key}/posts", 1) == self._world_size:
            # There must be a text to read.
            self._store.append(f"{key}/lines", "\n")
            self._store.set(f"{key}/complete", "1")
            # The others have read it too: they made the same calls before this one.
            for old in read:
                self._store.delete_key(old)

    def _wait_for_lines(self, key: str) -> list[str]:
        self._store.wait([f"{key}/complete"], self._timeout)
        text: str = self._store.get(f"{key}/lines").decode()
        return [line for line in text.splitlines() if line]

    def _values_of_all(self, key: str) -> list[Any]:
        values = dict(map(json.loads, self._wait_for_lines(key)))
        return [value for _, value in sorted(values.items())]


def answer_from_rank0(store: Any, key: str, rank: int, work: Callable[[], Any], timeout: timedelta) -> Any:
    """Run a function on rank 0; all ranks return its result or raise its `UserError`.

    Args:
        store: store that all ranks see.
        key: prefix of the answer's key, which names the work in messages.
        rank: number of this rank.
        work: function to run; its result must be serialisable as JSON.
        timeout: longest wait for the answer.
    """
    if rank == 0:
        try:
            answer = {"result": work()}
        except UserError as error:
            answer = {"error": str(error), "exit_code": error.exit_code}
        except BaseException:
            # Without an answer the other ranks would wait until the timeout.
            work_name = key.removeprefix("mvd_scale/")
            failed = {"error": f"rank 0 failed in {work_name!r}; see its own message", "exit_code": 1}
            store.set(f"{key}/answer", json.dumps(failed))
            raise
        store.set(f"{key}/answer", json.dumps(answer))
    store.wait([f"{key}/answer"], timeout)
    answer = json.loads(store.get(f"{key}/answer"))
    if "error" in answer:
        failure = UserError(answer["error"])
        failure.reported, failure.exit_code = rank != 0, answer["exit_code"]
        raise failure
    return answer["result"]
