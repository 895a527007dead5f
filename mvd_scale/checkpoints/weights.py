"""Loading of checkpoints into modules: either all tensors fit, or an error lists every misfit and nothing is loaded."""

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
from mvd_scale.checkpoints.reading import read_raw_checkpoint
from mvd_scale.config import DetectorConfig, HeadConfig, ModelConfig
from mvd_scale.config.model import Positions
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier, Encoder, Student
from mvd_scale.models.detector import Detector
from mvd_scale.models.positions import encoder_positions

__all__ = [
    "build_classifier",
    "build_detector",
    "build_encoder",
    "build_student",
    "find_mismatches",
    "load_encoder",
    "load_initial_encoder",
    "load_strict",
    "load_student",
    "read_checkpoint",
    "save_weights",
]


def read_checkpoint(path: Path, hints: Hints = Hints()) -> Checkpoint:  # noqa: B008 - immutable
    """Read a checkpoint of any known format, recognised by its keys.

    Args:
        path: a file of safetensors or `torch.save`; a folder of Hugging Face, of DeepSpeed or of one of our runs.
        hints: facts that the file does not state, and the shape of the clips that the model is adapted to.

    Raises:
        UserError: the file is unreadable, contains code or has no known format, or the model cannot be adapted to the
            wanted clips.
    """
    checkpoint = interpret(read_raw_checkpoint(path, hints.key), hints)
    return adapt(checkpoint, frames=hints.frames, input_size=hints.input_size)


def build_encoder(checkpoint: Checkpoint, *, final_norm: bool) -> Encoder:
    """Build the encoder of any checkpoint, float32, on the CPU; decoders and heads are not loaded.

    Raises:
        UserError: tensors do not fit; the message names each of them.
    """
    encoder = _empty_encoder(checkpoint, final_norm=final_norm)
    load_strict(encoder, _encoder_tensors(checkpoint, final_norm=final_norm), checkpoint.source)
    return encoder


def build_student(checkpoint: Checkpoint) -> Student:
    """Build a student with encoder, decoders and token heads, float32, on the CPU.

    Raises:
        UserError: the checkpoint has no decoders, or tensors do not fit; the message names each of them.
    """
    if checkpoint.kind != "student":
        raise UserError(f"{checkpoint.source} has no decoders: expected a pre-training checkpoint with its decoders")
    student = _empty_student(checkpoint)
    load_strict(student, checkpoint.tensors() | dict(checkpoint.unexpected), checkpoint.source)
    return student


def build_classifier(checkpoint: Checkpoint) -> Classifier:
    """Build a classifier with encoder and classification head, float32, on the CPU.

    Raises:
        UserError: the checkpoint has no classification head, or tensors do not fit; the message names each of them.
    """
    if checkpoint.classes is None or checkpoint.detector is not None:
        raise UserError(f"{checkpoint.source} has no classification head: expected a fine-tuned checkpoint")
    classifier = _empty_classifier(checkpoint, checkpoint.classes)
    load_strict(classifier, checkpoint.tensors() | dict(checkpoint.unexpected), checkpoint.source)
    return classifier


def build_detector(checkpoint: Checkpoint) -> Detector:
    """Build a detector with encoder and head on boxes of people, float32, on the CPU.

    Raises:
        UserError: the checkpoint has no detection head, torchvision is not installed, or tensors do not fit; the
            message names each of them.
    """
    if checkpoint.detector is None:
        raise UserError(
            f"{checkpoint.source} holds {checkpoint.kind} weights, not a detector: expected detector.safetensors or "
            "best.safetensors of a run of `mvd-scale detect train`"
        )
    detector = _empty_detector(checkpoint, checkpoint.detector)
    load_strict(detector, checkpoint.tensors() | dict(checkpoint.unexpected), checkpoint.source)
    return detector


def load_encoder(
    path: Path,
    *,
    final_norm: bool,
    hints: Hints = Hints(),  # noqa: B008 - immutable
    mapped: bool = False,
) -> Encoder:
    """Build an encoder from a checkpoint of any known format and load its weights.

    Args:
        path: file or folder, see `read_checkpoint`.
        final_norm: keep the norm after the last block; teachers have none.
        hints: facts that the file does not state, see `read_checkpoint`.
        mapped: leave the weights memory-mapped in the file, in its dtype, if its format allows it. They are not read
            here, so whether they are finite is checked later by `teachers.shard_teacher`, which reads them first.

    Raises:
        UserError: see `read_checkpoint`; or tensors do not fit, and the message names each of them.
    """
    checkpoint = read_checkpoint(path, hints)
    return (
        map_encoder(checkpoint, final_norm=final_norm) if mapped else build_encoder(checkpoint, final_norm=final_norm)
    )


def map_encoder(checkpoint: Checkpoint, *, final_norm: bool) -> Encoder:
    """Build the encoder of any checkpoint with its tensors as they are, memory-mapped if the file's format allows it.

    Raises:
        UserError: tensors do not fit; the message names each of them.
    """
    with torch.device("meta"):
        encoder = _empty_encoder(checkpoint, final_norm=final_norm)
    tensors = _encoder_tensors(checkpoint, final_norm=final_norm)
    faults = _misnamed(encoder, tensors)
    if faults:
        raise _does_not_fit(checkpoint.source, faults)
    encoder.load_state_dict(tensors, assign=True)
    if "positions" not in tensors:
        encoder.register_buffer("positions", encoder_positions(encoder.config), persistent=False)
    return encoder


def load_initial_encoder(encoder: Encoder, path: Path, positions: Positions | None = None) -> None:
    """Load the weights from which the training of an encoder starts; an image model is inflated to clips.

    The encoder keeps its own positions and, if the checkpoint has no final norm, its own final norm. A class token or
    final norm of the checkpoint is ignored if the encoder has none.

    Args:
        encoder: encoder to fill.
        path: file or folder, see `read_checkpoint`.
        positions: position table of the checkpoint's training, for a file that does not tell.

    Raises:
        UserError: see `read_checkpoint`; tensors do not fit, and the message names each of them; or the weights were
            trained with another number of heads or other positions, which the shapes of tensors do not show.
    """
    checkpoint, model = read_checkpoint(path, Hints(positions=positions)), encoder.config
    tubelet = model.tubelet if checkpoint.model.frames == 1 and model.frames > 1 else None
    _check_arithmetic(checkpoint, model, inflated=tubelet is not None)
    checkpoint = adapt(checkpoint, frames=model.frames, input_size=model.input_size, tubelet=tubelet)
    tensors = _encoder_tensors(checkpoint, final_norm=encoder.norm is not None)
    tensors.pop("positions", None)
    if encoder.class_token is None:
        tensors.pop("class_token", None)
    if encoder.norm is not None and not checkpoint.final_norm:
        tensors |= {f"norm.{name}": tensor for name, tensor in encoder.norm.state_dict().items()}
    load_strict(encoder, tensors, str(path))


def _check_arithmetic(checkpoint: Checkpoint, model: ModelConfig, *, inflated: bool) -> None:
    given: dict[str, Any] = {"heads": checkpoint.model.heads, "positions": checkpoint.model.positions}
    if "positions" in checkpoint.encoder:
        given["positions"] = "learned"
    if inflated:
        # An image model's positions have no time axis: any table of the recipe's is acceptable.
        del given["positions"]
    clash = [f"{key} {value}, the recipe has model.{key} {getattr(model, key)}" for key, value in given.items()
             if value != getattr(model, key)]  # fmt: skip
    if clash:
        raise UserError(f"{checkpoint.source} was trained with {'; with '.join(clash)}: give the recipe the same")


def load_student(student: Student, path: Path) -> None:
    """Load encoder and decoders of a checkpoint of any known format into a student.

    Raises:
        UserError: see `read_checkpoint`; or tensors do not fit the student, and the message names each of them.
    """
    checkpoint = read_checkpoint(path)
    load_strict(student, checkpoint.tensors() | dict(checkpoint.unexpected), str(path))


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a module after checking all names, shapes and values.

    Raises:
        UserError: a tensor is missing, surplus, misshapen or not finite; the message names each of them, and nothing
            was copied.
    """
    faults = _faults(module, tensors)
    if faults:
        raise _does_not_fit(source, faults)
    module.load_state_dict(dict(tensors))


def find_mismatches(checkpoint: Checkpoint) -> list[str]:
    """List every tensor that is missing, surplus, misshapen or not finite for a model of the checkpoint's kind."""
    with torch.device("meta"):
        module: nn.Module
        if checkpoint.kind == "student":
            module = _empty_student(checkpoint)
        elif checkpoint.detector is not None:
            module = _empty_detector(checkpoint, checkpoint.detector)
        elif checkpoint.classes is not None:
            module = _empty_classifier(checkpoint, checkpoint.classes)
        else:
            # Without the head's weight the number of classes is unknown: all its tensors count as surplus.
            checkpoint = replace(checkpoint, head={}, unexpected={**checkpoint.unexpected, **checkpoint.head})
            module = _empty_encoder(checkpoint, final_norm=checkpoint.final_norm)
    return _faults(module, checkpoint.tensors() | dict(checkpoint.unexpected))


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
    return tensors | dict(checkpoint.unexpected)


def _faults(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    broken = [
        f"{name} holds values that are not finite"
        for name in module.state_dict().keys() & tensors.keys()
        if not torch.isfinite(tensors[name]).all()
    ]
    return sorted(_misnamed(module, tensors) + broken)


def _misnamed(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """List the tensors that are missing, surplus or misshapen; compares shapes only and reads no values."""
    expected = module.state_dict()
    faults = [f"missing {name}" for name in expected.keys() - tensors.keys()]
    faults += [f"surplus {name}" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        if expected[name].shape != tensors[name].shape:
            faults.append(f"{name} is {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}")
    return sorted(faults)


def _does_not_fit(source: str, faults: list[str]) -> UserError:
    return UserError(f"{source} does not fit the model:\n  " + "\n  ".join(faults))
