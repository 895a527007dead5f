"""A classifier as a program that runs without this package: an exported program of torch, or ONNX.

Legend: B clips, T frames, S side of a crop, C classes.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvd_scale.checkpoints.checkpoint import Checkpoint
from mvd_scale.checkpoints.native import describe_model
from mvd_scale.checkpoints.weights import build_classifier
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier

_NORMALISATION_KEY = "mvd_scale.normalisation"
_SHAPES = {"clips": {0: torch.export.Dim("batch", min=1)}}


class Program(nn.Module):
    """What is exported, in plain operators of torch. The score of a video is the mean over its clips."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, clips: Tensor) -> Tensor:
        """Normalisation, classifier and softmax: uint8 (B, T, S, S, 3) to float32 (B, C), any B."""
        scores: Tensor = self.classifier(clips).softmax(1)
        return scores


def export_program(checkpoint: Checkpoint, kind: str, out: Path) -> None:
    """Write a classifier as a program, float32; the file appears whole or not at all.

    The file also tells, as JSON by the keys `mvd_scale.model`, `.classes`, `.views` and `.normalisation`, what it
    knows of itself: in `metadata_props` of ONNX, in `extra_files` of torch.

    Args:
        checkpoint: of a classifier, in any format.
        kind: of `PROGRAMS`.
        out: `.pt2` for `torch`, which `torch.export.load` reads; `.onnx` for `onnx`, with a file of weights beside it
            where they are larger than ONNX's 2 GB.

    Raises:
        UserError: it is no classifier or not whole, `out` does not fit, or a package is missing.
    """
    suffix, write = PROGRAMS[kind]
    if out.suffix != suffix:
        raise UserError(f"--out {out}: expected a file name that ends in {suffix}")
    classifier = build_classifier(checkpoint)
    encoder = classifier.encoder
    told = describe_model(checkpoint.model, checkpoint.class_names, checkpoint.views)
    told[_NORMALISATION_KEY] = json.dumps({"mean": encoder.mean, "std": encoder.std})
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as partial:
        write(Program(classifier).eval().requires_grad_(False), _example(checkpoint), told, Path(partial) / out.name)
        # Weights beside an ONNX file come first: it is of no use without them.
        for file in sorted(Path(partial).iterdir(), key=lambda file: file.name == out.name):
            os.replace(file, out.with_name(file.name))


def _example(checkpoint: Checkpoint) -> Tensor:
    """Two clips: a batch of one would be taken for a constant."""
    model = checkpoint.model
    return torch.zeros(2, model.frames, model.input_size, model.input_size, 3, dtype=torch.uint8)


def _write_torch(program: Program, example: Tensor, told: Mapping[str, str], file: Path) -> None:
    exported = torch.export.export(program, (example,), dynamic_shapes=_SHAPES)
    torch.export.save(exported, file, extra_files=dict(told))


def _write_onnx(program: Program, example: Tensor, told: Mapping[str, str], file: Path) -> None:
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"--to onnx needs {package} ({error}): pip install 'mvd-scale[onnx]'") from error
    exported: Any = torch.onnx.export(
        program,
        (example,),
        dynamo=True,
        dynamic_shapes=_SHAPES,
        input_names=["clips"],
        output_names=["scores"],
        verbose=False,
    )
    exported.model.metadata_props.update(told)
    exported.save(file)


PROGRAMS: dict[str, tuple[str, Callable[[Program, Tensor, Mapping[str, str], Path], None]]] = {
    "torch": (".pt2", _write_torch),
    "onnx": (".onnx", _write_onnx),
}
"""What can be written: its suffix, and how."""
