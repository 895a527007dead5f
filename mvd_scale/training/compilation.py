"""Blocks as programs of torch.compile, whole frozen teachers as CUDA graphs, and who is left as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from mvd_scale.capabilities import torch_compile
from mvd_scale.config import TeacherConfig
from mvd_scale.config.training import FrozenPrecision
from mvd_scale.errors import UserError
from mvd_scale.models import Student

logger = logging.getLogger("mvd_scale")

GATHERED = "ZeRO-3 gathers parameters inside of every block, which torch.compile cannot follow"
LAYERWISE = "ZeRO-3 gathers the weights of one layer at a time"

_PROGRAMS = 64
"""Most programs of all blocks together: of every shape, with gradients or without, for all tokens or those kept. All
count against one limit, beyond which torch would go on uncompiled in silence."""

_WARM_UP = 3
"""Forward passes before a graph is recorded, in which blocks are compiled and libraries choose their kernels."""


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


def compiles(key: str, asked: bool | Literal["auto"], device: torch.device, obstacle: str = "") -> bool:
    """Whether blocks are to be compiled; if not although it would pay, the reason is logged.

    Args:
        key: of the recipe.
        asked: its value; `auto` is for GPUs only, as compiled blocks are hardly faster on CPUs.
        device: where they run.
        obstacle: why these blocks cannot be compiled anywhere.

    Raises:
        UserError: it is asked for by name and cannot be.
    """
    return _pays(asked, device) and _decide(key, asked, obstacle or torch_compile(device.type).reason)


def batches_decoders(student: Student, asked: bool | Literal["auto"], device: torch.device, obstacle: str) -> bool:
    """Whether decoders of one shape are to run as one batched pass; arguments and errors as of `compiles`."""
    return bool(student.alike()) and _pays(asked, device) and _decide("training.batch_decoders", asked, obstacle)


def speed_up_teacher(
    teacher: nn.Module, config: TeacherConfig, precision: FrozenPrecision, device: torch.device, *, sharded: bool
) -> nn.Module:
    """Compile the blocks of a frozen teacher and record it as a CUDA graph, as far as recipe and machine go.

    Args:
        teacher: on its device, in its precision and shards.
        config: the recipe's.
        precision: of the teacher.
        device: where it runs.
        sharded: whether it is cut by ZeRO-3.

    Returns:
        what is called in its place.

    Raises:
        UserError: something is asked for by name that this teacher or machine cannot do.
    """
    obstacle = GATHERED if sharded else ""
    integers = "int8 layers choose their range while they run" if precision == "int8" else ""
    if compiles("teachers.compile", config.compile, device, obstacle or integers):
        compile_blocks(teacher)
    no_gpu = "" if device.type == "cuda" else "there is no GPU"
    asked = config.cuda_graphs
    if _pays(asked, device) and _decide("teachers.cuda_graphs", asked, no_gpu or obstacle):
        return GraphedTeacher(teacher)
    return teacher


def _pays(asked: bool | Literal["auto"], device: torch.device) -> bool:
    """What is asked for, or left to the program on a GPU."""
    return asked is True or (asked == "auto" and device.type != "cpu")


def _decide(key: str, asked: bool | Literal["auto"], reason: str) -> bool:
    if not reason:
        return True
    if asked is True:
        raise UserError(f"{key} is true, but {reason}; leave it at auto to go on without")
    logger.info("%s is off: %s", key, reason)
    return False


class GraphedTeacher(nn.Module):
    """A frozen model whose forward pass is recorded at its first call and replayed: one launch instead of hundreds.

    Calls with other shapes than the first run as they would without. Weights may move, in place.
    """

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self._recording: Recording | None = None

    @torch.no_grad()
    def forward(self, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
        """As the teacher; the result is the caller's own."""
        inputs = [pixels] if kept is None else [pixels, kept]
        if self._recording is None:
            self._recording = Recording(self._run, inputs)
        if self._recording.fits(inputs):
            return self._recording.replay(inputs)
        return self._run(*inputs)

    def _run(self, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
        features: Tensor = self.teacher(pixels) if kept is None else self.teacher(pixels, kept=kept)
        return features


class Recording:
    """A function of tensors as a CUDA graph, with the buffers that it reads and writes.

    Args:
        function: launches the same kernels on the same addresses at every call.
        inputs: of the shapes that it will have.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
        self.inputs = [given.clone(memory_format=torch.contiguous_format) for given in inputs]
        device = inputs[0].device
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                function(*self.inputs)
        torch.cuda.current_stream(device).wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # Threads of the loader and of NCCL go on meanwhile, and what they ask of the driver must not end the recording.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.output = function(*self.inputs)
        self.free = torch.cuda.Event()

    def fits(self, inputs: list[Tensor]) -> bool:
        """Whether the inputs have the shapes that were recorded."""
        return [(given.shape, given.dtype) for given in inputs] == [(mine.shape, mine.dtype) for mine in self.inputs]

    def replay(self, inputs: list[Tensor]) -> Tensor:
        """The function of other values, on the current stream; a tensor of its own, which no later call overwrites."""
        stream = torch.cuda.current_stream(self.output.device)
        # The call before may have been on another stream, where the buffers are still in use.
        stream.wait_event(self.free)
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        output = self.output.clone()
        stream.record_event(self.free)
        return output
