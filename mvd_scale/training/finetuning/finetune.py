"""Fine-tuning (stage 3): training of a pre-trained encoder on a task (Sec. 4.2); each task is one subclass."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from mvd_scale.checkpoints.native import write_tensors
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
from mvd_scale.training.optimizer import layer_scale, parameter_groups
from mvd_scale.training.run import TrainingJob, run_training
from mvd_scale.training.trained_model import Objective, TrainedModel

AnyRecipe = TypeVar("AnyRecipe", bound=TaskRecipe)


class FinetuneTask(TrainingJob[AnyRecipe]):
    """Training job of an encoder on a task; subclasses define the task's data, model, loss and metric."""

    figure: str
    """Name of the metric that a validation computes, a share (0 to 1); higher is better."""

    weights: str
    """Name of the file in the run folder that stores the trained model."""

    @abstractmethod
    def read(self) -> Manifest:
        """Read the data that `prepare` indexed; the manifest has a row per `rows` item. All ranks call it."""

    @abstractmethod
    def data_digests(self) -> dict[str, Any]:
        """Compute digests of the training data, serialisable as JSON."""

    @abstractmethod
    def create_model(self) -> Classifier | Detector:
        """Create the model with random weights; `build` loads the pre-trained weights of its `encoder`."""

    def write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write the model's weights with their metadata to a file."""
        write_tensors(path, tensors, self.describe())

    @abstractmethod
    def objective(self) -> Objective:
        """Create the loss that the training minimises."""

    @abstractmethod
    def measure(self, ranks: Ranks) -> Callable[[Any], float]:
        """Create the function from a model to its `figure` on the validation set. All ranks must call that function."""

    def open(self, ranks: Ranks) -> Manifest:
        """Read the data, and check that all ranks read the same.

        Raises:
            UserError: the data of a rank differ from those of rank 0; raised on all ranks.
        """
        manifest = self.read()
        _agree(self.data_digests(), ranks)
        return manifest

    def origins(self, ranks: Ranks) -> list[dict[str, Any]]:
        """Compute digests of the data and of the encoder's initial weights. All ranks call it."""
        weights = self.recipe.training.initial_encoder
        digest = run_on_rank0(
            ranks, "weights", lambda: None if weights is None else tensors_digest(read_raw_checkpoint(weights).tensors)
        )
        return [self.data_digests() | {"initial encoder": digest}]

    def build(self, ranks: Ranks, steps_per_epoch: int) -> list[TrainedModel]:
        """Build the model from the initial weights of the encoder, and its moving average if the recipe has one."""
        training = self.recipe.training
        model = self.create_model()
        if training.initial_encoder is not None:
            load_initial_encoder(model.encoder, training.initial_encoder, training.initial_positions)
        self.averaged = copy.deepcopy(model).to(ranks.device) if training.ema_decay else None
        depth, decay = len(model.encoder.blocks), training.layer_decay
        groups = parameter_groups(model, training.weight_decay, lambda name: layer_scale(name, depth, decay))
        placement = make_placement(self.recipe, {}, ranks, bf16_record=self.folder.bf16_trial)
        engine = train_engine(model, groups, self.recipe, placement, ranks)
        averages = [] if self.averaged is None else [_average(self.averaged, engine, self, ranks)]
        return [TrainedModel(engine, self.objective(), self.schedule(steps_per_epoch), averages)]

    def export(self, engine: Any, folder: Path, ranks: Ranks) -> None:
        """Write the weights of the whole model. All ranks call it."""
        tensors = {name: full for name, full in full_parameters(engine) if ranks.is_main}
        if ranks.is_main:
            self.write(folder / self.weights, tensors)

    def callbacks(self, ranks: Ranks, steps_per_epoch: int) -> list[Callback]:
        """Create the validation callback, if the recipe has a validation."""
        if self.recipe.validation is None:
            return []
        every, steps = self.recipe.validation.every_epochs, steps_per_epoch
        keep = partial(self._keep, ranks=ranks)
        measure = self.measure(ranks)
        return [ValidationCallback(every, steps, self.figure, measure, self.folder, ranks, self.averaged, keep)]

    def _keep(self, engine: Any, folder: Path, *, ranks: Ranks) -> Path:
        """Write the weights whose metric decides what is best, and return their path. All ranks call it."""
        if self.averaged is None:
            self.export(engine, folder, ranks)
        elif ranks.is_main:
            self.write(folder / self.weights, self.averaged.state_dict())
        return folder / self.weights


def run_finetune(task: FinetuneTask[Any]) -> None:
    """Run a task from its start or its newest checkpoint to its end; see `run_training`.

    Raises:
        UserError: see `run_training`; or the recipe has neither `training.initial_encoder` nor `from_scratch`.
    """
    recipe = task.recipe
    if recipe.training.initial_encoder is None and not recipe.head.from_scratch:
        raise UserError(
            "training.initial_encoder is missing: name the pre-trained weights with "
            f"`--training.initial_encoder PATH`, or train from scratch with `--{recipe.head_section}.from_scratch true`"
        )
    run_training(task)


def _agree(digests: dict[str, Any], ranks: Ranks) -> None:
    """Raise a `UserError` on all ranks if the data digests of any rank differ from those of rank 0."""

    def compare(everyone: list[Any]) -> None:
        differing = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
        if differing:
            raise UserError(f"rank {differing[0]} reads other data than rank 0: all hosts need the same files")

    ranks.open_exchange().decide("digests of the data", digests, compare)


def _average(averaged: nn.Module, engine: Any, task: FinetuneTask[Any], ranks: Ranks) -> ModelEma:
    decay = task.recipe.training.ema_decay
    assert decay is not None
    averaged.eval().requires_grad_(False)
    return ModelEma(
        dict(averaged.named_parameters()),
        dict(engine.module.named_parameters()),
        lambda step: decay,
        "average",
        task.write,
        ranks,
    )
