"""The batches of a run, on a GPU each with the features of its teachers, which are computed one batch ahead.

    student's stream    ... | forward i, backward i, step i         | forward i+1 ...
    side stream         ... | clips i+1 decoded -> teachers of i+1  | clips i+2 ...

The host begins a batch before the student takes the one before it. Streams wait for each other; the host waits for
neither, only DeepSpeed makes it wait for the GPU: where it reduces gradients, looks for overflows, or has many gathers
of a sharded teacher under way. DALI decodes on streams of its own, `data.prefetch` batches before, and only the side
stream waits for it.

A sharded teacher gathers its weights on a stream of its own, which DeepSpeed orders with the one that is current. All
ranks begin the same things in the same order, and so their collectives; those of a host and those of the world may be
under way at once, as in other hybrid sharding.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from typing_extensions import Self

from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.loaders.clip_loader import ClipLoader
from mvd_scale.targets import MaskedDistillation
from mvd_scale.training.placement import Placement

BatchStarter = Callable[[Callable[[], ClipBatch]], Callable[[], ClipBatch]]
"""Takes what fetches a batch, begins work on it, and gives what hands it over to the student."""


class TeacherPrefetcher:
    """Iterator over the batches of a loader, in its order.

    Args:
        loader: its state stays the number of optimizer steps done: a batch that was begun but not handed out when a run
            ends is loaded again when it is resumed.
        begin: begins a batch while the one before it is in use; None fetches each when it is asked for.
        waiting: entered around each wait for the loader.
    """

    waited = 0.0
    """Seconds that the last `next` waited for the loader."""

    substituted = 0
    """Clips so far, of the batches handed out, whose videos could not be decoded."""

    def __init__(
        self,
        loader: ClipLoader,
        begin: BatchStarter | None = None,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._loader = loader
        self._begin = begin or _fetched
        self._depth = 0 if begin is None else 1
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
        """Whether there was another batch."""
        try:
            self._begun.append((self._begin(self._fetch), self._loader.substituted))
        except StopIteration:
            return False
        return True

    def _fetch(self) -> ClipBatch:
        asked = time.perf_counter()
        with self.waiting():
            batch = next(self._loader)
        self.waited += time.perf_counter() - asked
        return batch


class PrefetchStream:
    """Decodes a batch and computes the features of its teachers beside what the GPU does else.

    Args:
        device: a GPU.
        teach: adds features to a batch; what it reads besides is on the device and stays as it is.
    """

    def __init__(self, device: torch.device, teach: Callable[[ClipBatch], ClipBatch]) -> None:
        self._device, self._teach = device, teach
        self._stream = torch.cuda.Stream(device)
        # Teachers may still be on their way to the GPU.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def __call__(self, fetch: Callable[[], ClipBatch]) -> Callable[[], ClipBatch]:
        """Begin a batch; what it gives lets the stream that is current then wait for it."""
        with torch.cuda.stream(self._stream):
            # Copied, because DALI takes its memory back in the order of this stream alone.
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


def make_prefetcher(objective: MaskedDistillation, placement: Placement, device: torch.device) -> BatchStarter | None:
    """The way in which batches of a distillation are begun ahead; None where no teacher computes its features ahead."""
    early = any(teacher.prefetch.value for teacher in placement.teachers)
    return PrefetchStream(device, objective.prefetch_features) if early else None


def _fetched(fetch: Callable[[], ClipBatch]) -> Callable[[], ClipBatch]:
    batch = fetch()
    return lambda: batch
