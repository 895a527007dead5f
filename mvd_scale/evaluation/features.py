"""`mvd-scale features`: features of videos by a frozen encoder, written in shards.

Legend: V views, N tokens, t time slices, D width.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mvd_scale.checkpoints.checkpoint import Checkpoint
from mvd_scale.checkpoints.reading import tensors_digest
from mvd_scale.checkpoints.weights import build_encoder, read_checkpoint
from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.config.training import Precision
from mvd_scale.data.batch import ViewBatch
from mvd_scale.data.loaders.view_loader import ViewShape
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.sampling.eval_views import view_frame_indices
from mvd_scale.distributed.process_group import Ranks, run_on_rank0
from mvd_scale.errors import UserError
from mvd_scale.evaluation.sharded_run import ResultShards
from mvd_scale.models import Encoder
from mvd_scale.models.precision import check_precision, dtype_of

Pool = Literal["clip", "time", "none"]
Format = Literal["safetensors", "parquet"]
_COLUMNS = ("video", "label", "clip", "crop", "first_frame")


@dataclass(frozen=True)
class FeatureOptions:
    """Options of the features that are written for each view."""

    views: ViewsConfig
    layer: int | None = None
    """Number of the block whose output is used, from 1; the last one if None."""

    pool: Pool = "clip"
    """Mean over all tokens of a clip (D), over the tokens of each time slice (t, D), or no mean (N, D)."""

    norm: bool = True
    """Apply the encoder's final norm, if it has one and the last block is used."""

    format: Format = "safetensors"
    shard: int = 256
    """Videos, or groups of sliding clips, per shard."""


class FeatureExtractor:
    """Frozen encoder, cut after a block, on a device and in a precision.

    Raises:
        UserError: the encoder has fewer blocks than `layer`.
    """

    def __init__(self, encoder: Encoder, options: FeatureOptions, device: torch.device, dtype: torch.dtype) -> None:
        depth = len(encoder.blocks)
        layer = options.layer or depth
        if layer > depth:
            raise UserError(f"--layer {layer}: the encoder has {depth} blocks; expected 1 to {depth}")
        del encoder.blocks[layer:]
        if layer < depth or not options.norm:
            encoder.norm = None
        self.encoder = encoder.eval().requires_grad_(False).to(device, dtype)
        self.pool = options.pool

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Compute the features of clips: uint8 (V, T, S, S, 3) to (V, D), (V, t, D) or (V, N, D)."""
        return pool_tokens(self.encoder(pixels), self.encoder.config.grid, self.pool)


def pool_tokens(tokens: Tensor, grid: tuple[int, int, int], pool: Pool) -> Tensor:
    """Average tokens (V, N, D), without a class token in front: (V, D), (V, t, D), or (V, N, D) unchanged."""
    time, rows, columns = grid
    tokens = tokens[:, tokens.shape[1] - time * rows * columns :]
    if pool == "clip":
        return tokens.mean(1)
    return tokens.unflatten(1, (time, rows * columns)).mean(2) if pool == "time" else tokens


def write_features(
    checkpoint: Path | Checkpoint,
    data: DataConfig,
    options: FeatureOptions,
    out: Path,
    ranks: Ranks,
    *,
    batch: int,
    precision: Precision,
) -> tuple[int, int]:
    """Write the features of all videos of a source; continues an interrupted extraction. All ranks must call it.

    Args:
        checkpoint: weights in any known format, or what was read of them.
        data: `source` and `root` give the videos; workers and time limit apply to decoding.
        options: views, layer, pooling and file format.
        out: folder for the shards, `index.parquet` and `features.json`.
        ranks: this process among all; each writes its share.
        batch: videos that a rank decodes in one batch.
        precision: precision of the encoder.

    Returns:
        number of views written, and number of videos that could not be decoded.

    Raises:
        UserError: weights or videos cannot be read, or `out` holds other features.
    """
    check_precision(precision, ranks.device)
    read = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)
    extract = FeatureExtractor(
        build_encoder(read, final_norm=read.final_norm), options, ranks.device, dtype_of(precision)
    )
    model, shards = read.model, ResultShards(out, "features", options.format, options.shard)
    settings = {
        "checkpoint": read.source, "source": data.source, "root": data.root, "precision": precision,
        "frames": model.frames, "input_size": model.input_size, **asdict(options),
        "views": options.views.model_dump(),
    }  # fmt: skip

    def prepare() -> None:
        shards.claim(settings | {"weights": tensors_digest(read.tensors()), "positions": read.model.positions})
        shards.open(data).save(shards.manifest)

    run_on_rank0(ranks, f"features {out}", prepare)
    manifest = Manifest.load(shards.manifest)
    files = shards.write_missing_views(
        manifest,
        data,
        options.views,
        ViewShape.of(model),
        ranks,
        batch=batch,
        results=lambda views: _rows(views, extract, manifest, options, model.frames),
        write=_write_shard,
    )
    views, failed = run_on_rank0(ranks, f"index {out}", lambda: _index(out, manifest, files))
    return views, failed


Rows = dict[str, NDArray[np.int64] | Tensor]


def _rows(
    batch: ViewBatch, extract: FeatureExtractor, manifest: Manifest, options: FeatureOptions, frames: int
) -> Iterator[Rows]:
    """Yield the columns and features of each item of a batch; an item that could not be decoded gives no rows."""
    features, crops = _features(extract, batch), options.views.crops
    for k in range(len(batch.video_ids)):
        row, first = int(batch.video_ids[k]), int(batch.first_clips[k])
        starts = view_frame_indices(options.views, int(manifest.frames[row]), frames=frames)[:, 0]
        clips = min(options.views.clips, len(starts) - first) if bool(batch.decoded[k]) else 0
        clip = np.repeat(np.arange(first, first + clips), crops)
        yield {
            "video": np.full(clips * crops, row),
            "label": np.full(clips * crops, int(manifest.label[row])),
            "clip": clip,
            "crop": np.tile(np.arange(crops), clips),
            "first_frame": starts[clip],
            "features": features[k, :clips].flatten(0, 1),
        }


def _features(extract: FeatureExtractor, batch: ViewBatch) -> Tensor:
    """Compute features (B, K, C, ...) on the host; the encoder gets one video at a time, which bounds its memory."""
    return torch.stack([extract(views.flatten(0, 1)).unflatten(0, views.shape[:2]).cpu() for views in batch.pixels])


def _write_shard(file: Path, rows: list[Rows]) -> None:
    columns = {name: np.concatenate([np.asarray(row[name]) for row in rows]).astype(np.int64) for name in _COLUMNS}
    features = torch.cat([torch.as_tensor(row["features"]) for row in rows])
    if ".safetensors" in file.suffixes:
        save_file({"features": features} | {name: torch.from_numpy(column) for name, column in columns.items()}, file)
    else:
        shape = list(features.shape[1:])
        flat = pa.array(features.float().flatten(1).numpy().reshape(-1), pa.float32())
        listed = pa.FixedSizeListArray.from_arrays(flat, math.prod(shape))
        table = pa.table({**columns, "features": listed}).replace_schema_metadata({"shape": json.dumps(shape)})
        pq.write_table(table, file)


def _index(out: Path, manifest: Manifest, files: list[Path]) -> list[int]:
    """Write `index.parquet`, one row per view: the name of its video, its shard and its row there.

    Returns:
        number of views, and number of videos that could not be decoded.
    """
    parts = []
    for file in files:
        if file.suffix == ".parquet":
            columns = pq.read_table(file, columns=list(_COLUMNS)).to_pydict()
        else:
            with safe_open(file, framework="np") as opened:
                columns = {name: opened.get_tensor(name).tolist() for name in _COLUMNS}
        count = len(columns["video"])
        parts.append(columns | {"shard": [file.name] * count, "row": list(range(count))})
    whole = {name: [value for part in parts for value in part[name]] for name in (*_COLUMNS, "shard", "row")}
    names = [manifest.name[row] for row in whole["video"]]
    partial = out / "index.parquet.partial"
    pq.write_table(pa.table({"name": pa.array(names, pa.string()), **whole}), partial)
    os.replace(partial, out / "index.parquet")
    return [len(names), len(set(manifest.usable.tolist()) - set(whole["video"]))]
