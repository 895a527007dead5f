"""FLOPs of a clip by part of the model, equal to the counts of `torch.utils.flop_counter` on the modules."""

from __future__ import annotations

from dataclasses import dataclass

from mvd_scale.config.training import Checkpointing
from mvd_scale.performance.planning.layers import Backward, LinearCost
from mvd_scale.performance.planning.workload import ModelPart, Workload


@dataclass(frozen=True)
class PartFlops:
    """FLOPs of one clip in one part of the model."""

    part: str
    width: int
    forward: float
    backward: float

    recomputed: float
    """FLOPs that gradient checkpointing adds to the backward pass."""

    @property
    def total(self) -> float:
        """Sum of forward, backward and recomputed FLOPs."""
        return self.forward + self.backward + self.recomputed


def part_flops(workload: Workload, *, checkpointing: Checkpointing, attention: Backward = "fused") -> list[PartFlops]:
    """Compute the FLOPs of one clip by part: patch embedding, encoder, each decoder or head, each teacher.

    Args:
        workload: layers of the step.
        checkpointing: part of the blocks that is recomputed in the backward pass.
        attention: `fused` if attention's backward pass recomputes the scores, as fused kernels do.
    """
    embedding, *rest = _with_embedding_apart(workload.trained)
    return [_trained(part, checkpointing, attention) for part in (embedding, *rest)] + [
        PartFlops(part.name, part.width, part.forward, 0, 0) for part in workload.teachers
    ]


def _with_embedding_apart(trained: tuple[ModelPart, ...]) -> list[ModelPart]:
    encoder, *heads = trained
    first, *blocks = encoder.layers
    assert isinstance(first, LinearCost)
    embedding = ModelPart("patch embedding", encoder.width, (first,))
    return [embedding, ModelPart(encoder.name, encoder.width, tuple(blocks)), *heads]


def _trained(part: ModelPart, checkpointing: Checkpointing, attention: Backward) -> PartFlops:
    backward = sum(layer.backward(attention) for layer in part.layers)
    recomputed = sum(block.recomputed(checkpointing) for block in part.blocks)
    return PartFlops(part.name, part.width, part.forward, backward, recomputed)
