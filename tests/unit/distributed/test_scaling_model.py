"""Jobs of many ranks, as threads: what they tell each other grows linearly, so that no rank's share grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mvd_scale.distributed.process_group import Ranks
from mvd_scale.performance.benchmarks.rank_conversations import conversations
from mvd_scale.performance.benchmarks.rank_growth import Cost
from mvd_scale.performance.benchmarks.rank_work import plan_checkpoint, time_sampling
from mvd_scale.performance.benchmarks.simulated_ranks import SimulatedJob, Traffic
from mvd_scale.training import preemption
from mvd_scale.training.metrics.meter import Meter, MicroBatchMetrics
from mvd_scale.training.preemption import PreemptionHandler

RANKS = (8, 16, 32, 64)


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[Traffic]]]:
    """Traffic of each rank in each conversation, by number of ranks."""
    folder = tmp_path_factory.mktemp("jobs")
    return {ranks: {name: list(each) for name, each in conversations(ranks, folder / str(ranks))} for ranks in RANKS}


@pytest.mark.parametrize("figure", ["requests", "keys", "bytes"])
def test_no_conversation_of_a_job_grows_faster_than_its_ranks(
    traffic: dict[int, dict[str, list[Traffic]]], figure: str
) -> None:
    for name in traffic[8]:
        points = {ranks: float(sum(getattr(each, figure) for each in talk[name])) for ranks, talk in traffic.items()}
        cost = Cost(name, figure, points)
        assert cost.is_linear, f"{name}: {figure} grow by the power {cost.power:.2f}: {points}"


def test_a_rank_asks_as_much_in_a_large_job_as_in_a_small_one(
    traffic: dict[int, dict[str, list[Traffic]]],
) -> None:
    """Only rank 0 asks about all others; the rank that comes last deletes a few keys for all."""
    for name in traffic[8]:
        small, large = (sorted(each.keys for each in traffic[ranks][name][1:]) for ranks in (8, 64))
        assert large[len(large) // 2] <= small[len(small) // 2], name
        assert large[-1] <= small[-1] + 8, name


def test_a_rank_that_waits_for_a_key_of_every_other_one_is_seen() -> None:
    def everyone_waits_for_everyone(ranks: Ranks) -> None:
        ranks.store.set(f"{ranks.rank}", "1")
        ranks.store.wait([f"{rank}" for rank in range(ranks.world_size)])

    counted = {ranks: SimulatedJob(ranks).count(everyone_waits_for_everyone) for ranks in RANKS}
    keys = Cost("barrier", "keys", {ranks: float(sum(each.keys for each in talk)) for ranks, talk in counted.items()})
    assert keys.power > 1.7
    assert not keys.is_linear


def test_the_pieces_of_a_checkpoint_grow_no_faster_than_the_ranks(tmp_path: Path) -> None:
    for stage in (2, 3):
        plans = {ranks: plan_checkpoint("S", ranks, stage, tmp_path) for ranks in RANKS}
        for figure in ("pieces", "bytes"):
            cost = Cost(f"ZeRO {stage}", figure, {ranks: float(getattr(plan, figure)) for ranks, plan in plans.items()})
            assert cost.is_linear, (cost.name, figure, cost.power)


def test_a_sampler_is_as_large_in_a_large_job() -> None:
    sizes = {ranks: time_sampling(ranks, clips=1).bytes for ranks in (2, 1024)}
    assert sizes[1024] <= sizes[2] + 16, sizes


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of the tensors of each collective operation, which does nothing."""
    sizes: list[int] = []

    def collective(*arguments: Any, **options: Any) -> None:
        tensors = [part for given in arguments for part in (given if isinstance(given, list) else [given])]
        sizes.append(sum(tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor)))

    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce", "gather"):
        monkeypatch.setattr(torch.distributed, name, collective)
    return sizes


def test_a_reading_of_the_metrics_is_as_large_in_a_large_job(sent: list[int]) -> None:
    def elements(world_size: int) -> list[int]:
        sent.clear()
        meter = Meter(["loss", "loss/image", "loss/video"], Ranks(0, 0, world_size, torch.device("cpu")))
        one = torch.ones(())
        meter.add_step([MicroBatchMetrics(one, dict.fromkeys(meter.losses, one), 1, 0.0)])
        meter.read(False, 0)
        return sent.copy()

    assert elements(4096) == elements(2) == [4, 3]


@pytest.mark.parametrize("world_size", [1, 3, 256, 257, 1000])
def test_all_ranks_stop_after_the_same_step(world_size: int) -> None:
    """Rank 0 comes last after every step: the others learn of its announcement as late as they can."""
    job = SimulatedJob(world_size)
    handlers = [PreemptionHandler() for _ in job.ranks]
    stopped: dict[int, int] = {}
    for step in range(20):
        if step == 5:
            handlers[-1].received = 15
        for connection in job.connections:
            connection.traffic = Traffic()
        for ranks, handler in reversed(list(zip(job.ranks, handlers, strict=True))):
            if handler.should_stop(ranks, step):
                stopped[ranks.rank] = step
        requests = sum(connection.traffic.requests for connection in job.connections)
        assert requests <= preemption._READERS + 6 if step < 5 else requests <= 2 * world_size + 10
        if stopped:
            break
    assert len(stopped) == world_size
    assert len(set(stopped.values())) == 1
    assert next(iter(stopped.values())) <= 5 + -(-world_size // preemption._READERS)
