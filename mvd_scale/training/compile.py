"""Transformer blocks as programs of torch.compile, and frozen teachers made fast by them and by CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from mvd_scale.training.placement import TeacherPlacement
from mvd_scale.training.teachers.cuda_graph import CudaGraphTeacher

_PROGRAMS = 64
"""Most programs of all blocks together: of every shape, with gradients or without, for all tokens or those kept. All
count against one limit, beyond which torch would go on uncompiled in silence."""


def transformer_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a transformer, ours or of timm, by name."""
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("blocks"):
            yield name, module


def compile_blocks(model: nn.Module) -> None:
    """Compile each block by itself when it is first called; those that are alike share one program.

    Parameters keep their names. Shapes are static: a batch of another size makes another program.
    """
    for _, block in transformer_blocks(model):
        block.compile(dynamic=False, recompile_limit=_PROGRAMS)


def speed_up_teacher(teacher: nn.Module, placed: TeacherPlacement) -> nn.Module:
    """Compile the blocks of a frozen teacher and record it as a CUDA graph, as its placement says.

    Args:
        teacher: on its device, in its precision and shards.
        placed: its decisions.

    Returns:
        the model that is called in its place.
    """
    if placed.compile.value:
        compile_blocks(teacher)
    return CudaGraphTeacher(teacher) if placed.cuda_graph.value else teacher
