"""Copies of a state in host memory, which are written to disk while the training goes on."""

from __future__ import annotations

import torch
from torch import Tensor

from mvd_scale.training.checkpointing.pieces import Pieces, State


class HostCopy:
    """Copier of states to host memory: pinned and kept from one copy to the next for GPUs, new ones for CPUs."""

    def __init__(self) -> None:
        self._pinned: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def copy(self, state: State) -> State:
        """Copy a state; returns when the copy is complete."""
        copied = {
            name: Pieces(
                pieces.shape,
                pieces.dtype,
                {offsets: self._to_host(name, offsets, tensor) for offsets, tensor in pieces.tensors.items()},
            )
            for name, pieces in state.items()
        }
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return copied

    def _to_host(self, name: str, offsets: tuple[int, ...], tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor.detach().clone()
        host = self._pinned.get((name, offsets))
        if host is None:
            # Pinning takes longer than copying, so that the memory is kept.
            host = self._pinned[name, offsets] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor.detach(), non_blocking=True)
