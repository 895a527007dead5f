"""Training steps of recipes on the fake GPU: the program's models, targets and losses, placed as on one GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvd_scale.config import DetectionRecipe, FinetuneRecipe, Recipe, RunRecipe
from mvd_scale.config.training import Checkpointing
from mvd_scale.data.batch import ClipBatch
from mvd_scale.detection.loader import DetectionBatch
from mvd_scale.detection.objective import DetectionLoss
from mvd_scale.models import Classifier, Student
from mvd_scale.models.blocks import set_gradient_checkpointing
from mvd_scale.models.detector import Detector
from mvd_scale.models.precision import dtype_of
from mvd_scale.performance.planning.workload import masked_tokens
from mvd_scale.targets import FrozenTeacher, MaskedDistillation, Target, build_targets
from mvd_scale.targets.build import init_teacher
from mvd_scale.targets.load import teacher_input_sizes
from mvd_scale.training.capabilities import teacher_facts
from mvd_scale.training.finetuning.classification_loss import ClassificationLoss
from mvd_scale.training.placement import Capabilities, Devices, decide_placement
from mvd_scale.training.trained_model import Objective

from .gpu import GPU, on_gpu, on_meta

ONE_GPU = Devices("cuda", 1, 1, Capabilities("fake GPU", bf16=True, fp8=True))
CLASSES, PEOPLE = 400, 3


@dataclass(frozen=True)
class Step:
    """A model with its loss and one micro batch, all on the fake GPU."""

    model: nn.Module
    objective: Objective
    batch: ClipBatch

    def forward(self) -> Tensor:
        """Compute the loss."""
        loss, terms = self.objective(self.model, self.batch)
        assert list(terms) == list(self.objective.parts)
        for value in (loss, *terms.values()):
            assert (value.dtype, value.device, value.shape) == (torch.float32, GPU, ())
        return loss

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a scaled loss, as DeepSpeed does in fp16."""
        (loss * 65536.0).backward()
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, name
            assert (gradient.dtype, gradient.device) == (parameter.dtype, GPU), name


def each_once(recipes: Mapping[str, RunRecipe]) -> list[Any]:
    """Parameters of a test of all recipes; those that compute what an earlier one computes are slow tests."""
    known: set[str] = set()
    parameters = []
    for name, recipe in recipes.items():
        training = recipe.training
        computed = recipe.model_dump(include={"model", "targets", "classifier", "detector"})
        masks = recipe.data.model_dump(include={"mask"})
        key = repr((computed, masks, training.precision, training.gradient_checkpointing, training.deepspeed))
        parameters.append(pytest.param(name, marks=[pytest.mark.slow] if key in known else []))
        known.add(key)
    return parameters


def shallow(model: nn.Module, depth: int) -> None:
    """Leave away all but the first blocks of every stack; all blocks of a stack run the same code."""
    for name, module in model.named_modules():
        if name.endswith("blocks"):
            del module[depth:]  # type: ignore[operator]


def pretraining_step(
    recipe: Recipe, *, micro: int = 2, depth: int | None = None, checkpointing: Checkpointing | None = None,
    batched: bool | None = None,
) -> Step:  # fmt: skip
    """Build the step of a recipe of pre-training.

    Args:
        recipe: recipe; its precision is the student's, and teachers are in fp16.
        micro: clips.
        depth: blocks per stack; all if None.
        checkpointing: gradient checkpointing; the recipe's if None.
        batched: whether decoders run as one batch; as placed on one GPU if None.
    """
    with on_meta():
        targets = build_targets(recipe, lambda name: init_teacher(recipe, name))
        student = Student.from_recipe(recipe, targets)
    placement = decide_placement(recipe, teacher_facts(targets), ONE_GPU)
    teachers = [target for target in targets.values() if isinstance(target, FrozenTeacher)]
    for model in (student, *(target.teacher for target in teachers)):
        # Features of several layers need the blocks that they are of.
        if depth is not None and not getattr(model, "layers", ()):
            shallow(model, depth)
    on_gpu(student, dtype_of(recipe.training.precision))
    for target in teachers:
        # Only parameters are cast, see `cast_parameters`.
        on_gpu(target.teacher, torch.float16, buffers=torch.float32)
        if target.statistics is not None:
            on_gpu(target.statistics, torch.float64)
    if placement.batch_decoders.value if batched is None else batched:
        student.batch_decoders()
    set_gradient_checkpointing(student, checkpointing or placement.gradient_checkpointing.value)
    return Step(student.train(), MaskedDistillation(targets), clips(recipe, targets, micro))


def clips(recipe: Recipe, targets: dict[str, Target], micro: int) -> ClipBatch:
    """Make a micro batch of pre-training."""
    sides = teacher_input_sizes(recipe, targets)
    return ClipBatch(
        _pixels(recipe, micro),
        _indices(micro, recipe.visible_tokens),
        _indices(micro, masked_tokens(recipe)),
        _indices(micro),
        torch.empty(micro, dtype=torch.int64),
        {side: _pixels(recipe, micro, side) for side in sides},
    )


def finetuning_step(
    recipe: FinetuneRecipe | DetectionRecipe, *, micro: int = 2, depth: int | None = None, checkpointing: Checkpointing
) -> Step:
    """Build the step of a recipe of fine-tuning or detection; the arguments are those of `pretraining_step`."""
    objective: Objective
    with on_meta():
        if isinstance(recipe, FinetuneRecipe):
            objective = ClassificationLoss(recipe, CLASSES)
            model: nn.Module = Classifier(recipe.model, CLASSES, dropout=recipe.classifier.dropout)
        else:
            objective = DetectionLoss()
            model = Detector(recipe.model, recipe.detector)
    if depth is not None:
        shallow(model, depth)
    on_gpu(model, dtype_of(recipe.training.precision))
    set_gradient_checkpointing(model, checkpointing)
    plain: dict[str, Any] = {
        "pixels": _pixels(recipe, micro), "visible": _indices(micro, 0), "masked": _indices(micro, 0),
        "labels": _indices(micro), "video_ids": torch.empty(micro, dtype=torch.int64),
    }  # fmt: skip
    if isinstance(recipe, FinetuneRecipe):
        return Step(model.train(), objective, ClipBatch(**plain))
    boxes = torch.empty(micro * PEOPLE, 5, device=GPU)
    actions = torch.empty(micro * PEOPLE, recipe.detector.classes, device=GPU)
    return Step(model.train(), objective, DetectionBatch(**plain, boxes=boxes, actions=actions))


def _pixels(recipe: RunRecipe, micro: int, side: int | None = None) -> Tensor:
    side = side or recipe.model.input_size
    return torch.empty(micro, recipe.model.frames, side, side, 3, dtype=torch.uint8, device=GPU)


def _indices(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=GPU)
