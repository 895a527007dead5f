"""`mvd-scale propose`: a fine-tuning recipe for the user's videos, derived from their number, length and the encoder.

The rules interpolate the published settings for HMDB51 (3 500 videos), UCF101 (9 500), SSv2 (169 000) and Kinetics-400
(240 000): smaller sets get more epochs, smaller batches and more dropout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from mvd_scale.config.model import ModelConfig, Positions
from mvd_scale.data.manifest import Manifest
from mvd_scale.evaluation.labels import check_labels, class_count

_STEPS_OF_AN_EPOCH = 20
"""Least number of optimizer steps per epoch, if the batch can be made small enough."""

_STEPS = 2000
"""Least number of optimizer steps in all, unless that needs more than `_EPOCHS` epochs."""

_EPOCHS = 200

_SMALL = 10_000
"""Number of videos up to which a set gets the settings of UCF101 and HMDB51."""

_MICRO_BATCH = {384: 24, 768: 12, 1024: 4, 1280: 4}
"""Clips of 16 x 224 x 224 that fit on a GPU of 32 GB, by the width of the encoder."""


@dataclass(frozen=True)
class RecipeProposal:
    """Proposed values of a recipe with their reasons."""

    values: dict[str, dict[str, Any]]
    """Values by section and key."""

    reasons: dict[str, str]
    """Reasons by dotted key."""

    title: str

    def to_yaml(self, command: str) -> str:
        """Format as YAML with the reasons as comments; `command` is the command line that runs the recipe."""
        folder = self.values["run"]["folder"]
        weights = f"{folder}/best.safetensors" if "validation" in self.values else folder
        lines = [f"# {self.title}", "#", f"# command   {command}"]
        lines += [f"# test      launch/single_node.sh evaluate {weights} TEST_VIDEOS --out {folder}/test"]
        lines += ["# hardware  any; the micro batch is that of 32 GB"]
        lines += ["# time      not measured", "# published none", "base: finetune/own_videos"]
        for section, values in self.values.items():
            lines.append(f"{section}:")
            for key, value in values.items():
                reason = self.reasons.get(f"{section}.{key}")
                if reason is not None:
                    lines.append(f"  # {reason}")
                lines.append(f"  {key}: {_inline(value)}")
        return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    # An infinite width, because YAML would wrap long values.
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf).splitlines()[0]


class InitialEncoder(NamedTuple):
    """Weights from which a fine-tuning starts."""

    path: Path

    positions: Positions | None = None
    """Position table of their training, for a file that does not tell."""


def propose_recipe(
    manifest: Manifest,
    model: ModelConfig,
    *,
    source: str,
    weights: InitialEncoder,
    validation: str | None,
    folder: Path,
) -> RecipeProposal:
    """Propose settings for labelled videos.

    Args:
        manifest: the training videos.
        model: shape of the pre-trained encoder.
        source: source of the videos, for the recipe.
        weights: the pre-trained weights.
        validation: source of videos that are evaluated after every epoch, or None.
        folder: folder of the run.

    Raises:
        UserError: labels are missing, or a class has no video.
    """
    classes = class_count(manifest)
    check_labels(manifest, classes, source, every_class=True)
    videos = len(manifest.usable)
    frames = int(np.median(manifest.frames[manifest.usable]))
    assert model.width is not None
    if model.frames == 1:
        # An image model is inflated to clips.
        clip = {"frames": 16, "tubelet": 2, "positions": "sincos3d"}
        model = ModelConfig.model_validate(model.model_dump() | clip)
    model = model.model_copy(update={"class_token": False})
    assert model.width is not None
    large, small = model.width >= 1024, videos <= _SMALL
    batch = _batch(videos)
    steps = videos // batch
    epochs = _epochs(videos, steps)
    data, test, why = _clips(frames, model.frames)
    training: dict[str, Any] = {
        "initial_encoder": str(weights.path),
        **({} if weights.positions is None else {"initial_positions": weights.positions}),
        "epochs": epochs,
        "warmup_epochs": min(5, epochs // 10),
        "global_batch": 2 * batch,
        "micro_batch": min(_MICRO_BATCH.get(model.width, 16), 2 * batch),
        "base_lr": 1e-3 if large else 5e-4,
        "layer_decay": 0.7 if small else 0.75,
    }
    values: dict[str, dict[str, Any]] = {
        "run": {"folder": str(folder)},
        "model": model.model_dump(mode="json") | {"drop_path": 0.3 if large else 0.2 if small else 0.1},
        "data": {"source": source, **data},
        "classifier": {"dropout": 0.5 if large or small else 0.0},
        "training": training,
        "test": test,
    }
    if validation is not None:
        values["validation"] = {"source": validation}
    reasons = {
        "data.sampling": why,
        "data.flip": "half of the clips are mirrored: set 0 if left and right are different classes",
        "classifier.dropout": "0.5 as published for L, H and small sets" if large or small else "as published",
        "training.epochs": f"{epochs * steps} steps in all",
        "training.global_batch": f"two copies of {batch} videos: {steps} steps of an epoch",
        "training.base_lr": "of 256 clips without their copies; scaled with the batch",
        "validation.source": "chooses the epoch of best.safetensors, so it must not hold videos of the test",
    }
    return RecipeProposal(
        values, reasons, f"Fine-tuning on {videos} videos of {classes} classes, {frames} frames long (median)."
    )


def _batch(videos: int) -> int:
    """Videos per optimizer step: a power of two from 8 to 256, or fewer if there are fewer videos."""
    fitting = max(videos // _STEPS_OF_AN_EPOCH, 1)
    return min(max(2 ** int(math.log2(fitting)), min(8, videos)), 256)


def _epochs(videos: int, steps: int) -> int:
    usual = 100 * min(_SMALL / videos, 1) ** 0.3
    return round(min(max(usual, _STEPS / steps), _EPOCHS))


def _clips(length: int, frames: int) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Choose the sampling of clips by the length of a video in frames.

    Returns:
        values for training, values for the test, and the reason.
    """
    for stride in (4, 2):
        if length >= frames * stride:
            return (
                {"sampling": "window", "stride": stride, "flip": 0.5},
                {"sampling": "dense", "stride": stride, "clips": 5, "crops": 3},
                f"every {stride}th frame: {frames * stride} of a video's {length} frames make a clip",
            )
    return (
        {"sampling": "segments", "flip": 0.5},
        {"sampling": "uniform", "clips": 2, "crops": 3},
        f"a clip spans the whole video: its {length} frames are fewer than two for each frame of a clip",
    )
