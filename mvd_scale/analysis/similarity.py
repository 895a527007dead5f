"""`mvd-scale analyze similarity`: similarity of the feature maps of a clip's time slices (Figure 3).

Section 4.3, "Analysis of features encoded by different teachers", compares "feature maps across different frames of
each input video clip via the cosine similarity". Here entry (i, j) of a matrix is the cosine between the features of
slices i and j at the same place, averaged over all places, and then over all clips of all videos. The paper does not
state the order of mean and cosine. Features are those that a student is taught by: the output of the last block,
without final norm and class token. An image model sees the front frame of each slice (Sec. 3.3).

Legend: S models, X clips, V views, T frames, t time slices, P places of a slice, D width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mvd_scale import __version__
from mvd_scale.analysis.subjects import ClipShape, Lineup, Subject
from mvd_scale.checkpoints import build_encoder
from mvd_scale.checkpoints.reading import tensors_digest
from mvd_scale.config.data import DataConfig
from mvd_scale.config.training import Precision
from mvd_scale.data.batch import ViewBatch
from mvd_scale.data.manifest import Manifest
from mvd_scale.distributed.process_group import Ranks, run_on_rank0
from mvd_scale.errors import UserError
from mvd_scale.evaluation.features import FeatureExtractor, FeatureOptions
from mvd_scale.evaluation.sharded_run import ResultShards, left_out
from mvd_scale.models.precision import check_precision, dtype_of
from mvd_scale.targets.image_teacher import front_frames
from mvd_scale.utils.io import write_atomic

FILE = "similarity.json"
PICTURE = "similarity.png"

DEFINITION = (
    "entry (i, j): cosine between the features of time slices i and j at the same place, averaged over the places of a "
    "slice and over all clips; features of the last block without final norm and class token unless layer and norm say "
    "otherwise; image models see the front frame of each slice (Sec. 4.3, Figure 3)"
)

_SHARD = 32
"""Videos of a shard of results; ranks share shards."""


@dataclass(frozen=True)
class SimilarityMatrix:
    """Similarity of time slices in the features of one model."""

    name: str
    checkpoint: str
    weights: str
    """Digest of the weights."""

    positions: str

    frames: int
    """Frames that the model takes: 1 for an image model."""

    input_size: int

    matrix: list[list[float]]
    """Mean over clips, (t, t)."""

    deviation: list[list[float]] | None
    """Standard deviation over clips, (t, t); None for a single clip."""

    @property
    def adjacent(self) -> float:
        """Mean similarity of neighbouring slices; 1 for a single slice."""
        values = np.diagonal(self.matrix, 1)
        return float(values.mean()) if len(values) else 1.0

    @property
    def ends(self) -> float:
        """Similarity of the first and the last slice."""
        return self.matrix[0][-1]


@dataclass(frozen=True)
class Similarity:
    """Matrices of several models on the same clips, with all that is needed to compute them again."""

    models: list[SimilarityMatrix]
    clips: int
    """Number of clips that were averaged."""

    left_out: dict[str, str]
    """Reasons why videos were left out, by name of the video."""

    models_left_out: dict[str, str]
    """Reasons why models were left out, by name of the model."""

    settings: dict[str, Any]

    def to_json(self) -> str:
        """Format as one JSON object."""
        return json.dumps({"definition": DEFINITION, "version": __version__, **asdict(self)}, indent=2)

    def to_text(self) -> str:
        """Format as a table with a line for each model, and lines for models and videos that were left out."""
        width = max(len(model.name) for model in self.models)
        lines = [f"{'model':{width}}  adjacent slices  first and last"]
        lines += [f"{model.name:{width}}  {model.adjacent:15.3f}  {model.ends:14.3f}" for model in self.models]
        lines.append(f"mean over {self.clips} clips")
        lines += [f"left out: model {name}: {reason}" for name, reason in self.models_left_out.items()]
        if self.left_out:
            name, reason = next(iter(self.left_out.items()))
            lines.append(f"left out: {len(self.left_out)} videos, named in {FILE}; the first is {name}: {reason}")
        return "\n".join(lines)


class SliceEncoder:
    """Frozen encoder that gives features by time slice for clips of another model's shape, too."""

    def __init__(
        self, subject: Subject, clip: ClipShape, options: FeatureOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        encoder = build_encoder(subject.checkpoint, final_norm=subject.checkpoint.final_norm)
        self.extract = FeatureExtractor(encoder, options, device, dtype)
        self.model = subject.model
        self.on_frames = subject.is_image_model
        self.clip = clip

    def __call__(self, pixels: Tensor) -> Tensor:
        """Compute the features of clips: uint8 (V, T, side, side, 3) to (V, t, P, D), in the dtype of the weights."""
        pixels = resize_clips(pixels, self.model.input_size)
        if self.on_frames:
            frames, shape = front_frames(pixels, self.clip.tubelet)
            return self.extract(frames).unflatten(0, shape)
        return self.extract(pixels).unflatten(1, (self.clip.slices, -1))


def resize_clips(pixels: Tensor, side: int) -> Tensor:
    """Resize the square frames of clips, antialiased as those of teachers with another input: uint8 (V, T, H, W, 3)."""
    if pixels.shape[2] == side:
        return pixels
    frames = pixels.flatten(0, 1).permute(0, 3, 1, 2).float()
    resized = F.interpolate(frames, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).byte().permute(0, 2, 3, 1).unflatten(0, pixels.shape[:2])


def slice_similarity(features: Tensor) -> Tensor:
    """Compute the mean cosine at equal places between time slices: (V, t, P, D) to float32 (V, t, t)."""
    unit = F.normalize(features.float(), dim=-1)
    return torch.einsum("vipd,vjpd->vij", unit, unit) / unit.shape[2]


def compute_similarity(
    lineup: Lineup,
    data: DataConfig,
    options: FeatureOptions,
    out: Path,
    ranks: Ranks,
    *,
    batch: int,
    precision: Precision,
) -> Similarity:
    """Compute the matrices of all models on the videos of a source; continues an interrupted pass. All ranks call it.

    Args:
        lineup: the models, the clips that they take, and those that were left out.
        data: `source` and `root` give the videos; workers and time limit apply to decoding.
        options: views, layer and final norm.
        out: folder for the matrices of each clip, and for `similarity.json`.
        ranks: this process among all; each computes its share.
        batch: videos that a rank decodes in one batch.
        precision: precision of the encoders.

    Returns:
        the matrices, on every rank.

    Raises:
        UserError: weights or videos cannot be read, no video can be decoded, or `out` holds other results.
    """
    check_precision(precision, ranks.device)
    subjects, clip, models_left_out = lineup
    encoders = [SliceEncoder(each, clip, options, ranks.device, dtype_of(precision)) for each in subjects]
    shards = ResultShards(out, "clips", "safetensors", _SHARD)
    settings: dict[str, Any] = {
        "models": {subject.name: _facts(subject) for subject in subjects},
        "source": data.source, "root": data.root, "precision": precision, "layer": options.layer, "norm": options.norm,
        "views": options.views.model_dump(), **asdict(clip),
    }  # fmt: skip

    def prepare() -> None:
        shards.claim(settings)
        shards.open(data).save(shards.manifest)

    run_on_rank0(ranks, f"similarity {out}", prepare)
    manifest = Manifest.load(shards.manifest)
    files = shards.write_missing_views(
        manifest,
        data,
        options.views,
        clip.view,
        ranks,
        batch=batch,
        results=lambda views: _matrices(views, encoders),
        write=_write_shard,
    )
    found = run_on_rank0(
        ranks, f"average {out}", lambda: asdict(_average(shards, files, manifest, settings, models_left_out))
    )
    return Similarity(**found | {"models": [SimilarityMatrix(**model) for model in found["models"]]})


def _facts(subject: Subject) -> dict[str, Any]:
    checkpoint, model = subject.checkpoint, subject.model
    return {
        "checkpoint": checkpoint.source, "weights": tensors_digest(checkpoint.tensors()), "positions": model.positions,
        "frames": model.frames, "input_size": model.input_size,
    }  # fmt: skip


def _matrices(batch: ViewBatch, encoders: Sequence[SliceEncoder]) -> Iterator[dict[str, Tensor]]:
    """Yield the matrices of all clips of each video, float32 (V, S, t, t); a video that was not decoded has no clips.

    The encoders get one video at a time, which bounds their memory.
    """
    for views, row, decoded in zip(batch.pixels, batch.video_ids, batch.decoded, strict=True):
        clips = views.flatten(0, 1)
        matrices = torch.stack([slice_similarity(encoder(clips)).cpu() for encoder in encoders], dim=1)
        kept = len(clips) if decoded else 0
        yield {"video": row.repeat(kept), "similarity": matrices[:kept]}


def _write_shard(file: Path, videos: list[dict[str, Tensor]]) -> None:
    save_file({name: torch.cat([video[name] for video in videos]) for name in ("video", "similarity")}, file)


def _average(
    shards: ResultShards,
    files: list[Path],
    manifest: Manifest,
    settings: dict[str, Any],
    models_left_out: Mapping[str, str],
) -> Similarity:
    """Average the matrices of all clips, in the order of the manifest on any number of ranks, and write the result."""
    every = np.concatenate([load_file(file)["similarity"].double().numpy() for file in files])
    missing = {manifest.name[row]: reason for row, reason in left_out(shards.out, manifest).items()}
    if not len(every):
        raise UserError(
            f"none of the {len(manifest.name)} videos of {settings['source']} can be decoded: see {shards.quarantine}"
        )
    matrices, several = [], len(every) > 1
    for number, (name, facts) in enumerate(settings["models"].items()):
        mean, deviation = every[:, number].mean(0), every[:, number].std(0, ddof=1) if several else None
        deviations = None if deviation is None else deviation.tolist()
        matrices.append(SimilarityMatrix(name, **facts, matrix=mean.tolist(), deviation=deviations))
    shared = {name: value for name, value in settings.items() if name != "models"}
    facts = {**shared, "manifest": manifest.digest}
    found = Similarity(matrices, len(every), missing, dict(models_left_out), facts)
    write_atomic(shards.out / FILE, found.to_json() + "\n")
    return found
