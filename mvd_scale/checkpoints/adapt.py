"""Adaptation of a model to another number of frames, another input size, or from images to video.

Legend: N tokens, D width, t frames of a tubelet, p side of a patch.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import ValidationError
from torch import Tensor

from mvd_scale.checkpoints.checkpoint import Checkpoint
from mvd_scale.config import ModelConfig
from mvd_scale.config.model import Positions
from mvd_scale.errors import UserError
from mvd_scale.models.positions import resize_positions


def adapt(
    checkpoint: Checkpoint, *, frames: int | None = None, input_size: int | None = None, tubelet: int | None = None
) -> Checkpoint:
    """Return a checkpoint with the same weights for clips of another shape; None leaves a value unchanged.

    Fixed position tables are rebuilt at the new grid; learned ones are interpolated (bicubic in space, linear in time).
    An image model becomes a video model if `tubelet` is given: the weights of the patch embedding are divided equally
    over the frames of a tubelet, so that a clip of identical frames gets the same embedding as the single image.

    Args:
        checkpoint: the model to adapt; it is not modified.
        frames: frames of the new clips.
        input_size: side of the new clips in pixels.
        tubelet: frames per token.

    Raises:
        UserError: the tubelet of a video model would change, or the numbers are not multiples of tubelet and patch.
    """
    model = checkpoint.model
    image = model.tubelet == 1 and model.frames == 1
    wanted = model.tubelet if tubelet is None else tubelet
    if wanted != model.tubelet and not image:
        raise UserError(
            f"{checkpoint.source} embeds tubelets of {model.tubelet} frames, not {wanted}: its patch embedding has "
            f"different weights for each of those {model.tubelet} frames and cannot be converted. "
            f"Only an image model can be inflated; choose a checkpoint with tubelet {wanted}"
        )
    if image and tubelet is None and frames not in (None, 1):
        raise UserError(
            f"{checkpoint.source} is an image model and takes 1 frame, not {frames}; "
            "inflate it to clips with `--tubelet 2`"
        )
    changes = {
        "tubelet": wanted,
        "frames": frames or (wanted if image else model.frames),
        "input_size": input_size or model.input_size,
    }
    try:
        adapted = ModelConfig.model_validate(model.model_dump() | changes | {"positions": _positions(model, changes)})
    except ValidationError as error:
        reasons = "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
        raise UserError(
            f"{checkpoint.source} cannot take clips of {changes['frames']} frames at {changes['input_size']} pixels: "
            f"{reasons}"
        ) from error
    if adapted == model:
        return checkpoint
    encoder = dict(checkpoint.encoder)
    if "positions" in encoder:
        encoder["positions"] = resize_positions(encoder["positions"], model.grid, adapted.grid)
    if wanted != model.tubelet:
        encoder["patch_embed.weight"] = _inflate(encoder["patch_embed.weight"], wanted)
    return replace(checkpoint, model=adapted, encoder=encoder)


def _positions(model: ModelConfig, changes: dict[str, int]) -> Positions:
    """Return the kind of position table: sincos2d has no time axis, so clips of several tubelets get sincos3d (MVD)."""
    still = changes["frames"] == changes["tubelet"]
    return "sincos3d" if model.positions == "sincos2d" and not still else model.positions


def _inflate(weight: Tensor, tubelet: int) -> Tensor:
    """Repeat the weights of an image's patch embedding over the frames: (D, p p 3) to (D, t p p 3)."""
    return (weight / tubelet).repeat(1, tubelet)
