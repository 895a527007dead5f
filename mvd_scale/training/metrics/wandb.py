"""Metrics in a project of Weights & Biases (the package `wandb`)."""

from __future__ import annotations

import importlib
import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvd_scale.config import RunRecipe
from mvd_scale.config.training import WandbConfig
from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.metrics.sink import MetricSink, Values
from mvd_scale.utils.io import write_atomic

logger = logging.getLogger("mvd_scale")

_FINISH_SECONDS = 60.0
"""Longest wait for the upload at the end of a run; `wandb sync` uploads the rest."""


def import_wandb() -> Any:
    """Import the package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            "logging.wandb needs the package wandb: `pip install 'mvd-scale[wandb]'`, or set logging.wandb to null "
            f"({error})"
        ) from error


class Wandb(MetricSink):
    """Run of Weights & Biases; a resumed run goes on there under the same id, which `wandb.json` stores.

    The x axis is the metric `step`, not the count of calls, so that pictures may come later than the numbers of their
    step. Readings up to `logged_step` are there already: a resumed run repeats them, and they are left out.

    Args:
        config: section `logging.wandb`.
        recipe: recipe of the run, which wandb shows as the configuration.
        folder: folder of the run.
        logged_step: step of the last reading before the run resumed.
    """

    name = "wandb"

    def __init__(self, config: WandbConfig, recipe: RunRecipe, folder: RunFolder, logged_step: int) -> None:
        self.config = config
        self.recipe = recipe
        self.folder = folder
        self.logged_step = logged_step
        self._run: Any = None

    def open(self) -> None:
        """Begin the run, or go on with it; offline if the server cannot be reached.

        Raises:
            UserError: the package is missing, or it refuses to begin the run.
        """
        self._wandb = import_wandb()
        try:
            self._run = self._begin(self.config.mode)
        except (self._wandb.errors.AuthenticationError, self._wandb.errors.UsageError) as error:
            raise UserError(
                f"logging.wandb cannot begin a run: {error}. Log in by `wandb login`, correct project and entity, or "
                "set logging.wandb.mode to offline"
            ) from error
        except self._wandb.errors.CommError as error:
            logger.warning("wandb cannot be reached: %s; the run is logged offline, see `wandb sync`", error)
            self._run = self._begin("offline")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Values) -> None:
        """Log all metrics of a step, unless an earlier process of the run did."""
        self._log(step, values)

    def show(self, step: int, name: str, value: float | NDArray[np.uint8]) -> None:
        """Log a number or an image, unless an earlier process of the run did."""
        self._log(step, {name: value if isinstance(value, float) else self._wandb.Image(value)})

    def close(self, *, failed: bool) -> None:
        """Upload what is left."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

    def _log(self, step: int, values: Mapping[str, object]) -> None:
        if self._run is None:
            raise RuntimeError("its run did not begin")
        if step > self.logged_step:
            self._run.log({"step": step, **values})

    def _begin(self, mode: str) -> Any:
        config = self.config
        return self._wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or self.folder.path.name,
            tags=list(config.tags) or None,
            mode=mode,
            id=run_id(self.folder.wandb),
            resume="allow",
            dir=str(self.folder.path),
            config=self.recipe.model_dump(mode="json"),
            # The log has its own files, and a progress bar would fill wandb's.
            settings=self._wandb.Settings(console="off", finish_timeout=_FINISH_SECONDS),
        )


def run_id(path: Path) -> str:
    """Read the id of the run from its file, or make one and store it."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        made = secrets.token_hex(4)
        write_atomic(path, json.dumps({"id": made}) + "\n")
        return made
