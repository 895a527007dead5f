"""Export to published formats: their names, attention biases, position tables, `config.json` and model cards."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mvd_scale.checkpoints.checkpoint import Checkpoint
from mvd_scale.checkpoints.formats import FAMILIES
from mvd_scale.checkpoints.formats.format import Format
from mvd_scale.checkpoints.formats.names import to_published_name, unpack_attention
from mvd_scale.checkpoints.model_card import UNKNOWN_LICENCE, write_model_card
from mvd_scale.checkpoints.native import describe_weights, write_tensors
from mvd_scale.checkpoints.programs import PROGRAMS, export_program
from mvd_scale.checkpoints.weights import find_mismatches
from mvd_scale.errors import UserError
from mvd_scale.models.positions import position_table

_PICKLES = (".pth", ".pt", ".bin")

HUB = "hub"
"""Family of folders that `mvd_scale.from_pretrained` loads: any model of this project, tensors only."""


def export_checkpoint(checkpoint: Checkpoint, family: str, out: Path, *, licence: str = UNKNOWN_LICENCE) -> None:
    """Write a checkpoint in a published format, or a classifier as a program.

    Args:
        checkpoint: a model read from any format.
        family: `videomae`, `mvd`, `mae`, `timm`, `hf` or `hub`; `torch` or `onnx` for a program (see `export_program`).
        out: a file `.safetensors`, or `.pth`, `.pt`, `.bin` for `{"model": ...}` by `torch.save`; for `hf` and `hub` a
            folder, which gets a model card too.
        licence: licence of the weights for the card, by its identifier on Hugging Face's hub.

    Raises:
        UserError: the format cannot represent this model, tensors are missing or not finite, or `out` has a wrong
            suffix.
    """
    if family in PROGRAMS:
        export_program(checkpoint, family, out)
        return
    faults = find_mismatches(checkpoint)
    if faults:
        raise UserError(f"{checkpoint.source} is incomplete and was not exported:\n  " + "\n  ".join(faults))
    if family == HUB:
        _write_hub_folder(checkpoint, licence, out)
        return
    form, tensors = _published(checkpoint, family)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if form.config is not None:
        _make_folder(out)
        _save(tensors, out / "model.safetensors")
        _write_json(form.config(checkpoint), out / "config.json")
        if form.processor is not None:
            _write_json(form.processor(checkpoint), out / "preprocessor_config.json")
        write_model_card(checkpoint, "transformers", licence, out / "README.md")
    elif out.suffix in (*_PICKLES, ".safetensors"):
        _save(tensors, out)
    else:
        raise UserError(f"--out {out}: expected a file name that ends in .safetensors, {', '.join(_PICKLES)}")


def _write_hub_folder(checkpoint: Checkpoint, licence: str, out: Path) -> None:
    _make_folder(out)
    decoders = {name: decoder.config for name, decoder in checkpoint.decoders.items()}
    told = describe_weights(
        checkpoint.model,
        decoders,
        classes=checkpoint.class_names,
        views=checkpoint.views,
        detector=checkpoint.detector,
    )
    write_tensors(out / "model.safetensors", checkpoint.tensors(), told)
    # The hub counts downloads by this file. The weights state their shape themselves.
    _write_json(
        {"library_name": "mvd-scale", "kind": checkpoint.kind, **checkpoint.model.model_dump()}, out / "config.json"
    )
    write_model_card(checkpoint, "mvd-scale", licence, out / "README.md")


def _make_folder(out: Path) -> None:
    if out.suffix:
        raise UserError(f"--out {out}: Hugging Face's tools read a folder; give one without a suffix")
    out.mkdir(parents=True, exist_ok=True)


def _write_json(document: Mapping[str, Any], out: Path) -> None:
    out.write_text(json.dumps(document, indent=2) + "\n")


def to_published(checkpoint: Checkpoint, family: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under the names and in the shapes of a published format.

    Args:
        checkpoint: a model read from any format.
        family: `videomae`, `mvd`, `mae`, `timm` or `hf`.

    Raises:
        UserError: the format cannot represent this model.
    """
    return _published(checkpoint, family)[1]


def _published(checkpoint: Checkpoint, family: str) -> tuple[Format, dict[str, Tensor]]:
    form, checkpoint = _choose(checkpoint, family)
    model = checkpoint.model
    tensors = {name: tensor for name, tensor in _flat(checkpoint).items() if name != "encoder.positions"}
    patches = tensors["encoder.patch_embed.weight"]
    frames = () if form.image else (model.tubelet,)
    kernels = patches.unflatten(1, (*frames, model.patch_size, model.patch_size, 3))
    tensors["encoder.patch_embed.weight"] = kernels.movedim(-1, 1)
    tensors = unpack_attention(tensors, form.attention, key_bias=form.key_bias)
    if form.stores_positions:
        tensors |= _position_tables(checkpoint)
    published, homeless = {}, []
    for name, tensor in tensors.items():
        theirs = to_published_name(name, form.modules, form.leaves)
        if theirs is None:
            homeless.append(name)
        else:
            published[theirs] = tensor
    if homeless:
        raise UserError(
            f"{checkpoint.source} cannot be written as {form.name}, which has no tensors for {', '.join(homeless)}; "
            "export the run's encoder.safetensors to leave the decoders out"
        )
    return form, published


def _choose(checkpoint: Checkpoint, family: str) -> tuple[Format, Checkpoint]:
    """Choose the format of a family that can represent the checkpoint, and drop the parts that it never contains."""
    model = checkpoint.model
    image = model.frames == 1 and model.tubelet == 1
    if family == "timm":
        # timm's models end at the encoder.
        checkpoint = replace(checkpoint, decoders={}, head={})
    forms = [form for form in FAMILIES[family] if form.image == image]
    if not forms:
        holds, has = ("clips", "images") if image else ("images", "clips")
        raise UserError(f"{checkpoint.source} is a model of {has}, but --to {family} writes models of {holds}")
    form = next((form for form in forms if checkpoint.kind in form.kinds), None)
    if form is None:
        raise UserError(
            f"{checkpoint.source} is a {checkpoint.kind}, which --to {family} has no format for: --to hub has"
        )
    if form.image != model.class_token:
        raise UserError(
            f"{checkpoint.source} has {'a' if model.class_token else 'no'} class token; "
            f"models of {form.name} have {'one' if form.image else 'none'}"
        )
    learned = "positions" in checkpoint.encoder
    if (learned or model.positions != form.positions) and not (form.stores_positions and form.image):
        has = "learned positions" if learned else f"the position table {model.positions}"
        raise UserError(
            f"{checkpoint.source} was trained with {has}, but the code of {form.name} adds {form.positions}: "
            "the exported weights would compute other features there than here. Export them by --to hub, for "
            "mvd_scale.from_pretrained"
        )
    return form, _name_pixels(checkpoint, form)


def _name_pixels(checkpoint: Checkpoint, form: Format) -> Checkpoint:
    """Rename a single decoder to `pixels`, the name that formats of pixel prediction expect, whatever its target is."""
    pixels = any(ours.startswith("decoders.pixels.") for _, ours in form.modules)
    if not pixels or len(checkpoint.decoders) != 1:
        return checkpoint
    model, (decoder,) = checkpoint.model, checkpoint.decoders.values()
    channels = 3 * model.tubelet * model.patch_size**2
    if decoder.channels != channels:
        raise UserError(
            f"the decoder of {checkpoint.source} predicts {decoder.channels} channels; "
            f"{form.name} predicts the {channels} values of a tube's pixels"
        )
    return replace(checkpoint, decoders={"pixels": decoder})


def _flat(checkpoint: Checkpoint) -> dict[str, Tensor]:
    if checkpoint.kind == "encoder":
        return {f"encoder.{name}": tensor for name, tensor in checkpoint.encoder.items()}
    return checkpoint.tensors()


def _position_tables(checkpoint: Checkpoint) -> dict[str, Tensor]:
    model = checkpoint.model
    assert model.width is not None
    widths = {f"decoders.{name}": decoder.config.width for name, decoder in checkpoint.decoders.items()}
    tables = {}
    for place, width in {"encoder": model.width, **widths}.items():
        table = position_table(model.positions, model.grid, width)
        if place == "encoder":
            table = checkpoint.encoder.get("positions", table)
        if model.class_token:
            table = torch.cat([table.new_zeros(1, width), table])
        tables[f"{place}.positions"] = table.unsqueeze(0)
    return tables


def _save(tensors: dict[str, Tensor], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    if out.suffix in _PICKLES:
        # Clone, because torch.save writes the whole storage that a view belongs to.
        torch.save({"model": {name: tensor.clone() for name, tensor in tensors.items()}}, partial)
    else:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, partial, {"format": "pt"})
        partial.chmod(0o644)
    os.replace(partial, out)
