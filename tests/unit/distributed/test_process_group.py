"""Environment variables that a launcher must set for a rank."""

from __future__ import annotations

import time

import pytest

from mvd_scale.distributed import process_group as ranks
from mvd_scale.distributed.health.progress import Position
from mvd_scale.distributed.health.verdict import Heartbeats
from mvd_scale.distributed.process_group import Ranks, init_distributed, run_on_rank0
from mvd_scale.errors import UserError
from mvd_scale.performance.benchmarks.simulated_ranks import SimulatedJob
from mvd_scale.utils.machine import machine_id

PLACE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("missing", "said"),
    [(["LOCAL_RANK"], "LOCAL_RANK is"), (["WORLD_SIZE", "MASTER_PORT"], "WORLD_SIZE, MASTER_PORT are")],
)
def test_a_gap_is_named_with_the_way_to_fill_it(missing: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    for name in missing:
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f"^RANK is 1, but {said} not set: .*`deepspeed` launcher.* unset RANK"):
        init_distributed("cpu", timeout_minutes=1)


def test_hosts_are_known_by_the_launchers_number_or_else_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CROSS_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert ranks._host() == " ".join(machine_id())
    monkeypatch.setenv("GROUP_RANK", "3")
    assert ranks._host() == "3"
    monkeypatch.setenv("CROSS_RANK", "1")
    assert ranks._host() == "1"


def test_rank_0_is_the_one_that_the_others_wait_for_while_it_works() -> None:
    job = SimulatedJob(2)
    main, other = (rank.progress for rank in job.ranks)
    during: list[Position] = []

    def work() -> None:
        deadline = time.monotonic() + 20
        while other.position.arrivals < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        during.extend([main.position, other.position])

    def save(rank: Ranks) -> Position:
        rank.progress.enter("save", 4)
        run_on_rank0(rank, "room for step 5", work, patience=3)
        return rank.progress.position

    after = job.run(save)
    assert [(at.phase, at.patience) for at in during] == [("room for step 5", 3)] * 2
    assert Heartbeats(dict(enumerate(during))).late() == [0]
    assert after[0] == after[1]
    assert after[0][3:6] == (1, 4, "save")
