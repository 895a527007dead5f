"""Export of a classifier as a program that runs without this package: `torch.export` or ONNX.

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
    """The exported module, in plain torch operators. A video's score is the mean of the scores of its clips."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, clips: Tensor) -> Tensor:
        """Apply normalisation, classifier and softmax: uint8 (B, T, S, S, 3) to float32 (B, C), any B."""
        scores: Tensor = self.classifier(clips).softmax(1)
        return scores


def export_program(checkpoint: Checkpoint, kind: str, out: Path) -> None:
    """Write a classifier as a program in float32; the file is renamed into place, so it is never partial.

    The file also contains metadata as JSON under the keys `mvd_scale.model`, `.classes`, `.views` and
    `.normalisation`: in `metadata_props` of ONNX, in `extra_files` of torch.

    Args:
        checkpoint: a classifier, read from any format.
        kind: a key of `PROGRAMS`.
        out: file to write: `.pt2` for `torch`, to be read by `torch.export.load`; `.onnx` for `onnx`, with a second
            file of weights beside it if they exceed ONNX's limit of 2 GB.

    Raises:
        UserError: the checkpoint is no classifier or incomplete, `out` has another suffix, or a package is missing.
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
        # The .onnx file is renamed last: while it exists, the weights it refers to exist.
        for file in sorted(Path(partial).iterdir(), key=lambda file: file.name == out.name):
            os.replace(file, out.with_name(file.name))


def _example(checkpoint: Checkpoint) -> Tensor:
    """Return a batch of two clips: `torch.export` would specialise a batch dimension of size 1 to a constant."""
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
"""File suffix and writer of every kind of program."""
