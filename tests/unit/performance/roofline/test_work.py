"""Work of a step: the planner's count, divided into calls of the shapes that the step makes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from mvd_scale.config import Recipe
from mvd_scale.performance.planning.flops import part_flops
from mvd_scale.performance.planning.layers import BlockCost, ElementwiseCost, LinearCost
from mvd_scale.performance.planning.workload import ModelPart, Workload, build_workload
from mvd_scale.performance.profiling.attribution import Place
from mvd_scale.performance.roofline.calls import AttentionCall, CopyCall, ProductCall
from mvd_scale.performance.roofline.work import Computing, Conditions, step_work

CLIPS = 3
BF16 = Computing(torch.bfloat16)
VIDEO: dict[str, Any] = {"width": 64, "depth": 3, "heads": 4, "frames": 8, "input_size": 64, "patch_size": 8}
IMAGE = {**VIDEO, "width": 48, "frames": 1, "tubelet": 1, "positions": "sincos2d", "class_token": True}
DECODER = {"width": 32, "depth": 2, "heads": 2}
TARGETS: dict[str, Any] = {
    "image": {"kind": "image_teacher", "model": IMAGE, "decoder": DECODER},
    "video": {"kind": "video_teacher", "model": VIDEO, "decoder": DECODER},
    "pixels": {"kind": "pixels", "decoder": {**DECODER, "width": 48}},
    "head": {"kind": "video_teacher", "model": VIDEO, "head": "mlp", "tokens": "visible"},
    "timm": {"kind": "timm", "vit": "vit_tiny_patch16_224", "head": "linear", "tokens": "visible"},
}
APART = {f"{name} decoder": (f"{name} decoder",) for name in ("image", "video", "pixels")}
BATCHED = {"image and video decoders": ("image decoder", "video decoder"), "pixels decoder": ("pixels decoder",)}
HEADS = {f"{name} head": (f"{name} head",) for name in ("head", "timm")}


@pytest.fixture(scope="module")
def workload() -> Workload:
    sections = {
        "run": {"folder": "unused"},
        "model": VIDEO,
        "data": {"mask": {"ratio": 0.75}},
        "targets": TARGETS,
        "training": {"epochs": 2, "global_batch": 2, "base_lr": 1e-3, "warmup_epochs": 1},
    }
    return build_workload(Recipe.model_validate(sections))


@pytest.mark.parametrize("decoders", [APART, BATCHED])
@pytest.mark.parametrize("teacher", [BF16, Computing(torch.float32, eight_bit=True, in_passes=True)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_work_of_every_part_is_the_planners_count(
    workload: Workload, decoders: dict[str, tuple[str, ...]], teacher: Computing, accumulation: int
) -> None:
    groups = {"encoder": ("encoder",), **decoders, **HEADS}
    teachers = {part.name: teacher for part in workload.teachers}
    counted: Counter[tuple[str, str]] = Counter()
    for one in step_work(workload, Conditions(CLIPS, BF16, teachers, groups, accumulation)):
        if one.place.kind != "memory":
            counted[one.place.part, one.place.passes] += one.amount  # type: ignore[assignment]
    said = {part.part: part for part in part_flops(workload.in_batches_of(CLIPS), checkpointing="none")}
    members = {**groups, "encoder": ("patch embedding", "encoder"), **{name: (name,) for name in teachers}}
    for name, parts in members.items():
        clips = CLIPS * accumulation
        assert counted[name, "forward"] == pytest.approx(clips * sum(said[part].forward for part in parts))
        assert counted[name, "backward"] == pytest.approx(clips * sum(said[part].backward for part in parts))
    assert {part for part, _ in counted} == set(members)


def block(**changes: int) -> BlockCost:
    return BlockCost(**{"keys": 700, "queries": 700, "outputs": 700, "width": 8, "hidden": 32, "heads": 2, **changes})


def work_of(trained: ModelPart, teacher: ModelPart | None = None, **computing: Any) -> Counter[tuple[Place, Any]]:
    teachers = () if teacher is None else (teacher,)
    workload = Workload((trained,), teachers, parameters=100, tensors=1, unsharded=0, pixels=0)
    names = {part.name: Computing(torch.bfloat16, **computing) for part in teachers}
    calls: Counter[tuple[Place, Any]] = Counter()
    for one in step_work(workload, Conditions(CLIPS, BF16, names, {"encoder": ("encoder",)}, ranks=2)):
        calls[one.place, one.call] += one.count  # type: ignore[assignment]
    return calls


ENCODER = ModelPart("encoder", 8, (LinearCost(10, 5, 8, input_grad=False), ElementwiseCost(10, 8, 2)), predicted=40)
FORWARD, BACKWARD = (Place("encoder", passes, "products") for passes in ("forward", "backward"))


def test_a_trained_layer_written_out() -> None:
    """30 rows; the norm reads and writes 2 tensors of 480 bytes and 3 in the backward pass."""
    copies = {passes: Place("encoder", passes, "memory") for passes in ("forward", "backward")}
    losses = {passes: Place("loss and rest", passes, "memory") for passes in ("forward", "backward")}
    forward = ProductCall(30, 5, 8, torch.bfloat16)
    assert work_of(ENCODER) == {
        (FORWARD, forward): 1,
        # Pixels need no gradient.
        (BACKWARD, ProductCall(30, 5, 8, torch.bfloat16, "weight")): 1,
        (copies["forward"], CopyCall(480)): 1,
        (copies["backward"], CopyCall(480)): 1.5,
        # Predictions and features of 3 x 40 numbers, and the gradient.
        (losses["forward"], CopyCall(240)): 1,
        (losses["backward"], CopyCall(240)): 1.5,
        # 30 bytes for each of 100 parameters, on two ranks.
        (Place("optimizer", "", "memory"), CopyCall(750)): 1,
    }
    assert forward.work == 2 * 30 * 5 * 8


def test_a_teacher_on_a_cpu_computes_a_few_sequences_at_a_time() -> None:
    """Blocks hold 1600 tokens in the cache: of 9 sequences of 700 tokens two at a time, and one at last."""
    teacher = ModelPart("video teacher", 8, (block(sequences=3),))
    here = Place("video teacher", "forward", "attention")

    def attention(**computing: Any) -> dict[int, float]:
        calls = work_of(ENCODER, teacher, **computing).items()
        return {call.sequences: count for (place, call), count in calls if place == here}

    assert attention(in_passes=True) == {2: 4, 1: 1}
    assert attention() == {9: 1}


def test_the_last_block_of_a_decoder_asks_with_some_tokens() -> None:
    decoder = ModelPart("encoder", 8, (block(keys=20, queries=12, outputs=11),))
    calls = work_of(decoder)
    attention = AttentionCall(3, 20, 12, 2, 4, torch.bfloat16)
    assert calls[Place("encoder", "forward", "attention"), attention] == 1
    assert attention.work == 4 * 3 * 12 * 20 * 8
    backward = AttentionCall(3, 20, 12, 2, 4, torch.bfloat16, backward=True)
    assert calls[Place("encoder", "backward", "attention"), backward] == 1
    assert backward.work == 10 * 3 * 12 * 20 * 8
    for gradient in ("weight", "input"):
        assert calls[BACKWARD, ProductCall(60, 8, 24, torch.bfloat16, gradient)] == 1
        assert calls[BACKWARD, ProductCall(33, 32, 8, torch.bfloat16, gradient)] == 1
    # The second norm and the residual sums: 33 rows of 8.
    assert calls[Place("encoder", "forward", "memory"), CopyCall(33 * 8 * 2)] == 2 + 1.5


def test_8_bits_are_for_the_layers_of_blocks_and_may_hold_the_activation() -> None:
    teacher = ModelPart("video teacher", 8, (LinearCost(9, 5, 8), block(keys=9, queries=9, outputs=9)))
    calls = work_of(ENCODER, teacher, eight_bit=True, activation_apart=False)
    products = [call for place, call in calls if place == Place("video teacher", "forward", "products")]
    assert [call.eight_bit for call in products] == [False, True, True, True, True]
    copies = [call.size for place, call in calls if place == Place("video teacher", "forward", "memory")]
    assert 27 * 32 * 2 not in copies
    assert 27 * 8 * 2 in copies
