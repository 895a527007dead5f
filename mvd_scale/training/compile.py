"""Compilation of transformer blocks by torch.compile, and acceleration of frozen teachers by it and by CUDA graphs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch._dynamo
from torch import nn

from mvd_scale.training.teachers.cuda_graph import CudaGraphTeacher

if TYPE_CHECKING:
    from mvd_scale.training.placement import TeacherPlacement

_PROGRAMS = 64
"""Largest number of compiled programs of all blocks together; each combination of input shape, gradients on or off, and
all or selected output tokens needs one. torch runs blocks uncompiled beyond the limit, without a warning."""


def transformer_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of each block of a transformer of this project or of timm."""
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("blocks"):
            yield name, module


def compile_blocks(model: nn.Module) -> None:
    """Compile each block separately at its first call; blocks of equal structure share one program.

    Parameters keep their names. Shapes are static: another batch size needs another program.
    """
    # A config of torch 2.12 and newer is one of each thread, and checkpoints recompute blocks in autograd's threads.
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        limit = {"recompile_limit": _PROGRAMS}
    else:
        limit = {}
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _PROGRAMS)
    for _, block in transformer_blocks(model):
        block.compile(dynamic=False, **limit)


def speed_up_teacher(teacher: nn.Module, placed: TeacherPlacement) -> nn.Module:
    """Compile the blocks of a frozen teacher and capture its forward pass as a CUDA graph, if its placement says so.

    Args:
        teacher: teacher on its device, in its precision and shards.
        placed: placement of the teacher.

    Returns:
        model to call instead of `teacher`; the same object without a CUDA graph.
    """
    if placed.compile.value:
        compile_blocks(teacher)
    return CudaGraphTeacher(teacher) if placed.cuda_graph.value else teacher
