"""Messages among ranks over the store: who reads what, and that nothing is left in the store that all have read."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import pytest
from torch.distributed import HashStore

from mvd_scale.distributed.exchange import StoreExchange
from mvd_scale.errors import UserError

T = TypeVar("T")
RANKS = 4


def on_all(store: HashStore, work: Callable[[StoreExchange], T]) -> list[T]:
    """Results of a function on all ranks, of which two share a machine."""

    def run(rank: int) -> T:
        return work(StoreExchange(store, rank, RANKS, timedelta(seconds=60), place=f"host {rank // 2}"))

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(run, range(RANKS)))


def test_ranks_of_a_machine_see_each_other_and_no_others() -> None:
    seen = on_all(HashStore(), lambda exchange: exchange.gather("cpus", ["0-3", exchange.rank]))
    assert seen[0] == seen[1] == {0: ["0-3", 0], 1: ["0-3", 1]}
    assert seen[2] == seen[3] == {2: ["0-3", 2], 3: ["0-3", 3]}


def test_rank_0_decides_from_the_values_of_all() -> None:
    assert (
        on_all(HashStore(), lambda exchange: exchange.decide("sum", 10 * exchange.rank, lambda values: values))
        == [[0, 10, 20, 30]] * RANKS
    )


def test_invalid_input_that_rank_0_finds_ends_all_ranks() -> None:
    def refuse(values: list[Any]) -> None:
        raise UserError(f"rank {values.index('other')} differs")

    def message(exchange: StoreExchange) -> str:
        with pytest.raises(UserError) as caught:
            exchange.decide("compare", "other" if exchange.rank == 2 else "same", refuse)
        return str(caught.value)

    assert on_all(HashStore(), message) == ["rank 2 differs"] * RANKS


def test_a_crash_of_rank_0_ends_the_others_at_once() -> None:
    def crash(values: list[Any]) -> None:
        raise ZeroDivisionError

    def error(exchange: StoreExchange) -> type[Exception]:
        with pytest.raises((ZeroDivisionError, UserError)) as caught:
            exchange.decide("crash", None, crash)
        return caught.type

    assert on_all(HashStore(), error) == [ZeroDivisionError, *[UserError] * (RANKS - 1)]


@pytest.mark.parametrize("kind", ["post", "decide"])
def test_what_all_have_read_leaves_the_store(kind: str) -> None:
    def talk(exchange: StoreExchange, times: int) -> None:
        for number in range(times):
            if kind == "decide":
                exchange.decide(f"{number}", number, sum)
            else:
                exchange.post(f"{number}", [f"{exchange.rank}"])
                if number:
                    assert exchange.collect(f"{number - 1}") == ["0", "1", "2", "3"]

    def kept(times: int) -> int:
        store = HashStore()
        on_all(store, lambda exchange: talk(exchange, times))
        return int(store.num_keys())

    assert kept(50) == kept(3)
