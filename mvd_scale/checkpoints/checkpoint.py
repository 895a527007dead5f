"""`Checkpoint`: a model read from any format, in the names and shapes of `mvd_scale.models`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from mvd_scale.config import DecoderConfig, DetectorConfig, ModelConfig, TokenHeadConfig
from mvd_scale.config.data import ViewsConfig
from mvd_scale.config.model import Positions

Kind = Literal["encoder", "student", "classifier", "detector"]


@dataclass(frozen=True)
class Hints:
    """Facts that a file does not state. None: the file, its `config.json` or the published tables decide."""

    heads: int | None = None
    """Attention heads of the encoder."""

    decoder_heads: int | None = None
    """Attention heads of every decoder."""

    frames: int | None = None
    """Frames per clip of the adapted model."""

    input_size: int | None = None
    """Side in pixels of the square crop of the adapted model."""

    positions: Positions | None = None
    """Position table that the model was trained with, for files that contain none."""

    key: str | None = None
    """Entry that holds the weights, in a file of several models."""


@dataclass(frozen=True)
class DecoderWeights:
    """One decoder: its shape, the number of its output channels and its tensors by the names of `Decoder`."""

    config: DecoderConfig
    channels: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class TokenHeadWeights:
    """One head on the encoder's tokens: its shape, its output channels and its tensors by the names of `TokenHead`."""

    config: TokenHeadConfig
    channels: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Weights under the names of this project. Tensors keep the file's dtype and may be memory-mapped."""

    source: str
    """Path of the file or folder, for messages."""

    format: str
    """Name of the format that it was read from."""

    model: ModelConfig
    """Shape of the encoder."""

    encoder: Mapping[str, Tensor]
    """Tensors by the names of `Encoder`; includes `positions` (N, D) if the file's table is not a fixed one."""

    decoders: Mapping[str, DecoderWeights] = field(default_factory=dict)
    """Decoders by target name."""

    token_heads: Mapping[str, TokenHeadWeights] = field(default_factory=dict)
    """Token heads by target name."""

    head: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of `norm` and `head` of `Classifier` or of `head` of `Detector`; empty for other models."""

    unexpected: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors without a counterpart in `mvd_scale.models`, by the names of the file."""

    unused: tuple[str, ...] = ()
    """Names of known tensors of the file that are deliberately not loaded."""

    class_names: tuple[str, ...] = ()
    """Class names in the order of the classification head's outputs; empty if unknown."""

    views: ViewsConfig | None = None
    """Views by which a classifier is evaluated (a detector uses only the stride of the clips); None if unknown."""

    detector: DetectorConfig | None = None
    """Shape of the detection head on boxes of people, whose tensors are in `head`; None if it is no detector."""

    @property
    def kind(self) -> Kind:
        """Kind of the most complete model that the tensors can be loaded into."""
        if self.decoders or self.token_heads:
            return "student"
        if self.detector is not None:
            return "detector"
        return "classifier" if self.head else "encoder"

    @property
    def final_norm(self) -> bool:
        """Whether the encoder has a norm after its last block."""
        return "norm.weight" in self.encoder

    @property
    def classes(self) -> int | None:
        """Number of outputs of the classification head; None without one."""
        return len(self.head["head.weight"]) if "head.weight" in self.head else None

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by the names of the module of `kind`: `Encoder`, `Student`, `Classifier` or `Detector`."""
        if self.kind == "encoder":
            return dict(self.encoder)
        flat = {f"encoder.{name}": tensor for name, tensor in self.encoder.items()}
        for target, decoder in self.decoders.items():
            flat |= {f"decoders.{target}.{name}": tensor for name, tensor in decoder.tensors.items()}
        for target, head in self.token_heads.items():
            flat |= {f"heads.{target}.{name}": tensor for name, tensor in head.tensors.items()}
        return flat | dict(self.head)
