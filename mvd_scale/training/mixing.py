"""Mixup and cutmix of whole clips in a micro batch, as published for fine-tuning ("batch mode").

Legend: B clips, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn import functional as F

from mvd_scale.config.finetune import MixConfig


def soft_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """One for the label and nothing for the others, less the share that is spread over all: float32 (B, C)."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix_clips(pixels: Tensor, targets: Tensor, mix: MixConfig) -> tuple[Tensor, Tensor]:
    """Mix each clip with the one at the other end of the batch, all by one draw of torch's generator of the host.

    Mixup adds the two in shares of lambda and 1 - lambda; cutmix pastes a box of the other one, the same in all frames,
    and counts the share of its area.

    Args:
        pixels: uint8 (B, T, H, W, 3).
        targets: float32 (B, C), each row sums to 1.
        mix: how strongly.

    Returns:
        uint8, or float32 in 0..1 where clips were added, (B, T, H, W, 3); and float32 (B, C).
    """
    if float(torch.rand(())) >= mix.probability:
        return pixels, targets
    cuts = bool(mix.cutmix) and (not mix.mixup or float(torch.rand(())) < mix.switch)
    alpha = mix.cutmix if cuts else mix.mixup
    share = float(Beta(torch.tensor(alpha), torch.tensor(alpha)).sample())
    if cuts:
        height, width = pixels.shape[2:4]
        top, bottom, left, right = _box(height, width, share)
        share = 1 - (bottom - top) * (right - left) / (height * width)
        mixed = pixels.clone()
        mixed[:, :, top:bottom, left:right] = pixels.flip(0)[:, :, top:bottom, left:right]
    else:
        clips = pixels.float() / 255
        mixed = torch.lerp(clips.flip(0), clips, share)
    return mixed, torch.lerp(targets.flip(0), targets, share)


def _box(height: int, width: int, share: float) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a box of the frame's shape and 1 - share of its area, cut off at the border."""
    part = (1 - share) ** 0.5
    high, wide = int(height * part), int(width * part)
    row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
    top, bottom = max(row - high // 2, 0), min(row + high // 2, height)
    left, right = max(column - wide // 2, 0), min(column + wide // 2, width)
    return top, bottom, left, right
