"""Writer of metrics: hands each reading to all sinks, none of which can end the run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mvd_scale.config import Recipe, RunRecipe
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.metrics.json_lines import JsonLines, StudentJsonLines
from mvd_scale.training.metrics.prometheus import PrometheusFile, prom_file
from mvd_scale.training.metrics.sink import MetricSink, Values
from mvd_scale.training.metrics.tensorboard import TensorBoard
from mvd_scale.training.metrics.terminal import Terminal
from mvd_scale.training.metrics.wandb import Wandb, import_wandb
from mvd_scale.utils.io import last_metrics

logger = logging.getLogger("mvd_scale")


class MetricWriter:
    """Writer of metrics to sinks; without sinks, on ranks other than 0, it does nothing.

    A sink that fails, because a disk is full or a service is gone, is one warning; it is tried again at each reading.

    Args:
        sinks: destinations.
        check: function that is called before each reading is written; its exceptions end the run.
    """

    def __init__(self, sinks: Sequence[MetricSink], check: Callable[[], None] = lambda: None) -> None:
        self._sinks = sinks
        self._check = check
        self._failing: set[MetricSink] = set()
        self._prefix = ""

    def __enter__(self) -> Self:
        for sink in self._sinks:
            with self._tolerating(sink):
                sink.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            with self._tolerating(sink):
                sink.close(failed=error is not None)

    def named(self, prefix: str) -> MetricWriter:
        """Return a writer to the same sinks that puts a prefix before the names of what callbacks show."""
        view = copy.copy(self)
        view._prefix = self._prefix + prefix
        return view

    def show(self, step: int, name: str, value: float | NDArray[np.uint8]) -> None:
        """Write a number or an image uint8 (H, W, 3) of a callback; may be called from another thread."""
        for sink in self._sinks:
            with self._tolerating(sink):
                sink.show(step, self._prefix + name, value)

    def write(self, step: int, values: Values) -> None:
        """Write the metrics that were read after `step` optimizer steps.

        Raises:
            UserError: another process has taken the run folder over.
        """
        self._check()
        for sink in self._sinks:
            with self._tolerating(sink):
                sink.write(step, values)
                if sink in self._failing:
                    logger.info("%s is written again", sink.name)
                    self._failing.discard(sink)

    @contextmanager
    def _tolerating(self, sink: MetricSink) -> Iterator[None]:
        """Log the first of a series of failures of a sink."""
        try:
            yield
        except UserError:
            raise
        # Sinks call other people's writers, which raise what they like; none is worth the end of a run of weeks.
        except Exception as error:
            if sink not in self._failing:
                logger.warning("%s cannot be written: %s; the run goes on without", sink.name, error)
            self._failing.add(sink)


def check_sinks(recipe: RunRecipe) -> None:
    """Check, before data are indexed, that the sinks that the recipe asks for can be used. Only rank 0 calls it.

    Raises:
        UserError: a package is not installed, or a path cannot be used.
    """
    if recipe.logging.wandb is not None:
        import_wandb()
    if recipe.logging.prometheus is not None:
        prom_file(recipe.logging.prometheus, recipe.run.folder)


def metric_writer(
    folder: RunFolder, recipe: RunRecipe, ranks: Ranks, *, start_step: int, total_steps: int
) -> MetricWriter:
    """Create the writer of a run, with the sinks that the recipe asks for.

    Args:
        folder: folder of the run.
        recipe: recipe of the run.
        ranks: this process among all.
        start_step: number of completed optimizer steps.
        total_steps: last step of the run.
    """
    if not ranks.is_main:
        return MetricWriter([])
    logging_ = recipe.logging
    sinks: list[MetricSink] = []
    if logging_.wandb is not None:
        logged = last_metrics(folder.metrics)
        sinks.append(Wandb(logging_.wandb, recipe, folder, logged["step"] if logged else 0))
    sinks.append(JsonLines(folder.metrics, start_step))
    if isinstance(recipe, Recipe):
        sinks += [StudentJsonLines(folder, name, start_step) for name in recipe.students]
    if logging_.tensorboard:
        sinks.append(TensorBoard(folder.tensorboard, start_step, -(-total_steps // logging_.every_steps)))
    if logging_.prometheus is not None:
        sinks.append(PrometheusFile(logging_.prometheus, folder, total_steps))
    sinks.append(Terminal(start_step, total_steps))
    return MetricWriter(sinks, folder.check_lease)
