"""Bootstrapped targets: features of an exponential moving average of the student's own encoder (Table 8)."""

from __future__ import annotations

from mvd_scale.config import MomentumTarget
from mvd_scale.targets.target import EncoderTeacher


class MomentumTeacher(EncoderTeacher):
    """Target whose teacher is the moving average; it sees the whole, unmasked clip.

    `training.momentum` updates the average after every optimizer step.
    """

    config: MomentumTarget
    # Its features depend on the average after the current step, so they cannot be computed in advance.
    prefetchable = False
