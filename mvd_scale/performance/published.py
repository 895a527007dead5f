"""What the paper measured (Table 6), beside what a plan says of the same run, and what lies between them."""

from __future__ import annotations

from dataclasses import dataclass

from mvd_scale.performance.hardware import Gpu
from mvd_scale.performance.layers import Block
from mvd_scale.performance.parts import Workload

VIDEOS = 240_000
"""Training videos of Kinetics-400, as the paper counts them."""

GPU, RANKS = "V100", 32

HOURS = {"distill/b_from_b": 57.0, "pretrain/videomae_b_k400": 214.0}
"""Hours of a whole run on 32 V100, by recipe."""

FASTEST = VIDEOS * 1600 / (214 * 3600)
"""Clips/s of the fastest run of the paper, VideoMAE ViT-B: what its loader gave at the least."""

SCORE_FORWARD, SCORE_BACKWARD = 16, 32
"""Bytes that plain attention under autocast moves for a score: a 16-bit product, its softmax in float32, that one in 16
bits again, and the same backwards."""


@dataclass(frozen=True)
class Comparison:
    """Hours of the whole run."""

    published: float

    predicted: float
    """Of this plan."""

    plain_attention: float
    """That attention without a fused kernel adds: its scores go through memory."""

    loading: float
    """Of the run's clips at the rate of VideoMAE, the fastest run of the paper, whose arithmetic takes far less."""

    unexplained: float
    """What remains above the longer of arithmetic and loading, which overlap."""

    def to_lines(self) -> list[str]:
        """Text, one fact a line."""
        return [
            f"  published (Table 6)       {self.published:8.1f} h on {RANKS} {GPU}",
            f"  this plan                 {self.predicted:8.1f} h",
            f"  plain attention           {self.plain_attention:+8.1f} h: softmax in float32, scores through memory",
            f"  loading                   {self.loading:8.1f} h at {FASTEST:.0f} clips/s, what VideoMAE's 214 h came to; "
            "beside the arithmetic",
            f"  not explained             {self.unexplained:+8.1f} h above the longer of the two",
        ]


def compare(recipe: str, gpu: Gpu, gpus: int, work: Workload, clips: int, hours: float) -> Comparison | None:
    """The published run beside a plan; None where the paper has no figure for it.

    Args:
        recipe: its name.
        gpu: of the plan.
        gpus: likewise.
        work: the parts of the step.
        clips: of the whole run.
        hours: that the plan predicts.
    """
    if recipe not in HOURS or (gpu.name, gpus) != (GPU, RANKS):
        return None
    plain = clips * plain_attention_seconds(work, gpu) / gpus / 3600
    loading = clips / FASTEST / 3600
    return Comparison(
        published=HOURS[recipe],
        predicted=hours,
        plain_attention=plain,
        loading=loading,
        unexplained=HOURS[recipe] - max(hours + plain, loading),
    )


def plain_attention_seconds(work: Workload, gpu: Gpu) -> float:
    """Seconds a clip that the scores of plain attention spend on their way to memory and back."""
    trained = sum(_scores(block) for part in work.trained for block in part.blocks)
    frozen = sum(_scores(block) for part in work.teachers for block in part.blocks)
    return ((SCORE_FORWARD + SCORE_BACKWARD) * trained + SCORE_FORWARD * frozen) / gpu.bandwidth


def _scores(block: Block) -> int:
    return block.sequences * block.heads * block.queries * block.keys
