"""Models of other projects whose weights look like those of a known format, but compute something else.

Only what they are is known of them: reading them as a format that they resemble would give wrong features in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from mvd_scale.checkpoints.formats.format import patch_axes

Tensors = Mapping[str, Tensor]


def _has(*ends: str) -> Callable[[Tensors], bool]:
    return lambda tensors: any(name.endswith(ends) for name in tensors)


def _has_layer_scale(tensors: Tensors) -> bool:
    names = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
    return patch_axes(tensors, *names) == 4 and _has("ls1.gamma", "gamma_1", "layer_scale1.lambda1")(tensors)


def _is_clip_model_of_unknown_positions(tensors: Tensors) -> bool:
    # VideoMAE and MVD, which store no table either, have no bias of the keys.
    fused = _has("attn.qkv.bias")(tensors) and not _has("attn.q_bias")(tensors)
    return patch_axes(tensors, "patch_embed.proj.weight") == 5 and fused and "pos_embed" not in tensors


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
        "V-JEPA 2 or another model of clips without a stored position table",
        "it has biases that VideoMAE and MVD lack, and seems to turn queries and keys by their positions; if it adds a "
        "fixed table, give it with --positions",
    ),
)


def find_foreign(tensors: Tensors, *, positions_given: bool) -> tuple[str, str] | None:
    """Name of the model that a file holds and the reason why it is not read; None if it is no known foreign one.

    Args:
        tensors: tensors by the names of the file, without wrapper prefixes.
        positions_given: whether the user states the position table.
    """
    for recognise, name, reason in _FOREIGN:
        if recognise(tensors) and not (positions_given and recognise is _is_clip_model_of_unknown_positions):
            return name, reason
    return None
