"""Whole frozen teachers as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_WARM_UP = 3
"""Forward passes before a graph is recorded, in which blocks are compiled and libraries choose their kernels."""


class CudaGraphTeacher(nn.Module):
    """A frozen model whose forward pass is recorded at its first call and replayed: one launch instead of hundreds.

    Calls with other shapes than the first run as they would without. Weights may move, in place.
    """

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self._captured: CapturedGraph | None = None

    @torch.no_grad()
    def forward(self, pixels: Tensor, output_tokens: Tensor | None = None) -> Tensor:
        """As the teacher; the result is the caller's own."""
        inputs = [pixels] if output_tokens is None else [pixels, output_tokens]
        if self._captured is None:
            self._captured = CapturedGraph(self._run, inputs)
        if self._captured.fits(inputs):
            return self._captured.replay(inputs)
        return self._run(*inputs)

    def _run(self, pixels: Tensor, output_tokens: Tensor | None = None) -> Tensor:
        features: Tensor = (
            self.teacher(pixels) if output_tokens is None else self.teacher(pixels, output_tokens=output_tokens)
        )
        return features


class CapturedGraph:
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
