"""Tests of stop requests: all ranks end after the same step, with the exit code of the signal that one received."""

from __future__ import annotations

import os
import signal
import socket

import pytest
import torch
from torch.distributed import HashStore

from mvd_scale.distributed.process_group import Ranks
from mvd_scale.training import preemption
from mvd_scale.training.preemption import PreemptionHandler


@pytest.mark.parametrize("receiver", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_ends_all(receiver: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(preemption.logger, "info", lambda text, *values: told.append(text % values))
    store = HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    ranks = [Ranks(rank, rank, 2, torch.device("cpu")) for rank in range(2)]
    handlers = [PreemptionHandler() for _ in ranks]
    with handlers[receiver]:
        os.kill(os.getpid(), number)
    stops = {rank: [] for rank in range(2)}
    for step in range(4):
        for rank, handler in enumerate(handlers):
            stops[rank].append(handler.should_stop(ranks[rank], step))
    # The wish of rank 1 is read by rank 0 one step later.
    last = 1 if receiver == 0 else 2
    assert stops == {rank: [step >= last for step in range(4)] for rank in range(2)}
    assert [handler.exit_code for handler in handlers] == [128 + number] * 2
    name = f"rank {receiver} (host {socket.gethostname()}, pid {os.getpid()})"
    assert told == [f"{name} received {number.name} by step {last}: the run ends after step {last + 1}"]
