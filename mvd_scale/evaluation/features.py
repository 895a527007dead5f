"""`mvd-scale features`: what a frozen encoder makes of the videos of a manifest, in shards on disk.

    list what there is to load -> cut it into shards -> each rank writes the shards that are missing -> index

A shard is written whole or not at all, so that a start after a kill goes on with the next one, by any number of ranks.

Legend: V views, N tokens, t time slices, D width.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mvd_scale.checkpoints.weights import build_encoder, read_checkpoint
from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.config.training import Precision
from mvd_scale.data.batch import ViewBatch
from mvd_scale.data.index import open_source
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.view_loader import ViewLoader, view_items
from mvd_scale.data.views import clips_of
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder
from mvd_scale.training.engine import Ranks, check_precision, dtype_of, everybody_done, first_decides
from mvd_scale.training.run_folder import write_whole

logger = logging.getLogger("mvd_scale")

Pool = Literal["clip", "time", "none"]
Format = Literal["safetensors", "parquet"]
_COLUMNS = ("video", "label", "clip", "crop", "first_frame")


@dataclass(frozen=True)
class FeatureOptions:
    """What is written of each view."""

    views: ViewsConfig
    layer: int | None = None
    """Block whose output is taken, from 1; the last one if None."""

    pool: Pool = "clip"
    """Mean over all tokens of a clip (D), over those of each time slice (t, D), or none (N, D)."""

    norm: bool = True
    """Apply the encoder's final norm, where it has one and the last block is taken."""

    format: Format = "safetensors"
    shard: int = 256
    """Videos, or groups of sliding clips, of a shard."""


class FeatureExtractor:
    """A frozen encoder up to some layer, on its device and in its precision."""

    def __init__(self, encoder: Encoder, options: FeatureOptions, device: torch.device, dtype: torch.dtype) -> None:
        depth = len(encoder.blocks)
        layer = options.layer or depth
        if layer > depth:
            raise UserError(f"--layer {layer}: the encoder has {depth} blocks")
        del encoder.blocks[layer:]
        if layer < depth or not options.norm:
            encoder.norm = None
        self.encoder = encoder.eval().requires_grad_(False).to(device, dtype)
        self.pool = options.pool

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Features of clips: uint8 (V, T, S, S, 3) to (V, D), (V, t, D) or (V, N, D)."""
        return pooled(self.encoder(pixels), self.encoder.config.grid, self.pool)


def pooled(tokens: Tensor, grid: tuple[int, int, int], pool: Pool) -> Tensor:
    """Means of tokens (V, N, D), a class token in front left out: (V, D), (V, t, D), or (V, N, D) as they are."""
    time, rows, columns = grid
    tokens = tokens[:, tokens.shape[1] - time * rows * columns :]
    if pool == "clip":
        return tokens.mean(1)
    return tokens.unflatten(1, (time, rows * columns)).mean(2) if pool == "time" else tokens


def write_features(
    checkpoint: Path,
    data: DataConfig,
    options: FeatureOptions,
    out: Path,
    ranks: Ranks,
    *,
    batch: int,
    precision: Precision,
) -> tuple[int, int]:
    """Write the features of all videos of a source; go on where an earlier start was cut off.

    Args:
        checkpoint: weights in any known format.
        data: `source` and `root` say which videos; workers and time limit how they are read.
        options: what is written.
        out: folder of the shards, `index.parquet` and `features.json`.
        ranks: each writes its share.
        batch: videos that a rank decodes together.
        precision: of the encoder.

    Returns:
        views written in all, and videos that could not be decoded.

    Raises:
        UserError: weights or videos cannot be read, or `out` holds other features.
    """
    check_precision(precision, ranks.device)
    read = read_checkpoint(checkpoint)
    extract = FeatureExtractor(
        build_encoder(read, final_norm=read.final_norm), options, ranks.device, dtype_of(precision)
    )
    model = read.model
    manifest_file, quarantine = out / "manifest.parquet", out / "quarantine.jsonl"
    settings = {
        "checkpoint": str(checkpoint), "source": data.source, "precision": precision,
        "frames": model.frames, "input_size": model.input_size, **asdict(options),
        "views": options.views.model_dump(),
    }  # fmt: skip

    def prepare() -> None:
        _claim(out, settings)
        if not manifest_file.is_file():
            open_source(data, out).save(manifest_file)

    first_decides(ranks, "features", prepare)
    manifest = Manifest.load(manifest_file)
    items = view_items(manifest, options.views, frames=model.frames)
    shards = [items[start : start + options.shard] for start in range(0, len(items), options.shard)]
    missing = [n for n in range(len(shards)) if not _shard_file(out, n, options.format).is_file()]
    mine = missing[ranks.rank :: ranks.world_size]
    logger.info("%d of %d shards are there already", len(shards) - len(missing), len(shards))
    if mine:
        loader = ViewLoader(
            manifest,
            data,
            options.views,
            np.concatenate([shards[n] for n in mine]),
            frames=model.frames,
            side=model.input_size,
            batch=batch,
            world_size=ranks.world_size,
            device=ranks.device,
            report=quarantine,
        )
        with loader:
            rows = _rows(loader, extract, manifest, options, model.frames)
            for n in mine:
                _write_shard(_shard_file(out, n, options.format), [next(rows) for _ in range(len(shards[n]))])
    everybody_done(ranks, "features")
    return first_decides(ranks, "index", lambda: _index(out, manifest, options, len(shards)))


Rows = dict[str, NDArray[np.int64] | Tensor]


def _rows(
    loader: ViewLoader, extract: FeatureExtractor, manifest: Manifest, options: FeatureOptions, frames: int
) -> Iterator[Rows]:
    """Columns and features of one item after the other; of one that could not be decoded, none."""
    for batch in loader:
        features = _features(extract, batch)
        for k in range(len(batch.video_ids)):
            row, first = int(batch.video_ids[k]), int(batch.first_clips[k])
            starts = clips_of(options.views, int(manifest.frames[row]), frames=frames)[:, 0]
            clips = min(options.views.clips, len(starts) - first) if bool(batch.decoded[k]) else 0
            crops = options.views.crops
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
    """(B, K, C, ...) on the host, one video after the other through the encoder."""
    return torch.stack([extract(views.flatten(0, 1)).unflatten(0, views.shape[:2]).cpu() for views in batch.pixels])


def _claim(out: Path, settings: Mapping[str, Any]) -> None:
    """See that the folder is free or holds these very features.

    Raises:
        UserError: it holds others, or cannot be written.
    """
    described = out / "features.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if described.is_file():
            stands = json.loads(described.read_text())
            differing = [key for key, value in settings.items() if stands.get(key) != value]
            if differing:
                there, here = (", ".join(f"{key} {of.get(key)}" for key in differing) for of in (stands, settings))
                raise UserError(f"{out} holds features with {there}; this start has {here}: choose another --out")
        elif any(out.iterdir()):
            raise UserError(f"{out} exists and holds no features: choose an empty or new folder with --out")
        write_whole(described, json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error


def _shard_file(out: Path, number: int, kind: Format) -> Path:
    return out / f"features_{number:06d}.{kind}"


def _write_shard(file: Path, rows: list[Rows]) -> None:
    columns = {name: np.concatenate([np.asarray(row[name]) for row in rows]).astype(np.int64) for name in _COLUMNS}
    features = torch.cat([torch.as_tensor(row["features"]) for row in rows])
    partial = file.with_name(file.name + ".partial")
    if file.suffix == ".safetensors":
        save_file(
            {"features": features, **{name: torch.from_numpy(column) for name, column in columns.items()}}, partial
        )
    else:
        shape = list(features.shape[1:])
        flat = pa.array(features.float().flatten(1).numpy().reshape(-1), pa.float32())
        listed = pa.FixedSizeListArray.from_arrays(flat, math.prod(shape))
        table = pa.table({**columns, "features": listed}).replace_schema_metadata({"shape": json.dumps(shape)})
        pq.write_table(table, partial)
    os.replace(partial, file)


def _index(out: Path, manifest: Manifest, options: FeatureOptions, shards: int) -> list[int]:
    """Write `index.parquet`: a row per view with the name of its video and its place in the shards."""
    parts = []
    for number in range(shards):
        file = _shard_file(out, number, options.format)
        if options.format == "parquet":
            columns = pq.read_table(file, columns=list(_COLUMNS)).to_pydict()
        else:
            with safe_open(file, framework="np") as opened:
                columns = {name: opened.get_tensor(name).tolist() for name in _COLUMNS}
        parts.append(
            columns | {"shard": [file.name] * len(columns["video"]), "row": list(range(len(columns["video"])))}
        )
    whole = {name: [value for part in parts for value in part[name]] for name in (*_COLUMNS, "shard", "row")}
    names = [manifest.name[row] for row in whole["video"]]
    partial = out / "index.parquet.partial"
    pq.write_table(pa.table({"name": pa.array(names, pa.string()), **whole}), partial)
    os.replace(partial, out / "index.parquet")
    return [len(names), len(set(manifest.usable.tolist()) - set(whole["video"]))]
