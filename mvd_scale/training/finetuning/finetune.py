"""Stage 3: a pre-trained encoder is taught a task (Sec. 4.2). What differs from task to task is one class each."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mvd_scale.checkpoints.reading import read_raw_checkpoint, tensors_digest
from mvd_scale.checkpoints.weights import load_initial_encoder
from mvd_scale.config import TaskRecipe
from mvd_scale.data.manifest import Manifest
from mvd_scale.distributed.process_group import Ranks, run_on_rank0
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier
from mvd_scale.models.detector import Detector
from mvd_scale.training.callbacks import Callback
from mvd_scale.training.capabilities import make_placement
from mvd_scale.training.deepspeed_engine import full_parameters, train_engine
from mvd_scale.training.ema import ModelEma
from mvd_scale.training.finetuning.validation import ValidationCallback
from mvd_scale.training.lr_schedule import Schedule
from mvd_scale.training.optimizer import layer_scale, parameter_groups
from mvd_scale.training.run import TrainingJob, run_training
from mvd_scale.training.trainer import Objective, TrainedModel

AnyRecipe = TypeVar("AnyRecipe", bound=TaskRecipe)


class FinetuneTask(TrainingJob[AnyRecipe]):
    """A task that an encoder is taught, and its data."""

    figure: str
    """What a validation measures; more is better."""

    weights: str
    """File of a run in which the trained model is kept."""

    @abstractmethod
    def read(self) -> Manifest:
        """Read what was prepared, on every rank; a row for each clip of an epoch."""

    @abstractmethod
    def data_digests(self) -> dict[str, Any]:
        """Digests of the data that a checkpoint belongs to."""

    @abstractmethod
    def create_model(self) -> Classifier | Detector:
        """The model, whose `encoder` is pre-trained."""

    @abstractmethod
    def write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write the weights of the model into a file."""

    @abstractmethod
    def objective(self) -> Objective:
        """What the training minimises."""

    @abstractmethod
    def measure(self, ranks: Ranks) -> Callable[[Any], float]:
        """Of the model in training, or its average, on the validation set. All ranks call what is returned."""

    def open(self, ranks: Ranks) -> Manifest:
        """As of every job.

        Raises:
            UserError: on all ranks alike, one of them sees other data.
        """
        manifest = self.read()
        _agree(self.data_digests(), ranks)
        return manifest

    def origin(self, ranks: Ranks) -> dict[str, Any]:
        """The data, and the weights that the encoder starts from."""
        weights = self.recipe.training.initial_encoder
        digest = run_on_rank0(
            ranks, "weights", lambda: None if weights is None else tensors_digest(read_raw_checkpoint(weights).tensors)
        )
        return self.data_digests() | {"initial encoder": digest}

    def build(self, ranks: Ranks, schedule: Schedule) -> TrainedModel:
        """The model of the task, started from the encoder's weights, and its moving average if there is to be one."""
        training = self.recipe.training
        model = self.create_model()
        if training.initial_encoder is not None:
            load_initial_encoder(model.encoder, training.initial_encoder)
        self.averaged = copy.deepcopy(model).to(ranks.device) if training.ema_decay else None
        depth, decay = len(model.encoder.blocks), training.layer_decay
        groups = parameter_groups(model, training.weight_decay, lambda name: layer_scale(name, depth, decay))
        engine = train_engine(model, groups, self.recipe, make_placement(self.recipe, {}, ranks), ranks)
        averages = [] if self.averaged is None else [_average(self.averaged, engine, self, ranks)]
        return TrainedModel(engine, self.objective(), averages)

    def export(self, engine: Any, folder: Path, ranks: Ranks) -> None:
        """Write the whole model."""
        tensors = {name: full for name, full in full_parameters(engine) if ranks.is_main}
        if ranks.is_main:
            self.write(folder / self.weights, tensors)

    def callbacks(self, ranks: Ranks, schedule: Schedule) -> list[Callback]:
        """The validation, if the recipe has one."""
        if self.recipe.validation is None:
            return []
        every, steps = self.recipe.validation.every_epochs, schedule.steps_per_epoch
        keep = partial(self._keep, ranks=ranks)
        measure = self.measure(ranks)
        return [ValidationCallback(every, steps, self.figure, measure, self.folder, ranks, self.averaged, keep)]

    def _keep(self, engine: Any, folder: Path, *, ranks: Ranks) -> Path:
        """Write the weights that were judged, and say where. All ranks call it."""
        if self.averaged is None:
            self.export(engine, folder, ranks)
        elif ranks.is_main:
            self.write(folder / self.weights, self.averaged.state_dict())
        return folder / self.weights


def run_finetune(task: FinetuneTask[Any]) -> None:
    """Run a task from its start, or from its newest checkpoint, to its end; as `run_training`.

    Raises:
        UserError: as `run_training`, or there are no weights to start from and the recipe does not forgo them.
    """
    recipe = task.recipe
    if recipe.training.initial_encoder is None and not recipe.head.from_scratch:
        raise UserError(
            "training.initial_encoder is missing: name the pre-trained weights with "
            f"`--training.initial_encoder PATH`, or train without any by `--{recipe.head_section}.from_scratch true`"
        )
    run_training(task)


def _agree(origin: dict[str, Any], ranks: Ranks) -> None:
    told: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(told, origin)
    differing = [rank for rank, there in enumerate(told) if there != told[0]]
    if differing:
        raise UserError(f"rank {differing[0]} sees other data than rank 0: give all hosts the same files")


def _average(averaged: nn.Module, engine: Any, task: FinetuneTask[Any], ranks: Ranks) -> ModelEma:
    decay = task.recipe.training.ema_decay
    assert decay is not None
    averaged.eval().requires_grad_(False)
    return ModelEma(
        dict(averaged.named_parameters()),
        dict(engine.module.named_parameters()),
        lambda step: decay,
        lambda folder: folder / "average.safetensors",
        task.write,
        ranks,
    )
