"""Vision transformers of the paper as plain torch modules, without training code."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["Classifier", "Decoder", "Encoder", "Student"]

if TYPE_CHECKING:
    from mvd_scale.models.classifier import Classifier
    from mvd_scale.models.decoder import Decoder
    from mvd_scale.models.encoder import Encoder
    from mvd_scale.models.student import Student
else:

    def __getattr__(name: str) -> object:
        # Blocks can be imported without the packages that a recipe needs: the bring-up of a GPU has torch alone.
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{name.lower()}"), name)
