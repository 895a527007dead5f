"""Reading and writing of checkpoints: any known format to `Checkpoint`, and `Checkpoint` to published formats."""

from mvd_scale.checkpoints.adapt import adapt
from mvd_scale.checkpoints.checkpoint import Checkpoint, DecoderWeights, Hints
from mvd_scale.checkpoints.publish import export_checkpoint, to_published
from mvd_scale.checkpoints.roles import describe_checkpoint, import_checkpoint
from mvd_scale.checkpoints.weights import (
    build_classifier,
    build_encoder,
    build_student,
    load_encoder,
    read_checkpoint,
)

__all__ = [
    "Checkpoint",
    "DecoderWeights",
    "Hints",
    "adapt",
    "build_classifier",
    "build_encoder",
    "build_student",
    "describe_checkpoint",
    "export_checkpoint",
    "import_checkpoint",
    "load_encoder",
    "read_checkpoint",
    "to_published",
]
