"""From checkpoints to modules: everything fits, or every reason why not is named and nothing was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvd_scale.checkpoints.adapt import adapt
from mvd_scale.checkpoints.checkpoint import Checkpoint, Hints
from mvd_scale.checkpoints.interpret import interpret
from mvd_scale.checkpoints.native import save_weights
from mvd_scale.checkpoints.reading import read_source
from mvd_scale.config import DetectorConfig, HeadConfig, ModelConfig
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier, Encoder, Student
from mvd_scale.models.detector import Detector
from mvd_scale.models.positions import position_table

__all__ = [
    "build_classifier",
    "build_detector",
    "build_encoder",
    "build_student",
    "load_encoder",
    "load_exactly",
    "load_student",
    "misfits",
    "read_checkpoint",
    "save_weights",
    "start_encoder",
]


def read_checkpoint(path: Path, hints: Hints = Hints()) -> Checkpoint:  # noqa: B008 - immutable
    """Read any known format, recognised by its keys.

    Args:
        path: a file of safetensors or `torch.save`; a folder of Hugging Face, DeepSpeed or one of our runs.
        hints: what the file does not tell, and the clip that the model shall take.

    Raises:
        UserError: nothing readable, a pickle that carries code, no known format, or no way to the wanted clip.
    """
    checkpoint = interpret(read_source(path), hints)
    return adapt(checkpoint, frames=hints.frames, input_size=hints.input_size)


def build_encoder(checkpoint: Checkpoint, *, final_norm: bool) -> Encoder:
    """The encoder of any checkpoint, float32, on the CPU. Decoders and heads are left out.

    Raises:
        UserError: names every tensor that does not fit.
    """
    encoder = _empty_encoder(checkpoint, final_norm=final_norm)
    load_exactly(encoder, _encoder_tensors(checkpoint, final_norm=final_norm), checkpoint.source)
    return encoder


def build_student(checkpoint: Checkpoint) -> Student:
    """Encoder, decoders and other heads of targets, float32, on the CPU.

    Raises:
        UserError: there are none of these heads, or names every tensor that does not fit.
    """
    if checkpoint.kind != "student":
        raise UserError(f"{checkpoint.source} has no decoders: expected a pre-training checkpoint with its decoders")
    student = _empty_student(checkpoint)
    load_exactly(student, checkpoint.tensors() | dict(checkpoint.leftovers), checkpoint.source)
    return student


def build_classifier(checkpoint: Checkpoint) -> Classifier:
    """Encoder and classification head, float32, on the CPU.

    Raises:
        UserError: there is no head, or names every tensor that does not fit.
    """
    if checkpoint.classes is None or checkpoint.detector is not None:
        raise UserError(f"{checkpoint.source} has no classification head: expected a fine-tuned checkpoint")
    classifier = _empty_classifier(checkpoint, checkpoint.classes)
    load_exactly(classifier, checkpoint.tensors() | dict(checkpoint.leftovers), checkpoint.source)
    return classifier


def build_detector(checkpoint: Checkpoint) -> Detector:
    """Encoder and head on boxes of people, float32, on the CPU.

    Raises:
        UserError: there is no such head, torchvision is not installed, or names every tensor that does not fit.
    """
    if checkpoint.detector is None:
        raise UserError(
            f"{checkpoint.source} holds no detector but {checkpoint.kind} weights: expected detector.safetensors or "
            "best.safetensors of a run of `mvd-scale detect train`"
        )
    detector = _empty_detector(checkpoint, checkpoint.detector)
    load_exactly(detector, checkpoint.tensors() | dict(checkpoint.leftovers), checkpoint.source)
    return detector


def load_encoder(
    path: Path,
    *,
    final_norm: bool,
    hints: Hints = Hints(),  # noqa: B008 - immutable
    mapped: bool = False,
) -> Encoder:
    """Build the encoder that a checkpoint of any known format describes and load its weights.

    Args:
        path: as for `read_checkpoint`.
        final_norm: keep the norm after the last block; teachers go without.
        hints: as for `read_checkpoint`.
        mapped: leave the weights in the file, memory-mapped, in its dtype and unread, where its format allows it;
            then whoever reads them first, `teachers.shard_teacher`, sees whether they are finite.

    Raises:
        UserError: as `read_checkpoint`, or names every tensor that does not fit.
    """
    checkpoint = read_checkpoint(path, hints)
    if not mapped:
        return build_encoder(checkpoint, final_norm=final_norm)
    with torch.device("meta"):
        encoder = _empty_encoder(checkpoint, final_norm=final_norm)
    tensors = _encoder_tensors(checkpoint, final_norm=final_norm)
    faults = _misnamed(encoder, tensors)
    if faults:
        raise _does_not_fit(str(path), faults)
    encoder.load_state_dict(tensors, assign=True)
    if "positions" not in tensors:
        model = encoder.config
        table = position_table(model.positions, model.grid, encoder.width)
        encoder.register_buffer("positions", table, persistent=False)
    return encoder


def start_encoder(encoder: Encoder, path: Path) -> None:
    """Load the weights that an encoder starts its training from; an image model is inflated to clips.

    The encoder keeps its own positions and, where the checkpoint has none, its final norm. One without a class token or
    a final norm leaves these out.

    Raises:
        UserError: as `read_checkpoint`, names every tensor that does not fit, or the weights were trained with other
            heads or positions, of which shapes tell nothing.
    """
    checkpoint, model = read_checkpoint(path), encoder.config
    tubelet = model.tubelet if checkpoint.model.frames == 1 and model.frames > 1 else None
    _check_arithmetic(checkpoint, model, inflated=tubelet is not None)
    checkpoint = adapt(checkpoint, frames=model.frames, input_size=model.input_size, tubelet=tubelet)
    tensors = _encoder_tensors(checkpoint, final_norm=encoder.norm is not None)
    tensors.pop("positions", None)
    if encoder.class_token is None:
        tensors.pop("class_token", None)
    if encoder.norm is not None and not checkpoint.final_norm:
        tensors |= {f"norm.{name}": tensor for name, tensor in encoder.norm.state_dict().items()}
    load_exactly(encoder, tensors, str(path))


def _check_arithmetic(checkpoint: Checkpoint, model: ModelConfig, *, inflated: bool) -> None:
    given: dict[str, Any] = {"heads": checkpoint.model.heads, "positions": checkpoint.model.positions}
    if "positions" in checkpoint.encoder:
        given["positions"] = "learned"
    if inflated:
        # Positions of an image say nothing of time.
        del given["positions"]
    clash = [f"{key} {value}, the recipe has model.{key} {getattr(model, key)}" for key, value in given.items()
             if value != getattr(model, key)]  # fmt: skip
    if clash:
        raise UserError(f"{checkpoint.source} was trained with {'; with '.join(clash)}: give the recipe the same")


def load_student(student: Student, path: Path) -> None:
    """Load encoder and decoders of a checkpoint of any known format into a student.

    Raises:
        UserError: as `read_checkpoint`, or names every tensor that does not fit the student.
    """
    checkpoint = read_checkpoint(path)
    load_exactly(student, checkpoint.tensors() | dict(checkpoint.leftovers), str(path))


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a module after checking all names, shapes and values.

    Raises:
        UserError: names every missing, surplus, misshapen and non-finite tensor; nothing was copied.
    """
    faults = _faults(module, tensors)
    if faults:
        raise _does_not_fit(source, faults)
    module.load_state_dict(dict(tensors))


def misfits(checkpoint: Checkpoint) -> list[str]:
    """Every tensor that is missing, surplus, misshapen or not finite, judged by the model it says to be."""
    with torch.device("meta"):
        module: nn.Module
        if checkpoint.kind == "student":
            module = _empty_student(checkpoint)
        elif checkpoint.detector is not None:
            module = _empty_detector(checkpoint, checkpoint.detector)
        elif checkpoint.classes is not None:
            module = _empty_classifier(checkpoint, checkpoint.classes)
        else:
            # A head without its weight tells no classes: all of it counts as surplus.
            checkpoint = replace(checkpoint, head={}, leftovers={**checkpoint.leftovers, **checkpoint.head})
            module = _empty_encoder(checkpoint, final_norm=checkpoint.final_norm)
    return _faults(module, checkpoint.tensors() | dict(checkpoint.leftovers))


def _empty_encoder(checkpoint: Checkpoint, *, final_norm: bool) -> Encoder:
    encoder = Encoder(checkpoint.model, final_norm=final_norm)
    _make_room_for_positions(encoder, checkpoint)
    return encoder


def _empty_student(checkpoint: Checkpoint) -> Student:
    heads: dict[str, tuple[HeadConfig, int]] = {}
    for name, decoder in checkpoint.decoders.items():
        heads[name] = (decoder.config, decoder.channels)
    for name, head in checkpoint.token_heads.items():
        heads[name] = (head.config, head.channels)
    student = Student(checkpoint.model, heads)
    _make_room_for_positions(student.encoder, checkpoint)
    return student


def _empty_classifier(checkpoint: Checkpoint, classes: int) -> Classifier:
    classifier = Classifier(checkpoint.model, classes)
    _make_room_for_positions(classifier.encoder, checkpoint)
    return classifier


def _empty_detector(checkpoint: Checkpoint, config: DetectorConfig) -> Detector:
    detector = Detector(checkpoint.model, config)
    _make_room_for_positions(detector.encoder, checkpoint)
    return detector


def _make_room_for_positions(encoder: Encoder, checkpoint: Checkpoint) -> None:
    if "positions" in checkpoint.encoder:
        encoder.store_positions(torch.zeros_like(encoder.positions))


def _encoder_tensors(checkpoint: Checkpoint, *, final_norm: bool) -> dict[str, Tensor]:
    tensors = {name: t for name, t in checkpoint.encoder.items() if final_norm or not name.startswith("norm.")}
    return tensors | dict(checkpoint.leftovers)


def _faults(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    broken = [
        f"{name} holds values that are not finite"
        for name in module.state_dict().keys() & tensors.keys()
        if not torch.isfinite(tensors[name]).all()
    ]
    return sorted(_misnamed(module, tensors) + broken)


def _misnamed(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors that are missing, surplus or misshapen; reads none of them."""
    expected = module.state_dict()
    faults = [f"missing {name}" for name in expected.keys() - tensors.keys()]
    faults += [f"surplus {name}" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        if expected[name].shape != tensors[name].shape:
            faults.append(f"{name} is {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}")
    return sorted(faults)


def _does_not_fit(source: str, faults: list[str]) -> UserError:
    return UserError(f"{source} does not fit the model:\n  " + "\n  ".join(faults))
