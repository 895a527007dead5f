"""Messages of the ranks of a run over the store, by threads that call the run's own functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from mvd_scale.config.training import CheckpointConfig
from mvd_scale.data.loaders.dali_failures import WINDOW, DaliFailures
from mvd_scale.distributed.cpu_affinity import count_cpus
from mvd_scale.distributed.health.verdict import Member
from mvd_scale.distributed.health.watchdog import Watchdog
from mvd_scale.distributed.process_group import Ranks, barrier_via_store, run_on_rank0
from mvd_scale.performance.benchmarks.simulated_ranks import SimulatedJob, Traffic
from mvd_scale.training.checkpointing.pieces import Pieces
from mvd_scale.training.checkpointing.selection import Retention
from mvd_scale.training.checkpointing.writer import CheckpointWriter
from mvd_scale.training.preemption import PreemptionHandler
from mvd_scale.utils.events import EventLog


def conversations(world_size: int, folder: Path) -> Iterator[tuple[str, Sequence[Traffic]]]:
    """Yield every conversation of a run's ranks over the store, and the traffic of each rank.

    Args:
        world_size: number of ranks.
        folder: folder for checkpoints.
    """
    job = SimulatedJob(world_size)
    exchanges = job.run(lambda ranks: ranks.open_exchange())
    handlers = job.run(lambda ranks: PreemptionHandler())
    retention = Retention([folder], CheckpointConfig())
    writers = job.run(lambda ranks: CheckpointWriter(folder, ranks, retention))
    failures = job.run(lambda ranks: DaliFailures("cpu", 0, None, ranks.open_exchange()))
    watchdogs = job.run(lambda ranks: Watchdog(ranks, folder / "faults", EventLog(folder / "events.jsonl"), None))
    # The first windows are not collected yet, or not forgotten.
    job.run(lambda ranks: failures[ranks.rank].advance(2 * WINDOW))

    def save(ranks: Ranks) -> None:
        writer = writers[ranks.rank]
        run_on_rank0(ranks, "room for step 1", lambda: writer.make_room(1, 0))
        piece = Pieces.of_range(torch.zeros(4), 4 * ranks.rank, (4 * ranks.world_size,))
        writer.start(1, {"model.weight": piece}, {})
        writer.wait()

    talks: dict[str, Callable[[Ranks], object]] = {
        "start: CPUs of the ranks": lambda ranks: count_cpus(ranks.open_exchange()),
        "start: what rank 0 finds": lambda ranks: run_on_rank0(ranks, "prepared", lambda: None),
        "start: digests of all ranks": lambda ranks: exchanges[ranks.rank].decide("digests", "0" * 64, len),
        "start: processes of the watchdog": lambda ranks: watchdogs[ranks.rank].connect(
            Member(ranks.rank, ranks.host, 1)
        ),
        "2 s: heartbeats": lambda ranks: watchdogs[ranks.rank].exchange(),
        "step: request to stop": lambda ranks: handlers[ranks.rank].should_stop(ranks, 0),
        f"{WINDOW} steps: failures of DALI": lambda ranks: failures[ranks.rank].advance(3 * WINDOW),
        "save": save,
        "end of an evaluation": lambda ranks: barrier_via_store(ranks, "evaluated"),
    }
    for name, talk in talks.items():
        yield name, job.count(talk)
