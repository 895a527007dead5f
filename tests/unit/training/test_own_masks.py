"""A student with a mask of its own computes what it computes alone, bit for bit, from features that all share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from mvd_scale.config import ModelConfig, Recipe
from mvd_scale.models import Encoder, Student
from mvd_scale.performance.batches import random_batch
from mvd_scale.targets import MaskedDistillation, Target, build_targets
from mvd_scale.targets.build import merge_targets
from mvd_scale.training.teachers.own_masks import StudentObjective, at_all_tokens
from mvd_scale.training.teachers.prefetch import TeachersFirst

CPU = torch.device("cpu")
VIDEO = {"width": 48, "depth": 2, "heads": 3, "frames": 8, "input_size": 64}
IMAGE = {**VIDEO, "frames": 1, "tubelet": 1, "positions": "sincos2d", "class_token": True}
DECODER = {"width": 32, "depth": 1, "heads": 2}
SHALLOW = {"kind": "image_teacher", "decoder": DECODER}
MASKS: dict[str, Any] = {
    "other ratio": {"ratio": 0.5},
    "other kind": {"kind": "random", "ratio": 0.75},
    "some predicted": {"ratio": 0.8, "decode_ratio": 0.5},
}


def family(mask: Mapping[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"folder": "run"},
            "model": VIDEO,
            "data": {"mask": {"ratio": 0.9}},
            "targets": {
                "image": SHALLOW,
                "video": {"kind": "video_teacher", "norm": True, "decoder": DECODER},
                "seen": {"kind": "video_teacher", "head": "linear", "tokens": "visible"},
                "dense": {"kind": "video_teacher", "visible_weight": 0.5, "decoder": DECODER},
                "average": {"kind": "momentum", "decoder": DECODER},
                "pixels": {"kind": "pixels", "decoder": DECODER},
            },
            "training": {"epochs": 2, "global_batch": 2, "base_lr": 1e-3, "warmup_epochs": 0},
            "students": {"own": {"data": {"mask": mask}}, "shared": {"targets": {"seen": None}}},
        }
    )


def teacher(name: str) -> Encoder:
    torch.manual_seed(3)
    return Encoder(ModelConfig.model_validate(IMAGE if name == "image" else VIDEO), final_norm=False)


def learn(targets: dict[str, Target], student: Student, objective: Any, batch: Any) -> dict[str, torch.Tensor]:
    student.zero_grad()
    loss, parts = objective(student, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **parts, **gradients}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_losses_and_gradients_are_those_of_the_student_alone(mask: dict[str, Any]) -> None:
    recipe = family(mask)
    batch = random_batch(recipe, 2, CPU)
    teachers = {name: teacher(name) for name in recipe.targets}
    targets = {name: build_targets(alone, teachers.__getitem__) for name, alone in recipe.each_student().items()}
    calls = dict.fromkeys(teachers, 0)
    for name, model in teachers.items():
        model.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    assert recipe.shared_tokens == 64
    teach = at_all_tokens(MaskedDistillation(merge_targets(targets.values())).prefetch_features, recipe.shared_tokens)
    together = TeachersFirst(teach)(lambda: batch)()
    assert {name: features.shape[1] for name, features in together.features.items()} == {
        "image": 64, "video": 64, "seen": 64, "dense": 64
    }  # fmt: skip
    found = {}
    for name, alone in recipe.each_student().items():
        torch.manual_seed(0)
        student = Student.from_recipe(alone, targets[name])
        found[name] = (
            student,
            learn(targets[name], student, StudentObjective(MaskedDistillation(targets[name]), name), together),
        )
    assert calls == {"image": 1, "video": 1, "seen": 1, "dense": 1, "average": 2, "pixels": 0}
    for name, alone in recipe.each_student().items():
        own = random_batch(alone, 2, CPU)
        assert torch.equal(own.visible, batch.seen_by(name).visible)
        student, ours = found[name]
        theirs = learn(targets[name], student, MaskedDistillation(targets[name]), batch.seen_by(name))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert found["own"][1]["loss"] != found["shared"][1]["loss"]


def test_one_named_student_without_features_takes_its_own_tokens() -> None:
    recipe = family(MASKS["other ratio"])
    batch, alone = random_batch(recipe, 2, CPU), recipe.alone("own")
    teachers = {name: teacher(name) for name in recipe.targets}
    targets = build_targets(alone, teachers.__getitem__)
    student = Student.from_recipe(alone, targets)
    loss, _ = StudentObjective(MaskedDistillation(targets), "own")(student, batch)
    assert torch.equal(loss, MaskedDistillation(targets)(student, batch.seen_by("own"))[0])


def test_every_tensor_of_a_batch_is_mapped() -> None:
    batch = random_batch(family(MASKS["other kind"]), 2, CPU)
    seen: list[np.ndarray] = []

    def spy(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.numpy())
        return tensor + 1

    mapped = batch.map(spy)
    assert torch.equal(mapped.own_masked["own"], batch.own_masked["own"] + 1)
    assert len(seen) == 7
