"""What the student predicts: one file per target, and the loss of Eq. 3 over them."""

from mvd_scale.targets.build import build_targets
from mvd_scale.targets.objective import MaskedDistillation
from mvd_scale.targets.target import FrozenTeacher, Target

__all__ = ["FrozenTeacher", "MaskedDistillation", "Target", "build_targets"]
