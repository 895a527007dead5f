"""Work of one rank of a large job for its share, and of rank 0 for all."""

from __future__ import annotations

import dataclasses
import math
import pickle
import time
from pathlib import Path

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from mvd_scale.checkpoints.tensor_folder import DESCRIPTION, complete_description, write_description_part
from mvd_scale.config import DataConfig, ModelConfig
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.data.sampling.sampler import RankShard, Sampler
from mvd_scale.distributed.health.progress import Progress
from mvd_scale.models import Encoder
from mvd_scale.training.checkpointing.pieces import Pieces, PiecesSavePlanner, State

_VIDEOS = 20_000
_CLIPS_OF_A_RANK = 8


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Cost of the sampler of a rank."""

    seconds: float
    """Seconds for a clip, after the first one of an epoch."""

    bytes: int
    """Size of sampler and shard, as workers receive them."""


def time_sampling(world_size: int, clips: int = 100) -> Sampling:
    """Draw clips of the last rank of a job whose global batch grows with its ranks.

    Args:
        world_size: number of ranks.
        clips: number of clips.
    """
    row = Row("video.mp4", "/video.mp4", frames=300, fps=30.0, height=256, width=340, codec="h264")
    sampler = Sampler(
        Manifest.from_rows([row] * _VIDEOS).shared(), DataConfig(), ModelConfig.model_validate({"size": "B"}), 0
    )
    shard = RankShard(sampler.clips, _CLIPS_OF_A_RANK * world_size, world_size - 1, world_size)
    sampler.plan(*shard.locate(shard.position(0)))
    started = time.perf_counter()
    for number in range(clips):
        sampler.plan(*shard.locate(shard.position(number % _CLIPS_OF_A_RANK)))
    return Sampling((time.perf_counter() - started) / clips, len(pickle.dumps((sampler, shard))))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Description of a checkpoint, and the time that it takes."""

    pieces: int
    bytes: int
    """Size of the description of all pieces."""

    planning: float
    """Seconds in which a rank plans its own pieces."""

    merging: float
    """Seconds in which rank 0 merges the descriptions of all ranks."""


def plan_checkpoint(size: str, world_size: int, stage: int, scratch: Path) -> Plan:
    """Plan the checkpoint of an encoder on so many ranks; no tensor is written.

    Args:
        size: S, B, L or H.
        world_size: number of ranks.
        stage: ZeRO stage: below 3 the ranks cut the parameters in a row, at 3 each parameter.
        scratch: folder for descriptions.
    """
    folder = scratch / f"{size} {world_size} {stage}"
    folder.mkdir()
    with torch.device("meta"):
        encoder = Encoder(ModelConfig.model_validate({"size": size}))
    shapes = {name: tuple(parameter.shape) for name, parameter in encoder.named_parameters()}
    planned = 0.0
    for rank in range(world_size):
        state = {
            f"{kind}.{name}": pieces
            for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
            for name, pieces in _share(shapes, rank, world_size, stage).items()
        }
        started = time.perf_counter()
        planner = PiecesSavePlanner(Progress())
        planner.set_up_planner(state, is_coordinator=True)
        (plan,), metadata = planner.create_global_plan([planner.create_local_plan()])
        planned += time.perf_counter() - started
        place = _StorageInfo(f"__{rank}_0.distcp", 0, 0)
        write_description_part(folder, rank, metadata, [WriteResult(item.index, 0, place) for item in plan.items])
    started = time.perf_counter()
    complete_description(folder, world_size)
    merged = time.perf_counter() - started
    text = (folder / DESCRIPTION).read_text(encoding="utf-8")
    return Plan(text.count('"offsets"'), len(text), planned / world_size, merged)


def _share(shapes: dict[str, tuple[int, ...]], rank: int, world_size: int, stage: int) -> State:
    """Pieces of the parameters that a rank holds, without values."""
    cut, before = {}, 0
    whole = -(-sum(map(math.prod, shapes.values())) // world_size)
    for name, shape in shapes.items():
        count = math.prod(shape)
        size, first = (-(-count // world_size), 0) if stage == 3 else (whole, before)
        start, stop = (min(max(edge * size - first, 0), count) for edge in (rank, rank + 1))
        cut[name] = Pieces.of_range(torch.empty(stop - start, device="meta"), start, shape)
        before += count
    return cut


def time_request(requests: int = 5000) -> float:
    """Microseconds of a request to torch's store over one connection of this machine."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = time.perf_counter()
    for _ in range(requests):
        store.check(["nothing"])
    return 1e6 * (time.perf_counter() - started) / requests
