"""Models of other projects whose weights look like those of a known format, but compute something else.

Only what they are is known of them: reading them as a format that they resemble would give wrong features in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from mvd_scale.checkpoints.formats.format import patch_axes
from mvd_scale.checkpoints.formats.internvideo2 import INTERNVIDEO2
from mvd_scale.checkpoints.formats.vjepa2 import V_JEPA_2, V_JEPA_2_1, is_fused_clip_model

Tensors = Mapping[str, Tensor]


def _has(*ends: str) -> Callable[[Tensors], bool]:
    return lambda tensors: any(name.endswith(ends) for name in tensors)


def _has_layer_scale(tensors: Tensors) -> bool:
    names = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
    return patch_axes(tensors, *names) == 4 and _has("ls1.gamma", "gamma_1", "layer_scale1.lambda1")(tensors)


def _is_clip_model_of_unknown_positions(tensors: Tensors) -> bool:
    if V_JEPA_2.recognise(tensors) or V_JEPA_2_1.recognise(tensors):
        return False
    return is_fused_clip_model(tensors) and "pos_embed" not in tensors


_FOREIGN: tuple[tuple[Callable[[Tensors], bool], str, str], ...] = (
    (
        _has("pos_embed_spatial"),
        "MAE-ST (facebookresearch/mae_st)",
        "its encoder has a class token and separate position tables of space and time",
    ),
    (
        _has_layer_scale,
        "DINOv2 or another model with LayerScale",
        "its blocks scale each residual branch; a timm teacher (kind: timm) reads it",
    ),
    (
        _has("rel_pos_h", "relative_position_bias_table", "relative_position_index"),
        "a model with relative positions, such as BEiT or MViT",
        "its attention adds a table to the scores",
    ),
    (
        _is_clip_model_of_unknown_positions,
        "a model of clips without a stored position table",
        "it has biases that VideoMAE and MVD lack, and is no V-JEPA 2, whose encoders end in a norm and have no head; "
        "if it adds a fixed table, give it with --positions",
    ),
)


def find_foreign(tensors: Tensors, *, positions_given: bool) -> tuple[str, str] | None:
    """Name of the model that a file holds and the reason why it is not read; None if it is no known foreign one.

    Args:
        tensors: tensors by the names of the file, without wrapper prefixes.
        positions_given: whether the user states the position table.
    """
    if INTERNVIDEO2.recognise(tensors):
        # Its separate position tables have the names of MAE-ST's.
        return None
    for recognise, name, reason in _FOREIGN:
        if recognise(tensors) and not (positions_given and recognise is _is_clip_model_of_unknown_positions):
            return name, reason
    return None
