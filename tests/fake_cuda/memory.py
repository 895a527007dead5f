"""Memory of the fake GPU: bytes of all storages that are alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .gpu import GPU


class MemoryTracker(TorchDispatchMode):
    """Mode that counts the bytes that operators allocate on the fake GPU, until they are freed.

    Attributes:
        held: bytes that are held now.
        peak: most bytes that were held since the start or the latest `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator and count what it allocates."""
        result = func(*args, **(kwargs or {}))
        self.count(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of tensors, each one once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device == GPU and storage not in self._known:
                size = storage.nbytes()
                self._known[storage] = size
                self.held += size
                weakref.finalize(storage, self._free, size).atexit = False
        self.peak = max(self.peak, self.held)

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak = self.held

    def _free(self, size: int) -> None:
        self.held -= size
