"""Conversion of the tensors of a file to a `Checkpoint`: names, shapes, attention heads, position tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mvd_scale.checkpoints import native
from mvd_scale.checkpoints.checkpoint import Checkpoint, Hints
from mvd_scale.checkpoints.formats import is_ambiguous, may_be_v_jepa_2, recognise, strip_prefixes
from mvd_scale.checkpoints.formats.foreign import find_foreign
from mvd_scale.checkpoints.formats.format import Format, unnamed_classes
from mvd_scale.checkpoints.formats.jepa import V_JEPA
from mvd_scale.checkpoints.formats.names import pack_attention, to_native_name
from mvd_scale.checkpoints.reading import RawCheckpoint
from mvd_scale.checkpoints.shapes import (
    decoder_parts,
    encoder_heads,
    infer_decoder,
    infer_depth,
    infer_mlp_ratio,
    select_prefix,
)
from mvd_scale.config import ModelConfig
from mvd_scale.config.model import Positions
from mvd_scale.errors import UserError
from mvd_scale.models.positions import position_table

_PUBLISHED_GRID = 14
"""Patches along a side of the published video models of 224 pixels; used if a file contains no positions."""


def interpret(source: RawCheckpoint, hints: Hints) -> Checkpoint:
    """Recognise the format of a source and convert it to our names, at the shape it was trained with.

    Raises:
        UserError: the format is unknown, or the shapes describe no valid model. Missing and surplus tensors are not
            checked here but when the weights are loaded.
    """
    if native.is_native(source):
        return native.interpret(source, hints)
    tensors = strip_prefixes(source.tensors)
    _refuse_foreign(source, tensors, hints)
    form = recognise(tensors, hints.positions, hints.frames)
    if form is None:
        return native.interpret(replace(source, tensors=tensors), hints)
    if hints.positions is None and is_ambiguous(form):
        raise _ambiguous(source)
    if hints.positions is None and may_be_v_jepa_2(form, tensors):
        raise UserError(
            f"{source.path} can be V-JEPA or V-JEPA 2, which keeps a position table in its file but does not add it: "
            "say which with --positions sincos3d (V-JEPA) or --positions rotary_vjepa2 (V-JEPA 2), or by "
            "targets.NAME.model in a recipe"
        )
    ours, unexpected, unused = _rename(form.prepare(tensors), form)
    _check_kinds(source, ours)
    try:
        return _assemble(source, form, _merge(hints, form.facts(source.config)), ours, unexpected, unused)
    except ValidationError as error:
        raise UserError(f"{source.path} ({form.name}) has shapes that describe no valid model: {error}") from error


def _refuse_foreign(source: RawCheckpoint, tensors: Mapping[str, Tensor], hints: Hints) -> None:
    foreign = find_foreign(tensors, positions_given=hints.positions is not None)
    if foreign is not None:
        raise UserError(
            f"{source.path} is a file of {foreign[0]}, which is not read: {foreign[1]}. Formats that are read: MAE, "
            "VideoMAE, MVD, timm, Hugging Face, I-JEPA, V-JEPA 1 to 2.1, DINO"
        )


def _check_kinds(source: RawCheckpoint, tensors: Mapping[str, Tensor]) -> None:
    """Check that weights are real numbers: integers, and floats of 8 bits, need scales that no format here has.

    Raises:
        UserError: some are not.
    """
    for name, tensor in tensors.items():
        dense, real = tensor.layout is torch.strided, tensor.is_floating_point() and tensor.itemsize > 1
        if not dense or not real:
            kind = str(tensor.dtype if dense else tensor.layout).removeprefix("torch.")
            raise UserError(
                f"{source.path}: {name} is {kind}, expected dense weights of float32, float16 or bfloat16. Take the "
                "file from before it was quantized or packed"
            )


def _ambiguous(source: RawCheckpoint) -> UserError:
    return UserError(
        f"{source.path} is a fine-tuned classifier of MVD or of VideoMAE, whose files are alike, but whose code adds "
        "different position tables: say which with --positions sincos3d (MVD) or --positions sinusoid (VideoMAE), or "
        "by training.initial_positions in a recipe. "
        "`mvd-scale import FILE --as classifier --positions TABLE --out NEW` writes a file that every command reads"
    )


def _merge(hints: Hints, facts: Hints) -> Hints:
    given = {name: value for name, value in vars(hints).items() if value is not None}
    return replace(facts, **given)


def _rename(tensors: Mapping[str, Tensor], form: Format) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Rename the tensors and pack their attention.

    Returns:
        tensors by our names, tensors without a counterpart by their names, names deliberately not loaded.
    """
    ours: dict[str, Tensor] = {}
    unexpected: dict[str, Tensor] = {}
    unused: list[str] = []
    for name, tensor in tensors.items():
        renamed = to_native_name(name, form.modules, form.leaves)
        if renamed is not None and renamed not in ours:
            ours[renamed] = tensor
        elif name.startswith(form.ignored):
            unused.append(name)
        else:
            unexpected[name] = tensor
    return pack_attention(ours, key_bias=form.is_rotary), unexpected, unused


def _assemble(
    source: RawCheckpoint,
    form: Format,
    hints: Hints,
    tensors: dict[str, Tensor],
    unexpected: dict[str, Tensor],
    unused: list[str],
) -> Checkpoint:
    patches = tensors["encoder.patch_embed.weight"]
    tubelet, side = (patches.shape[2] if patches.ndim == 5 else 1), patches.shape[-1]
    tensors["encoder.patch_embed.weight"] = patches.movedim(1, -1).flatten(1)
    encoder = select_prefix(tensors, "encoder.")
    table, class_position = encoder.pop("positions", None), None
    if table is not None:
        table = table.flatten(0, -2)
        if "class_token" in encoder:
            class_position, table = table[:1], table[1:]
    width = patches.shape[0]
    values: dict[str, Any] = {
        "width": width,
        "depth": infer_depth(encoder, str(source.path)),
        "heads": hints.heads or form.heads.get(width) or encoder_heads(width, str(source.path)),
        "mlp_ratio": infer_mlp_ratio(encoder, width),
        "patch_size": side,
        "tubelet": tubelet,
        "class_token": "class_token" in encoder,
        "rms_norm": "blocks.0.attn.q_norm.weight" in encoder,
    }
    learned = None
    if table is None:
        frames = 1 if form.image else hints.frames or form.frames
        size = hints.input_size or form.input_size or _PUBLISHED_GRID * side
        model = ModelConfig(**values, positions=hints.positions or form.positions, frames=frames, input_size=size)
    else:
        model, learned = _place(source, form, hints, values, table)
    if class_position is not None and class_position.any():
        encoder["class_token"] = encoder["class_token"] + class_position.view(1, 1, -1)
    if learned is not None:
        encoder["positions"] = learned
    decoders = {}
    for target, weights in decoder_parts(tensors).items():
        positions = weights.pop("positions", None)
        part = infer_decoder(weights, hints, f"{source.path}: decoder {target}", image=form.image)
        decoders[target] = part
        if positions is not None and not _is_decoder_table(positions, model, part.config.width):
            unexpected[f"positions of decoder {target} that are not the fixed table {model.positions}"] = positions
    head = {name: tensor for name, tensor in tensors.items() if name.startswith(("norm.", "head."))}
    whole = Checkpoint(str(source.path), form.name, model, encoder, decoders, {}, head, unexpected, tuple(unused))
    return replace(whole, class_names=_class_names(source, form, whole.classes))


def _class_names(source: RawCheckpoint, form: Format, classes: int | None) -> tuple[str, ...]:
    """Names of the classes in the `config.json` of Hugging Face; none if it only numbers them.

    Raises:
        UserError: it has another number of names than the head has outputs, or does not number them from 0.
    """
    told = source.config.get("id2label")
    if classes is None or not isinstance(told, dict) or form.config is None:
        return ()
    numbered = {str(label): str(name) for label, name in told.items()}
    if numbered.keys() != {str(label) for label in range(classes)}:
        raise UserError(
            f"id2label in the config.json beside {source.path} names {len(told)} classes, but its head has {classes}, "
            f"0 to {classes - 1}: take the config.json of the same model"
        )
    names = tuple(numbered[str(label)] for label in range(classes))
    return () if names == unnamed_classes(classes) else names


def _place(
    source: RawCheckpoint, form: Format, hints: Hints, values: dict[str, Any], table: Tensor
) -> tuple[ModelConfig, Tensor | None]:
    """Find the token grid and the kind of a position table (N, D) by comparing it with every fixed table of N tokens.

    Returns:
        the model, and None; a table that equals no fixed one is learned and is returned with the model.
    """
    grids = list(_grids(len(table), image=form.image))
    for frames, side in grids:
        shape = {"frames": frames * values["tubelet"], "input_size": side * values["patch_size"]}
        for kind in _kinds(form, values["width"], frames):
            model = ModelConfig(**values, **shape, positions=kind)
            if _is_table(table, model, values["width"]):
                if hints.positions not in (None, kind):
                    raise UserError(
                        f"{source.path} holds the position table {kind}; --positions {hints.positions} contradicts it"
                    )
                return model, None
    # For V-JEPA, naming its own kind only tells the file from one of V-JEPA 2; its table is read as it is.
    tells_v_jepa = form is V_JEPA and hints.positions == form.positions
    if hints.positions is not None and not tells_v_jepa:
        raise UserError(f"{source.path} holds learned positions; leave `--positions {hints.positions}` out")
    wanted = (hints.frames or form.frames) // values["tubelet"]
    chosen = next((grid for grid in grids if form.image or grid[0] == wanted), None)
    if chosen is None:
        raise UserError(
            f"{source.path} has learned positions of {len(table)} tokens, which form no square grid"
            f"{'' if form.image else f' at {wanted} time slices; give the frames it was trained with'}"
        )
    frames, side = chosen
    shape = {"frames": frames * values["tubelet"], "input_size": side * values["patch_size"]}
    return ModelConfig(**values, **shape, positions=form.positions), table


def _grids(tokens: int, *, image: bool) -> Iterable[tuple[int, int]]:
    for time in [1] if image else range(1, tokens + 1):
        side = math.isqrt(tokens // time)
        if side and time * side * side == tokens:
            yield time, side


def _kinds(form: Format, width: int, time: int) -> list[Positions]:
    others: tuple[Positions, ...] = ("sincos3d", "sinusoid", "sincos2d")
    fits = {"sincos3d": width % 16 == 0, "sincos2d": width % 4 == 0 and time == 1, "sinusoid": True}
    return [kind for kind in dict.fromkeys((form.positions, *others)) if fits[kind]]


def _is_decoder_table(positions: Tensor, model: ModelConfig, width: int) -> bool:
    rows = positions.flatten(0, -2)
    if model.class_token:
        if rows[0].any():
            return False
        rows = rows[1:]
    return _is_table(rows, model, width)


def _is_table(rows: Tensor, model: ModelConfig, width: int) -> bool:
    if rows.shape != (math.prod(model.grid), width):
        return False
    tolerance = 1e-4 if rows.dtype == torch.float32 else 5e-3
    return torch.allclose(rows.float(), position_table(model.positions, model.grid, width), rtol=0, atol=tolerance)
