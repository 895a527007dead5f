"""The time of an optimizer step by phase: arithmetic, the launching of kernels, and what communication adds.

Phases follow each other: what is gained by teachers that work beside the student is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from mvd_scale.config.training import Checkpointing
from mvd_scale.performance.communication import Collective, Phase
from mvd_scale.performance.flops import PartFlops
from mvd_scale.performance.hardware import AttentionKernel, Gpu, sustained
from mvd_scale.performance.parts import Workload
from mvd_scale.performance.setting import Setting

LAUNCH = 5e-6
"""Seconds that the host takes to launch a kernel: an assumption."""

KERNELS = 14
"""Kernels of a block's forward pass; the backward pass has twice as many."""

AGAIN: dict[Checkpointing, int] = {"none": 0, "block": KERNELS, "attention": 5}
"""Kernels of a block that gradient checkpointing launches again."""

OPTIMIZER_BYTES = 30
"""Bytes that AdamW moves for a parameter: gradient, master copy and two moments read, the last three and the 16-bit
weight written."""


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of one phase in an optimizer step. Arithmetic, launching and communication overlap."""

    phase: Phase
    arithmetic: float
    launching: float
    communication: float

    @property
    def bounds(self) -> dict[str, float]:
        """The seconds that the phase takes by the resource that bounds them."""
        if self.phase == "optimizer":
            # Updated weights are gathered after the update.
            return {"arithmetic": self.arithmetic, "communication": self.communication}
        spent = {
            "arithmetic": self.arithmetic,
            "launching of kernels": self.launching,
            "communication": self.communication,
        }
        slowest = max(spent, key=lambda resource: spent[resource])
        return {slowest: spent[slowest]}

    @property
    def seconds(self) -> float:
        """That the phase takes."""
        return sum(self.bounds.values())


def phase_times(
    work: Workload,
    flops: list[PartFlops],
    messages: list[Collective],
    setting: Setting,
    gpu: Gpu,
    kernel: AttentionKernel,
    efficiency: float | None,
) -> list[PhaseTime]:
    """The phases of an optimizer step with all of its micro batches.

    Raises:
        UserError: the GPU lacks a precision.
    """
    clips = setting.micro * setting.accumulation
    teachers = {part.name for part in work.teachers}
    arithmetic: dict[Phase, float] = {"teachers": 0.0, "forward": 0.0, "backward": 0.0}
    for part in work.teachers:
        rate = sustained(gpu, setting.teacher_precision, kernel, part.width, efficiency)
        fast = sustained(gpu, setting.eight_bit or setting.teacher_precision, kernel, part.width, efficiency)
        arithmetic["teachers"] += clips * (part.products / fast + (part.forward - part.products) / rate)
    for told in flops:
        if told.part not in teachers:
            rate = sustained(gpu, setting.precision, kernel, told.width, efficiency)
            arithmetic["forward"] += clips * told.forward / rate
            arithmetic["backward"] += clips * (told.backward + told.recomputed) / rate
    arithmetic["optimizer"] = OPTIMIZER_BYTES * work.parameters / setting.world / gpu.bandwidth

    blocks = sum(len(part.blocks) for part in work.trained)
    kernels: dict[Phase, int] = {
        "teachers": KERNELS * sum(len(part.blocks) for part in work.teachers),
        "forward": blocks * KERNELS,
        "backward": blocks * (2 * KERNELS + AGAIN[setting.checkpointing]),
        "optimizer": 0,
    }
    return [
        PhaseTime(
            phase,
            spent,
            LAUNCH * kernels[phase] * setting.accumulation,
            sum(message.seconds for message in messages if message.phase == phase),
        )
        for phase, spent in arithmetic.items()
    ]
