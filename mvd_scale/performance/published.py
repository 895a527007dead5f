"""What the paper measured (Table 6), beside what a plan says of the same run, and what lies between them."""

from __future__ import annotations

from dataclasses import dataclass

from mvd_scale.performance.hardware import Gpu
from mvd_scale.performance.layers import Block
from mvd_scale.performance.parts import Workload

VIDEOS = 240_000
"""Training videos of Kinetics-400, as the paper counts them."""

GPU, RANKS = "V100", 32

HOURS = {"distill/b_from_b": 57.0}
"""Hours of a whole run on 32 V100, by recipe."""

LOADED = VIDEOS * 1600 / (214 * 3600)
"""Clips/s of VideoMAE ViT-B on the same GPUs (1600 epochs in 214 hours). It has a fifth of MVD's arithmetic a clip and
is no faster: what it reached is what the loader gave."""

SCORE_FORWARD, SCORE_BACKWARD = 16, 32
"""Bytes that plain attention under autocast moves for a score: a 16-bit product, its softmax in float32, that one in 16
bits again, and the same backwards."""


@dataclass(frozen=True)
class Comparison:
    """Hours of the whole run."""

    published: float

    computing: float
    """That this plan needs for everything but decoding."""

    decoding: float
    """That decoding by NVDEC adds; the published run decoded on CPUs."""

    plain_attention: float
    """That attention without a fused kernel adds: its scores go through memory."""

    loading: float
    """Of the run's clips at the rate of the published loader."""

    unexplained: float
    """What remains of the published time above the longer of computing, with plain attention, and loading."""

    def to_lines(self) -> list[str]:
        """Text, one fact a line."""
        return [
            f"  published (Table 6)       {self.published:8.1f} h on {RANKS} {GPU}",
            f"  this plan, computing      {self.computing:8.1f} h",
            f"    decoding by NVDEC       {self.decoding:+8.1f} h; the published run decodes on CPUs",
            f"    plain attention         {self.plain_attention:+8.1f} h; as published, float32 scores through memory",
            f"  the published loader      {self.loading:8.1f} h at {LOADED:.0f} clips/s, what VideoMAE came to (214 h)",
            f"  unexplained               {self.unexplained:+8.1f} h over the longer of computing so and loading",
        ]


def compare(
    recipe: str, gpu: Gpu, gpus: int, work: Workload, clips: int, hours: float, computing: float
) -> Comparison | None:
    """The published run beside a plan; None where the paper has no figure for it.

    Args:
        recipe: its name.
        gpu: of the plan.
        gpus: likewise.
        work: the parts of the step.
        clips: of the whole run.
        hours: that the plan predicts.
        computing: those among them that remain if decoding takes no time.
    """
    if recipe not in HOURS or (gpu.name, gpus) != (GPU, RANKS):
        return None
    plain = clips * plain_attention_seconds(work, gpu) / gpus / 3600
    loading = clips / LOADED / 3600
    return Comparison(
        published=HOURS[recipe],
        computing=computing,
        decoding=hours - computing,
        plain_attention=plain,
        loading=loading,
        unexplained=HOURS[recipe] - max(computing + plain, loading),
    )


def plain_attention_seconds(work: Workload, gpu: Gpu) -> float:
    """Seconds a clip that the scores of plain attention spend on their way to memory and back."""
    trained = sum(_scores(block) for part in work.trained for block in part.blocks)
    frozen = sum(_scores(block) for part in work.teachers for block in part.blocks)
    return ((SCORE_FORWARD + SCORE_BACKWARD) * trained + SCORE_FORWARD * frozen) / gpu.bandwidth


def _scores(block: Block) -> int:
    return block.sequences * block.heads * block.queries * block.keys
