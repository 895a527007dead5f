"""FLOPs by part are exactly those that torch counts on the modules.

The counts are read by module. What torch's counter does not know, SDPA's kernel for CPUs, is given the formula that it
has for the same kernel of GPUs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mvd_scale.config import Recipe, load_finetune_recipe, load_recipe
from mvd_scale.config.training import Checkpointing
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.sampling.masks import draw_mask
from mvd_scale.models import Classifier, Student
from mvd_scale.models.blocks import set_gradient_checkpointing
from mvd_scale.performance.planning.flops import part_flops
from mvd_scale.performance.planning.layers import Backward, BlockCost, LinearCost
from mvd_scale.performance.planning.students import build_workloads
from mvd_scale.performance.planning.workload import build_workload, masked_tokens
from mvd_scale.targets import FrozenTeacher, build_targets
from mvd_scale.targets.build import init_teacher

CLIPS = 2
VIDEO: dict[str, Any] = {"width": 64, "depth": 3, "heads": 4, "frames": 8, "input_size": 64, "patch_size": 8}
IMAGE = {**VIDEO, "width": 48, "frames": 1, "tubelet": 1, "positions": "sincos2d", "class_token": True}
DECODER = {"width": 32, "depth": 2, "heads": 2}
TARGETS: dict[str, Any] = {
    "image": {"kind": "image_teacher", "model": IMAGE, "decoder": DECODER},
    "video": {"kind": "video_teacher", "model": VIDEO, "decoder": {**DECODER, "width": 48}},
    "pixels": {"kind": "pixels", "decoder": DECODER},
}
VISIBLE = {"head": "linear", "tokens": "visible"}
METHODS: dict[str, dict[str, Any]] = {
    "co-teaching and pixels": {"targets": TARGETS},
    "half decoded": {"targets": TARGETS, "data": {"mask": {"ratio": 0.75, "decode_ratio": 0.5}}},
    "stochastic depth": {"targets": TARGETS, "model": {**VIDEO, "drop_path": 0.3}},
    "visible tokens too": {"targets": {name: {**target, "visible_weight": 0.5} for name, target in TARGETS.items()}},
    "several layers": {
        "targets": {
            "image": {**TARGETS["image"], "layers": [1, 3]},
            "video": {**TARGETS["video"], "layers": [1, 2]},
            "timm": {"kind": "timm", "vit": "vit_tiny_patch16_224", "layers": [2, 4], "decoder": DECODER},
        }
    },
    "moving average": {"targets": {"average": {"kind": "momentum", "decoder": DECODER}}},
    "visible tokens": {
        "targets": {
            "video": {"kind": "video_teacher", "model": VIDEO, **VISIBLE},
            "timm": {"kind": "timm", "vit": "vit_tiny_patch16_224", **VISIBLE},
        }
    },
    "per token": {
        "data": {"mask": None},
        "targets": {"video": {"kind": "video_teacher", "model": VIDEO, "head": "mlp", "hidden": 40, "tokens": "all"}},
    },
    "image model": {
        "model": IMAGE,
        "data": {"mask": {"kind": "random", "ratio": 0.75}},
        "targets": {"pixels": {"kind": "pixels", "normalize": "patch", "decoder": DECODER}},
    },
}


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"folder": "unused"},
            "model": VIDEO,
            "data": {"mask": {"ratio": 0.75}},
            "training": {"epochs": 2, "global_batch": 2, "base_lr": 1e-3, "warmup_epochs": 1},
            **sections,
        }
    )


def batch(made: Recipe, decoded: int) -> ClipBatch:
    side, frames = made.model.input_size, made.model.frames
    pixels = torch.zeros(CLIPS, frames, side, side, 3, dtype=torch.uint8)
    grid = made.model.grid[1]
    drawn = [draw_mask(np.random.default_rng(k), made.data.mask, made.model.grid) for k in range(CLIPS)]
    visible, masked = (torch.from_numpy(np.stack(tokens)) for tokens in zip(*drawn, strict=True))
    assert masked.shape[1] == decoded
    resized = {grid * 16: torch.zeros(CLIPS, frames, grid * 16, grid * 16, 3, dtype=torch.uint8)}
    return ClipBatch(pixels, visible, masked, torch.zeros(CLIPS), torch.zeros(CLIPS), resized)


@contextmanager
def counting(attention: Backward) -> Iterator[FlopCounterMode]:
    aten = torch.ops.aten
    on_cpus = {
        aten._scaled_dot_product_flash_attention_for_cpu: _forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    }
    backend = SDPBackend.FLASH_ATTENTION if attention == "fused" else SDPBackend.MATH
    with sdpa_kernel(backend), FlopCounterMode(display=False, custom_mapping=on_cpus) as counter:
        yield counter


def _forward(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def by_module(counter: FlopCounterMode) -> Counter[str]:
    return Counter({name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()})


@pytest.mark.parametrize(
    ("checkpointing", "attention"),
    [("none", "fused"), ("none", "unfused"), ("block", "fused"), ("attention", "unfused")],
)
@pytest.mark.parametrize("method", METHODS)
def test_every_part_counts_what_torch_counts(method: str, checkpointing: Checkpointing, attention: Backward) -> None:
    made = recipe(**METHODS[method])
    targets = build_targets(made, lambda name: init_teacher(made, name))
    student = Student.from_recipe(made, targets).train()
    set_gradient_checkpointing(student, checkpointing)
    workload = build_workload(made).in_batches_of(CLIPS)
    said = {part.part: part for part in part_flops(workload, checkpointing=checkpointing, attention=attention)}
    clips = batch(made, decoded=masked_tokens(made))

    with counting(attention) as counter:
        predictions = student(clips.pixels, clips.visible, clips.masked)
    there = by_module(counter)
    assert said["patch embedding"].forward * CLIPS == there["Student.encoder.patch_embed"]
    for name in targets:
        head = f"decoders.{name}" if f"{name} decoder" in said else f"heads.{name}"
        part = said[f"{name} decoder" if f"{name} decoder" in said else f"{name} head"]
        assert part.forward * CLIPS == there[f"Student.{head}"]

    trained = [part for name, part in said.items() if not name.endswith("teacher")]
    assert sum(part.forward for part in trained) * CLIPS == counter.get_total_flops()

    with counting(attention) as counter:
        sum(prediction.square().mean() for prediction in predictions.values()).backward()
    assert sum(part.backward + part.recomputed for part in trained) * CLIPS == counter.get_total_flops()
    assert (sum(part.recomputed for part in trained) > 0) == (checkpointing != "none")

    for name, target in targets.items():
        if isinstance(target, FrozenTeacher):
            with counting(attention) as counter, torch.no_grad():
                target.encode(clips, target.tokens(clips))
            assert said[f"{name} teacher"].forward * CLIPS == counter.get_total_flops()
            assert said[f"{name} teacher"].backward == 0


def test_teachers_of_students_with_masks_of_their_own_are_counted_at_all_tokens() -> None:
    average = {"kind": "momentum", "decoder": DECODER}
    dense = {**TARGETS["video"], "visible_weight": 0.5}
    made = recipe(
        targets={"image": TARGETS["image"], "video": dense, "average": average},
        students={"own": {"data": {"mask": {"ratio": 0.5}}}, "shared": {}},
    )
    for name, workload in build_workloads(made).items():
        alone = made.alone(name)
        said = {part.part: part.forward for part in part_flops(workload, checkpointing="none")}
        values = {part.name: part.predicted for part in workload.teachers}
        clips = batch(alone, decoded=masked_tokens(alone))
        for key, target in build_targets(alone, lambda key, alone=alone: init_teacher(alone, key)).items():
            assert isinstance(target, FrozenTeacher)
            seen = clips.unmasked(made.tokens) if target.prefetchable else clips
            with counting("fused") as counter, torch.no_grad():
                features = target.raw_features(seen)
            assert said[f"{key} teacher"] * CLIPS == counter.get_total_flops()
            assert values[f"{key} teacher"] * CLIPS == features.numel()


def test_projections_of_mask_tokens_are_counted_once_for_a_micro_batch() -> None:
    """256 tokens of width 32, of which 64 are visible: 192 mask tokens a clip, 256 positions for the micro batch."""
    made = recipe(targets={"pixels": TARGETS["pixels"]})
    workload = build_workload(made)
    clips = 4
    plain, shared = (
        next(part for part in part_flops(counted, checkpointing="none") if part.part == "pixels decoder")
        for counted in (workload, workload.in_batches_of(clips))
    )
    saved = 2 * (clips * 192 - 256) * 32 * 96
    assert clips * (plain.forward - shared.forward) == saved
    assert clips * (plain.backward - shared.backward) == 2 * saved
    assert workload.in_batches_of(1) == workload


def test_a_classifier_counts_what_torch_counts() -> None:
    overrides = ["--model.size", "null", "--classifier.classes", "7", "--data.copies", "1"]
    shape = [word for key, value in VIDEO.items() for word in (f"--model.{key}", str(value))]
    made = load_finetune_recipe("finetune/b_k400", [*overrides, *shape])
    model = Classifier(made.model, 7).train()
    parts = part_flops(build_workload(made), checkpointing="none")
    with counting("fused") as counter:
        scores = model(torch.zeros(CLIPS, 8, 64, 64, 3, dtype=torch.uint8))
    assert sum(part.forward for part in parts) * CLIPS == counter.get_total_flops()
    with counting("fused") as counter:
        scores.square().mean().backward()
    assert sum(part.backward for part in parts) * CLIPS == counter.get_total_flops()


def test_the_published_sizes_count_what_torch_counts() -> None:
    """ViT-H with patches of 14 in the image teacher; on the meta device nothing is computed."""
    made = load_recipe("distill/h_from_h")
    said = {part.part: part.forward for part in part_flops(build_workload(made), checkpointing="block")}
    with torch.device("meta"):
        targets = build_targets(made, lambda name: init_teacher(made, name))
        student = Student.from_recipe(made, targets)
        clip = torch.empty(1, 16, 224, 224, 3, dtype=torch.uint8)
        visible, masked = (torch.zeros(1, count, dtype=torch.int64) for count in (160, 1408))
        with FlopCounterMode(display=False) as counter:
            student(clip, visible, masked)
        assert sum(said[part] for part in ("patch embedding", "encoder", "image decoder", "video decoder")) == (
            counter.get_total_flops()
        )
        resized = {196: torch.empty(1, 16, 196, 196, 3, dtype=torch.uint8)}
        clips = ClipBatch(clip, visible, masked, torch.zeros(1), torch.zeros(1), resized)
        for name, target in targets.items():
            assert isinstance(target, FrozenTeacher)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                target.encode(clips, target.tokens(clips))
            assert said[f"{name} teacher"] == counter.get_total_flops()


def test_the_papers_figure_of_a_classifier() -> None:
    """Table 1: 180 G multiply-adds for ViT-B and one view."""
    parts = part_flops(build_workload(load_finetune_recipe("finetune/b_k400")), checkpointing="none")
    assert sum(part.forward for part in parts) / 2e9 == pytest.approx(180, abs=1)


@pytest.mark.parametrize("queries", [5, 24])
def test_a_block_that_serves_some_tokens_only(queries: int) -> None:
    """All tokens are projected and answer; some ask, of which some come out: written out, and counted by torch."""
    keys, width, hidden, heads = 24, 32, 128, 4
    block = BlockCost(keys=keys, queries=queries, outputs=queries - 1, width=width, hidden=hidden, heads=heads)
    tokens = torch.randn(1, keys, width, requires_grad=True)
    weights = {
        "qkv": (3 * width, width), "proj": (width, width),
        "up": (hidden, width), "down": (width, hidden),
    }  # fmt: skip
    w = {name: torch.randn(shape, requires_grad=True) for name, shape in weights.items()}
    with counting("fused") as counter:
        q, k, v = (tokens @ w["qkv"].t()).view(1, keys, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        asked = torch.nn.functional.scaled_dot_product_attention(q[:, :, :queries], k, v)
        attended = asked.transpose(1, 2).flatten(2)[:, 1:]
        out = torch.nn.functional.gelu((attended @ w["proj"].t()) @ w["up"].t()) @ w["down"].t()
    assert block.forward == counter.get_total_flops()
    with counting("fused") as counter:
        out.sum().backward()
    assert block.backward("fused") == counter.get_total_flops()


def test_pixels_need_no_gradient() -> None:
    assert LinearCost(3, 5, 7, input_grad=False).backward("fused") == LinearCost(3, 5, 7).backward("fused") // 2
