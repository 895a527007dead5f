"""Vision transformers of the paper as plain torch modules, without training code."""

from mvd_scale.models.classifier import Classifier
from mvd_scale.models.decoder import Decoder
from mvd_scale.models.encoder import Encoder
from mvd_scale.models.student import Student

__all__ = ["Classifier", "Decoder", "Encoder", "Student"]
