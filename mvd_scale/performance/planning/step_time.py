"""Prediction of the time of an optimizer step by phase: arithmetic, launches of kernels, and communication.

Phases run one after the other: the time saved by teachers that run beside the student is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from mvd_scale.config.training import Checkpointing
from mvd_scale.performance.planning.communication import Collective, Phase
from mvd_scale.performance.planning.flops import PartFlops
from mvd_scale.performance.planning.hardware import AttentionKernel, Gpu, sustained_flops
from mvd_scale.performance.planning.parallelism import ParallelConfig
from mvd_scale.performance.planning.workload import Workload

LAUNCH = 5e-6
"""Seconds of host time per launch of a kernel: an assumption."""

KERNELS = 14
"""Number of kernels in a block's forward pass; the backward pass has twice as many."""

AGAIN: dict[Checkpointing, int] = {"none": 0, "block": KERNELS, "attention": 5}
"""Number of kernels per block that gradient checkpointing launches again."""

HOOK = {1: 50e-6, 2: 50e-6, 3: 115e-6}
"""Seconds of host time that DeepSpeed spends in the backward pass on each parameter tensor, by ZeRO stage.

A hook on every parameter counts the hooks that remain, copies the gradient into a bucket, and at stage 3 another one
fetches and releases the weights: `create_gradient_handling_hooks` (stage_1_and_2.py) and
`create_reduce_and_remove_grad_hooks` (stage3.py). Measured with DeepSpeed 0.19.8 on 300 small tensors, one rank and one
core of a Xeon: 45 to 69 us at stages 1 and 2, 115 to 160 us at stage 3."""

OPTIMIZER_BYTES = 30
"""Bytes of AdamW's memory traffic per parameter: reads gradient, master copy and two moments (16 bytes), writes the
last three and the 16-bit weight (14 bytes)."""


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of one phase in an optimizer step. Arithmetic, launching and communication overlap."""

    phase: Phase
    arithmetic: float

    launching: float
    """Host time: launches of kernels, and DeepSpeed's hooks."""

    communication: float

    student: str = ""
    """Name of the student, of one of several."""

    @property
    def label(self) -> str:
        """Name of the phase, after that of the student if there are several."""
        return f"{self.student}: {self.phase}" if self.student and self.phase != "teachers" else self.phase

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds of the phase by the resource that limits it."""
        if self.phase == "optimizer":
            # Updated weights are gathered after the update, so the two do not overlap.
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
        """Seconds of the phase."""
        return sum(self.bounds.values())


def phase_times(
    workload: Workload,
    flops: list[PartFlops],
    messages: list[Collective],
    parallel: ParallelConfig,
    gpu: Gpu,
    kernel: AttentionKernel,
    efficiency: float | None,
) -> list[PhaseTime]:
    """Predict the phases of an optimizer step with all of its micro batches.

    Raises:
        UserError: the GPU does not support a precision.
    """
    clips = parallel.micro * parallel.accumulation
    teachers = {part.name for part in workload.teachers}
    arithmetic: dict[Phase, float] = {"teachers": 0.0, "forward": 0.0, "backward": 0.0}
    for part in workload.teachers:
        rate = sustained_flops(gpu, parallel.teacher_precision, kernel, part.width, efficiency)
        fast = sustained_flops(gpu, parallel.quantized or parallel.teacher_precision, kernel, part.width, efficiency)
        arithmetic["teachers"] += clips * (part.products / fast + (part.forward - part.products) / rate)
    for told in flops:
        if told.part not in teachers:
            rate = sustained_flops(gpu, parallel.precision, kernel, told.width, efficiency)
            arithmetic["forward"] += clips * told.forward / rate
            arithmetic["backward"] += clips * (told.backward + told.recomputed) / rate
    arithmetic["optimizer"] = OPTIMIZER_BYTES * workload.parameters / parallel.world / gpu.bandwidth

    blocks = sum(len(part.blocks) for part in workload.trained)
    kernels: dict[Phase, int] = {
        "teachers": KERNELS * sum(len(part.blocks) for part in workload.teachers),
        "forward": blocks * KERNELS,
        "backward": blocks * (2 * KERNELS + AGAIN[parallel.checkpointing]),
        "optimizer": 0,
    }
    hooks: dict[Phase, float] = {"backward": HOOK[parallel.stage] * workload.tensors}
    return [
        PhaseTime(
            phase,
            spent,
            (LAUNCH * kernels[phase] + hooks.get(phase, 0.0)) * parallel.accumulation,
            sum(message.seconds for message in messages if message.phase == phase),
        )
        for phase, spent in arithmetic.items()
    ]
