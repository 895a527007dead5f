"""Bootstrapped targets: features of a moving average of the student's own encoder (Table 8)."""

from __future__ import annotations

from mvd_scale.config import MomentumTarget
from mvd_scale.targets.target import EncoderTeacher


class Momentum(EncoderTeacher):
    """The average sees the whole clip, unmasked. `training.momentum` moves it after every optimizer step."""

    config: MomentumTarget
    # The next step's average is not there yet.
    ahead = False
