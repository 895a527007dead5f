"""The planner's memory of students of every size is within 10 % of what their steps allocate on a fake GPU.

Compared are models, batches, teachers' forward passes, saved activations, the loss and the backward pass. What
DeepSpeed holds (optimizer states, buckets, flattened gradients) does not run here: it is traced on CPUs, by
`tests/unit/performance/planning/test_memory.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor, nn

from mvd_scale.config import Recipe, load_recipe
from mvd_scale.config.training import Checkpointing
from mvd_scale.performance.planning.memory import Memory, predict_memory
from mvd_scale.performance.planning.parallelism import ParallelConfig, parallel_config
from mvd_scale.performance.planning.workload import Workload, build_workload
from mvd_scale.targets import FrozenTeacher, MaskedDistillation

from .gpu import fake_gpu
from .memory import MemoryTracker
from .steps import Step, pretraining_step

RECIPES = {"S": "distill/s_from_b", "B": "distill/b_from_b", "L": "distill/l_from_l", "H": "distill/h_from_h"}
MICRO = 8
MODELS, SAVED = ("weights", "teachers", "batches"), ("activations", "predictions and targets", "stacked weights")


def cut(recipe: Recipe, depth: int) -> Recipe:
    """Cut the depth of student and teachers: all blocks are alike."""
    shape = {"size": None, "depth": depth}
    targets = {
        name: target.model_copy(update={"model": target.model.model_copy(update=shape)})  # type: ignore[union-attr]
        for name, target in recipe.targets.items()
    }
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=shape), "targets": targets})


def planned(workload: Workload, parallel: ParallelConfig) -> Memory:
    """Predict the memory, without what DeepSpeed holds."""
    phases = predict_memory(workload, parallel).phases
    return Memory({name: {**parts, "optimizer": 0, "gradients": 0} for name, parts in phases.items()})


def measure(step: Step, tracker: MemoryTracker) -> dict[str, int]:
    """Run a step; return the bytes that are held after each phase or at its peak."""
    seen = {"models": tracker.held}
    objective = step.objective
    assert isinstance(objective, MaskedDistillation)

    def watch(name: str, teacher: nn.Module) -> None:
        def begin(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tracker.restart()

        def end(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[f"{name} teacher"] = tracker.peak

        teacher.register_forward_pre_hook(begin)
        teacher.register_forward_hook(end)

    for name, target in objective.targets.items():
        if isinstance(target, FrozenTeacher):
            watch(name, target.teacher)
    loss = step.forward()
    seen["saved"] = tracker.held
    tracker.restart()
    step.backward(loss)
    seen["backward"] = tracker.peak
    return seen


def compare(recipe: Recipe, checkpointing: Checkpointing, batched: bool) -> None:
    workload = build_workload(recipe).in_batches_of(MICRO)
    parallel = replace(
        parallel_config(recipe, workload, 1, micro=MICRO), checkpointing=checkpointing, batched=batched, accumulation=1,
        stage=1, prefetched=(False, False), graphed=(False, False), prefetch=0,
    )  # fmt: skip
    tracker = MemoryTracker()
    with fake_gpu(), tracker:
        step = pretraining_step(recipe, micro=MICRO, checkpointing=checkpointing, batched=batched)
        seen = measure(step, tracker)
    memory = planned(workload, parallel)
    loss = memory.phases["loss"]
    expected = {"models": sum(loss[part] for part in MODELS)}
    expected["saved"] = expected["models"] + sum(loss.get(part, 0) for part in SAVED)
    expected |= {name: sum(parts.values()) for name, parts in memory.phases.items() if name.endswith("teacher")}
    gradients = workload.parameters * 2
    passes = ("loss", "start of the backward pass", "end of the backward pass")
    # Without DeepSpeed every gradient is held until the end.
    ends = {"end of the backward pass": gradients}
    expected["backward"] = max(sum(memory.phases[name].values()) + ends.get(name, 0) for name in passes)
    assert seen == pytest.approx(expected, rel=0.1)
    # What the backward pass needs, to the byte but for positions, token indices and statistics.
    assert seen["saved"] - seen["models"] == pytest.approx(expected["saved"] - expected["models"], rel=0.01)


@pytest.mark.parametrize("checkpointing", ["none", "attention", "block"])
@pytest.mark.parametrize("size", RECIPES)
def test_a_shallow_student_holds_what_was_predicted(size: str, checkpointing: Checkpointing) -> None:
    compare(cut(load_recipe(RECIPES[size]), 3), checkpointing, batched=checkpointing != "attention")


@pytest.mark.slow
@pytest.mark.parametrize("size", RECIPES)
def test_a_whole_student_holds_what_was_predicted(size: str) -> None:
    recipe = load_recipe(RECIPES[size])
    compare(recipe, recipe.training.gradient_checkpointing, batched=True)
