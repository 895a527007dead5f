"""A model for other clips than it was trained on: more or fewer frames, another input size, images to video.

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
    """The same weights for other clips; None leaves a value as it is.

    Fixed position tables are rebuilt at the new grid, learned ones interpolated (bicubic in space, linear in time).
    An image model becomes a video model where `tubelet` is given: every frame of a tubelet gets an equal share of the
    patch embedding, so that a still clip is embedded as its image was.

    Raises:
        UserError: the tubelet of a video model would change, or the numbers do not fit the patches.
    """
    model = checkpoint.model
    image = model.tubelet == 1 and model.frames == 1
    wanted = model.tubelet if tubelet is None else tubelet
    if wanted != model.tubelet and not image:
        raise UserError(
            f"{checkpoint.source} embeds tubelets of {model.tubelet} frames, not {wanted}: its weights tell those "
            f"{model.tubelet} frames apart by motion, and no others can be made of them. "
            "Only an image model can be inflated; choose a checkpoint of that tubelet"
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
        raise UserError(f"{checkpoint.source} cannot take such clips: {reasons}") from error
    if adapted == model:
        return checkpoint
    encoder = dict(checkpoint.encoder)
    if "positions" in encoder:
        encoder["positions"] = resize_positions(encoder["positions"], model.grid, adapted.grid)
    if wanted != model.tubelet:
        encoder["patch_embed.weight"] = _inflate(encoder["patch_embed.weight"], wanted)
    return replace(checkpoint, model=adapted, encoder=encoder)


def _positions(model: ModelConfig, changes: dict[str, int]) -> Positions:
    """The table of images tells no time: clips get MVD's."""
    still = changes["frames"] == changes["tubelet"]
    return "sincos3d" if model.positions == "sincos2d" and not still else model.positions


def _inflate(weight: Tensor, tubelet: int) -> Tensor:
    """(D, p p 3) to (D, t p p 3)."""
    return (weight / tubelet).repeat(1, tubelet)
