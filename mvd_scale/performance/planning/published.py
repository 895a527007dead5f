"""Comparison of a plan with the run time that the paper measured (Table 6), and the parts of the difference."""

from __future__ import annotations

from dataclasses import dataclass

from mvd_scale.performance.planning.hardware import Gpu
from mvd_scale.performance.planning.layers import BlockCost
from mvd_scale.performance.planning.workload import Workload

VIDEOS = 240_000
"""Number of training videos of Kinetics-400 in the paper."""

GPU, RANKS = "V100", 32

HOURS = {"distill/b_from_b": 57.0}
"""Hours of a whole run on 32 V100 by recipe."""

LOADED = VIDEOS * 1600 / (214 * 3600)
"""Clips/s of VideoMAE ViT-B on the same GPUs (1600 epochs in 214 hours). It needs a fifth of MVD's FLOPs per clip and
is not faster, so this rate is taken to be the limit of the published data loader."""

SCORE_FORWARD, SCORE_BACKWARD = 16, 32
"""Bytes of memory traffic per score of unfused attention under autocast, in the forward and in the backward pass: a
product in 16 bits, its softmax in float32, and the softmax converted to 16 bits."""


@dataclass(frozen=True)
class PublishedComparison:
    """Hours of the whole run, published and predicted."""

    published: float
    """Hours that the paper reports."""

    computing: float
    """Hours that the plan predicts without decoding."""

    decoding: float
    """Hours that decoding by NVDEC adds; the published run decoded on CPUs."""

    plain_attention: float
    """Hours that attention without a fused kernel adds, because its scores are written to memory."""

    loading: float
    """Hours that the published loader needs for the clips of the run."""

    unexplained: float
    """Published hours minus the longer one of computing (with unfused attention) and loading."""

    def to_lines(self) -> list[str]:
        """Format as lines of text, one per figure."""
        return [
            f"  published (Table 6)       {self.published:8.1f} h on {RANKS} {GPU}",
            f"  this plan, computing      {self.computing:8.1f} h",
            f"    decoding by NVDEC       {self.decoding:+8.1f} h; the published run decodes on CPUs",
            f"    unfused attention       {self.plain_attention:+8.1f} h; as published, with float32 scores in memory",
            f"  the published loader      {self.loading:8.1f} h at {LOADED:.0f} clips/s, the rate of VideoMAE (214 h)",
            f"  unexplained               {self.unexplained:+8.1f} h above the longer of computing and loading",
        ]


def compare_with_paper(
    recipe: str, gpu: Gpu, gpus: int, workload: Workload, clips: int, hours: float, computing: float
) -> PublishedComparison | None:
    """Compare a plan with the published run; None if the paper has no figure for it.

    Args:
        recipe: name of the recipe.
        gpu: type of GPU of the plan.
        gpus: number of GPUs of the plan.
        workload: models of the step.
        clips: number of clips of the whole run.
        hours: hours that the plan predicts.
        computing: hours that the plan predicts if decoding takes no time.
    """
    if recipe not in HOURS or (gpu.name, gpus) != (GPU, RANKS):
        return None
    plain = clips * plain_attention_seconds(workload, gpu) / gpus / 3600
    loading = clips / LOADED / 3600
    return PublishedComparison(
        published=HOURS[recipe],
        computing=computing,
        decoding=hours - computing,
        plain_attention=plain,
        loading=loading,
        unexplained=HOURS[recipe] - max(computing + plain, loading),
    )


def plain_attention_seconds(workload: Workload, gpu: Gpu) -> float:
    """Seconds per clip of the memory traffic of unfused attention's scores."""
    trained = sum(_scores(block) for part in workload.trained for block in part.blocks)
    frozen = sum(_scores(block) for part in workload.teachers for block in part.blocks)
    return ((SCORE_FORWARD + SCORE_BACKWARD) * trained + SCORE_FORWARD * frozen) / gpu.bandwidth


def _scores(block: BlockCost) -> int:
    return block.sequences * block.heads * block.queries * block.keys
