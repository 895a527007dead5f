"""Run by test_gather_streams.py: prints the streams on which DeepSpeed starts the gathers of a teacher's weights.

The CPU's accelerator gets streams, which only have names, in the way that CUDA's has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed.accelerator import get_accelerator

from mvd_scale.config import ModelConfig
from mvd_scale.distributed.process_group import destroy_distributed, init_distributed
from mvd_scale.models import Encoder
from mvd_scale.training.placement import Decision, TeacherPlacement, TeacherShards
from mvd_scale.training.teachers.place import place_teacher

NO, FP32 = Decision(False, ""), Decision("fp32", "")


class Stream:
    """A stream of DeepSpeed's own, apart from the current one."""

    name = "apart"

    def wait_stream(self, other: object) -> None:
        """Wait for another stream."""

    def synchronize(self) -> None:
        """Make the host wait."""


class CurrentStream(Stream):
    name = "current"


def give_streams(started: list[str]) -> None:
    """Give the CPU's accelerator streams; append to `started` the name of each that becomes the current one."""
    kind, current = type(get_accelerator()), CurrentStream()

    @contextmanager
    def stream(self: object, chosen: Stream) -> Iterator[None]:
        started.append(chosen.name)
        yield

    kind.is_synchronized_device = lambda self: False
    kind.resolves_data_dependency = lambda self: False
    kind.handles_memory_backpressure = lambda self: True
    kind.Stream = lambda self, *_: Stream()
    kind.default_stream = kind.current_stream = lambda self, *_: current
    kind.stream = stream
    kind.synchronize = lambda self, *_: started.append("host waits")
    torch.Tensor.record_stream = lambda self, stream: None


def main() -> None:
    ranks = init_distributed("cpu", timeout_minutes=2)
    started: list[str] = []
    give_streams(started)
    shape = ModelConfig(width=32, depth=2, heads=2, frames=4, input_size=32)
    seen = {}
    for moves in (False, True):
        shards = Decision(TeacherShards("world", 1, moves=moves), "")
        placed = TeacherPlacement("video", FP32, FP32, shards, compile=NO, cuda_graph=NO, prefetch=NO)
        teacher = place_teacher(Encoder(shape, final_norm=False), placed, ranks)
        assert started[-1] == "host waits"
        started.clear()
        with torch.no_grad():
            teacher(torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8))
        seen["moves" if moves else "stays"] = sorted({name for name in started if name != "host waits"})
    destroy_distributed()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
