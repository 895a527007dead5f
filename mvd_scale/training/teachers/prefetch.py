"""Prefetch of batches: on a GPU, teachers compute the features of the next batch in parallel with the student's step.

    student's stream    ... | forward i, backward i, step i         | forward i+1 ...
    prefetch stream     ... | clips i+1 decoded -> teachers of i+1  | clips i+2 ...

The host starts batch i+1 before the student takes batch i. The streams wait for each other by events, which do not
block the host. Only DeepSpeed makes the host wait for the GPU: when it reduces gradients, checks for overflows, or has
many gathers of a sharded teacher in flight. DALI decodes on its own streams, `data.prefetch` batches in advance, and
only the prefetch stream waits for it.

A sharded teacher gathers its weights on its own stream, which DeepSpeed orders relative to the current stream. All
ranks start the same operations in the same order, so their collectives match; collectives of a host's group and of the
world may overlap, as in other implementations of hybrid sharding.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor

from mvd_scale.data.batch import ClipBatch
from mvd_scale.training.teachers.own_masks import at_all_tokens

if TYPE_CHECKING:
    from mvd_scale.targets import MaskedDistillation
    from mvd_scale.training.placement import Placement

BatchStarter = Callable[[Callable[[], ClipBatch]], Callable[[], ClipBatch]]
"""Function that starts work on a batch: from a function that loads it to a function that returns it when ready."""


class BatchSource(Protocol):
    """Iterator over the micro batches of a rank, such as `ClipLoader`."""

    @property
    def substituted(self) -> int:
        """Number of clips so far that were replaced because their video could not be decoded."""

    def __next__(self) -> ClipBatch:
        """Return the next micro batch.

        Raises:
            StopIteration: the last one has been returned.
        """


class TeacherPrefetcher:
    """Iterator over the batches of a loader, in its order, which starts each batch one step in advance.

    A batch that was started but not returned when a run ends is loaded again by the resumed run: the loader's state
    remains the number of completed optimizer steps.

    Args:
        loader: loader of the micro batches.
        begin: function that starts work on the next batch; None loads each batch when it is needed.
        waiting: factory of a context manager that encloses each wait for the loader.
    """

    waited = 0.0
    """Seconds that the latest `next` waited for the loader."""

    substituted = 0
    """Number of clips in the returned batches that were replaced because their video could not be decoded."""

    def __init__(
        self,
        loader: BatchSource,
        begin: BatchStarter | None = None,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._loader = loader
        self._begin = begin or _fetched
        self._depth = 0 if begin is None or isinstance(begin, TeachersFirst) else 1
        self.waiting = waiting
        self._begun: deque[tuple[Callable[[], ClipBatch], int]] = deque()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ClipBatch:
        self.waited = 0.0
        while len(self._begun) <= self._depth and self._begin_another():
            pass
        if not self._begun:
            raise StopIteration
        wait_ready, self.substituted = self._begun.popleft()
        return wait_ready()

    def _begin_another(self) -> bool:
        """Start work on the next batch; return whether the loader had one."""
        try:
            self._begun.append((self._begin(self._fetch), self._loader.substituted))
        except StopIteration:
            return False
        return True

    def _fetch(self) -> ClipBatch:
        started = time.perf_counter()
        with self.waiting():
            batch = next(self._loader)
        self.waited += time.perf_counter() - started
        return batch


class PrefetchStream:
    """CUDA stream that prepares a batch and computes its teacher features in parallel with the current stream.

    Args:
        device: GPU of this rank.
        teach: function that adds teacher features to a batch; the weights that it reads must not change.
    """

    def __init__(self, device: torch.device, teach: Callable[[ClipBatch], ClipBatch]) -> None:
        self._device, self._teach = device, teach
        self._stream = torch.cuda.Stream(device)
        # Copies of the teachers' weights to the GPU may still be in flight.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def __call__(self, fetch: Callable[[], ClipBatch]) -> Callable[[], ClipBatch]:
        """Start work on a batch; the returned function makes the stream that is current at its call wait for it."""
        with torch.cuda.stream(self._stream):
            # Clones, because DALI reuses its buffers in the order of this stream only.
            batch = self._teach(fetch().map(Tensor.clone))
            done = self._stream.record_event()

        def wait_ready() -> ClipBatch:
            student = torch.cuda.current_stream(self._device)
            student.wait_event(done)

            def used(tensor: Tensor) -> Tensor:
                if tensor.is_cuda:
                    tensor.record_stream(student)
                return tensor

            return batch.map(used)

        return wait_ready


class TeachersFirst:
    """Function that computes teacher features when a batch is needed, before any of several students sees it.

    Args:
        teach: function that adds teacher features to a batch.
    """

    def __init__(self, teach: Callable[[ClipBatch], ClipBatch]) -> None:
        self._teach = teach

    def __call__(self, fetch: Callable[[], ClipBatch]) -> Callable[[], ClipBatch]:
        """Load a batch and compute its features; the returned function returns it."""
        batch = self._teach(fetch())
        return lambda: batch


def make_prefetcher(
    objective: MaskedDistillation,
    placements: Sequence[Placement],
    device: torch.device,
    *,
    all_tokens: int | None = None,
) -> BatchStarter | None:
    """Create the function that computes teacher features before the students see a batch.

    Args:
        objective: objective with the targets of all students.
        placements: placement of each student.
        device: device of this rank.
        all_tokens: number of tokens of a clip if students have masks of their own, and features are computed at all of
            them; else None.

    Returns:
        function for features in advance if a teacher is placed with prefetch, or once for several students; None for a
        single student, whose objective calls the teachers.
    """
    early = any(teacher.prefetch.value for placement in placements for teacher in placement.teachers)
    teach: Callable[[ClipBatch], ClipBatch] = objective.prefetch_features
    if all_tokens is not None:
        teach = at_all_tokens(teach, all_tokens)
    if early:
        return PrefetchStream(device, teach)
    return TeachersFirst(teach) if len(placements) > 1 else None


def _fetched(fetch: Callable[[], ClipBatch]) -> Callable[[], ClipBatch]:
    batch = fetch()
    return lambda: batch
