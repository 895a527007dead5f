"""Mixup and cutmix of clips in a micro batch, as published for fine-tuning ("batch mode").

Legend: B clips, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn import functional as F

from mvd_scale.config.finetune import MixConfig


def soft_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """One-hot labels with label smoothing: int64 (B,) to float32 (B, C); `smoothing` is spread over all classes."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix_clips(pixels: Tensor, targets: Tensor, mix: MixConfig) -> tuple[Tensor, Tensor]:
    """Mix each clip with the clip at the mirrored position in the batch, all with the same random ratio.

    Mixup adds the two clips with weights lambda and 1 - lambda. Cutmix pastes a box of the other clip, the same in all
    frames, and sets 1 - lambda to the share of its area. Random numbers come from torch's generator on the host.

    Args:
        pixels: uint8 (B, T, H, W, 3).
        targets: float32 (B, C); each row sums to 1.
        mix: probabilities and strengths.

    Returns:
        clips (B, T, H, W, 3), uint8, or float32 in 0..1 after mixup; and mixed targets, float32 (B, C).
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
    """Draw top, bottom, left, right of a box with 1 - share of the frame's area and the frame's aspect ratio.

    The box is cut off at the border of the frame, so its area may be smaller.
    """
    part = (1 - share) ** 0.5
    high, wide = int(height * part), int(width * part)
    row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
    top, bottom = max(row - high // 2, 0), min(row + high // 2, height)
    left, right = max(column - wide // 2, 0), min(column + wide // 2, width)
    return top, bottom, left, right
