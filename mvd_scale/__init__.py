"""Masked Video Distillation at scale."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "from_pretrained", "load_classifier"]

if TYPE_CHECKING:
    from mvd_scale.checkpoints.hub import from_pretrained
    from mvd_scale.evaluation.predict import load_classifier
else:
    _PLACES = {"from_pretrained": "mvd_scale.checkpoints.hub", "load_classifier": "mvd_scale.evaluation.predict"}

    def __getattr__(name: str) -> object:
        # Importing the package must not import torch: DALI's workers and `mvd-scale --help` start faster without it.
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_PLACES[name]), name)
