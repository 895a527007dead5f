"""Targets that the student predicts, one file per kind of target, and the loss over them (Eq. 3)."""

from mvd_scale.targets.build import build_targets
from mvd_scale.targets.objective import MaskedDistillation
from mvd_scale.targets.target import FrozenTeacher, Target

__all__ = ["FrozenTeacher", "MaskedDistillation", "Target", "build_targets"]
