"""Masked Video Distillation at scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "load_classifier"]

if TYPE_CHECKING:
    from mvd_scale.evaluation.predict import load_classifier
else:

    def __getattr__(name: str) -> object:
        # Importing the package must not import torch: DALI's workers and `mvd-scale --help` start faster without it.
        if name != "load_classifier":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from mvd_scale.evaluation.predict import load_classifier

        return load_classifier
