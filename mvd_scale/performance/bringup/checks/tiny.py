"""A tiny student with tiny teachers, whose steps take milliseconds on any device.

Legend: B clips, V visible, M masked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mvd_scale.config import ModelConfig, Recipe
from mvd_scale.config.training import Checkpointing
from mvd_scale.data.batch import ClipBatch
from mvd_scale.models import Encoder

VIDEO = {"width": 320, "depth": 1, "heads": 5, "frames": 4, "input_size": 32}
IMAGE = {**VIDEO, "frames": 1, "tubelet": 1, "positions": "sincos2d", "class_token": True}
DECODER = {"width": 32, "depth": 1, "heads": 2}
GLOBAL_BATCH = 8

FROZEN: dict[str, Any] = {
    "image": {"kind": "image_teacher", "decoder": DECODER},
    "video": {"kind": "video_teacher", "decoder": DECODER},
    "pixels": {"kind": "pixels", "decoder": DECODER},
}
"""Targets: both teachers, and pixels."""


def tiny_recipe(
    stage: str,
    precision: str,
    sharding: str,
    micro_batch: int,
    targets: dict[str, Any] = FROZEN,
    checkpointing: Checkpointing = "none",
    *,
    together: bool = False,
) -> Recipe:
    """Make a recipe on the CPU with steps of `GLOBAL_BATCH` clips.

    Args:
        stage: DeepSpeed file of the student.
        precision: precision of the student.
        sharding: `teachers.sharding`.
        micro_batch: clips of a micro batch.
        targets: section `targets`.
        checkpointing: `training.gradient_checkpointing`.
        together: `training.batch_decoders`.
    """
    return Recipe.model_validate(
        {
            "run": {"folder": "unused"},
            "device": "cpu",
            "model": VIDEO,
            "data": {"mask": {"ratio": 0.5}},
            "targets": targets,
            "training": {
                "epochs": 10,
                "global_batch": GLOBAL_BATCH,
                "micro_batch": micro_batch,
                "base_lr": 1e-1,
                "warmup_epochs": 1,
                "precision": precision,
                "deepspeed": stage,
                "clip_grad": 1.0,
                "gradient_checkpointing": checkpointing,
                "batch_decoders": together,
            },
            "teachers": {"sharding": sharding},
        }
    )


def tiny_teacher(name: str) -> Encoder:
    """Build the teacher of a target, always with the same weights."""
    torch.manual_seed(5)
    return Encoder(ModelConfig.model_validate(IMAGE if name == "image" else VIDEO), final_norm=False)


def global_batch(step: int, *, poisoned: bool) -> ClipBatch:
    """Make the clips of an optimizer step on the CPU; the last one of a poisoned batch gives non-finite gradients."""
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (GLOBAL_BATCH, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    if poisoned:
        pixels = pixels.float()
        pixels[-1] = float("nan")
    patches = torch.stack([torch.randperm(4, generator=generator) for _ in range(GLOBAL_BATCH)])
    visible, masked = (torch.cat([p, p + 4], 1).sort(1).values for p in (patches[:, :2], patches[:, 2:]))
    return ClipBatch(pixels, visible, masked, torch.zeros(GLOBAL_BATCH), torch.zeros(GLOBAL_BATCH))


def held_at_rest(module: nn.Module) -> int:
    """Count the elements of parameters that this rank keeps between two forward passes."""
    return sum(p.numel() + (p.ds_tensor.numel() if hasattr(p, "ds_tensor") else 0) for p in module.parameters())
