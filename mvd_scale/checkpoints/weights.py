"""Finished weights as safetensors, with the model's shape in the file's metadata. Tensors only, never pickles."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mvd_scale.config import ModelConfig
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder, Student

_MODEL_KEY = "mvd_scale.model"


def save_weights(path: Path, tensors: Mapping[str, Tensor], model: ModelConfig) -> None:
    """Write tensors and the encoder's shape; the file appears whole or not at all."""
    partial = path.with_suffix(".partial")
    metadata = {_MODEL_KEY: json.dumps(model.model_dump(mode="json")), "format": "pt"}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    partial.chmod(0o644)
    os.replace(partial, path)


def load_encoder(path: Path, *, final_norm: bool) -> Encoder:
    """Build the encoder that a file describes and load its weights, float32, on the CPU.

    Args:
        path: an `encoder.safetensors` of a finished run.
        final_norm: keep the norm after the last block; teachers go without.

    Raises:
        UserError: no such file, no safetensors, no shape in it, or weights that do not fit the shape.
    """
    config, tensors = _read(path, "encoder.safetensors")
    encoder = Encoder(config, final_norm=final_norm)
    if not final_norm:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("norm.")}
    load_exactly(encoder, tensors, str(path))
    return encoder


def load_student(student: Student, path: Path) -> None:
    """Load a `student.safetensors`: encoder and decoders.

    Raises:
        UserError: no such file, no safetensors, or weights that do not fit the student.
    """
    _, tensors = _read(path, "student.safetensors")
    load_exactly(student, tensors, str(path))


def _read(path: Path, expected: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: expected the {expected} of a finished run")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if _MODEL_KEY not in metadata:
                raise UserError(f"{path} does not say which model it holds: expected a file that `mvd-scale` wrote")
            config = ModelConfig.model_validate_json(metadata[_MODEL_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a handle, not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); expected {expected}") from error
    except ValidationError as error:
        raise UserError(f"{path} describes a model that does not exist here: {error}") from error
    return config, tensors


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a module after checking all names, shapes and values.

    Raises:
        UserError: names every missing, surplus, misshapen and non-finite tensor; nothing was copied.
    """
    expected = module.state_dict()
    faults = [f"missing {name}" for name in expected.keys() - tensors.keys()]
    faults += [f"surplus {name}" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        if expected[name].shape != tensors[name].shape:
            faults.append(f"{name} is {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}")
        elif not torch.isfinite(tensors[name]).all():
            faults.append(f"{name} holds values that are not finite")
    if faults:
        raise UserError(f"{source} does not fit the model:\n  " + "\n  ".join(sorted(faults)))
    module.load_state_dict(dict(tensors))
