"""Parts of tensors that a rank holds, as boxes of the whole tensors, by which any other cut of them can be loaded.

ZeRO cuts parameters anywhere in their flat order. A range of a flat tensor is a few boxes of the tensor itself, so that
a checkpoint holds tensors of their own shapes and tells nothing of how they were cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from mvd_scale.distributed.health.progress import Progress

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a part of a tensor, one of each per dimension."""


def boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """Yield boxes of a tensor that together are the elements `start` to `stop` of its flat order, in that order.

    At most 2n - 1 boxes for n dimensions.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    inner = math.prod(shape[1:])
    first, head, tail = start // inner, -(-start // inner), stop // inner
    if head > tail:
        # The range lies inside one row.
        yield from _in_row(first, start - first * inner, stop - first * inner, shape)
        return
    yield from _in_row(first, start - first * inner, inner, shape) if head > first else ()
    if head < tail:
        yield (head, *(0 for _ in shape[1:])), (tail - head, *shape[1:])
    yield from _in_row(tail, 0, stop - tail * inner, shape)


def _in_row(row: int, start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    for offsets, sizes in boxes(start, stop, shape[1:]):
        yield (row, *offsets), (1, *sizes)


@dataclass(frozen=True)
class Pieces:
    """Boxes of a tensor that this rank holds; `torch.distributed.checkpoint` saves and loads them through this class.

    The names of its methods are torch's (`torch.distributed._checkpointable`).
    """

    shape: tuple[int, ...]
    """Shape of the whole tensor."""

    dtype: torch.dtype
    tensors: Mapping[tuple[int, ...], Tensor]
    """Tensors of the shapes of the boxes by the boxes' offsets; loading writes into them."""

    @staticmethod
    def of_range(flat: Tensor, start: int, shape: Sequence[int]) -> Pieces:
        """Pieces of which the elements `start` to `start + len(flat)` in flat order are held in `flat`, (n,)."""
        tensors, taken = {}, 0
        for offsets, sizes in boxes(start, start + len(flat), shape):
            count = math.prod(sizes)
            tensors[offsets] = flat[taken : taken + count].view(sizes)
            taken += count
        return Pieces(tuple(shape), flat.dtype, tensors)

    @property
    def whole_bytes(self) -> int:
        """Size of the whole tensor, bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def size(self) -> torch.Size:
        """Shape of the whole tensor, as torch compares it with that of a checkpoint."""
        return torch.Size(self.shape)

    def __create_write_items__(self, name: str, pieces: Pieces) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets, number),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for number, chunk in enumerate(self.__create_chunk_list__())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), tensor.shape) for offsets, tensor in self.tensors.items()]

    def at(self, index: MetadataIndex) -> Tensor:
        """The tensor of a box by its offsets."""
        return self.tensors[tuple(index.offset or ())]


State = dict[str, Pieces]
"""Parts of all tensors of a state that this rank holds, by name."""


class PiecesSavePlanner(DefaultSavePlanner):
    """torch's planner of saving, for states of `Pieces`.

    Args:
        progress: progress of this rank, which counts every tensor.
    """

    def __init__(self, progress: Progress) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._progress = progress

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the tensor that a write item is about."""
        self._progress.count_piece()
        pieces: Pieces = self.state_dict[index.fqn]
        return pieces.at(index)


class PiecesLoadPlanner(DefaultLoadPlanner):
    """torch's planner of loading, for states of `Pieces`: fills their tensors in place."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the state as it is; torch's own method would copy what is no tensor."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the tensor that a read item is about."""
        pieces: Pieces = self.state_dict[index.fqn]
        return pieces.at(index)
