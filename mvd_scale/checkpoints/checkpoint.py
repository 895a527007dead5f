"""A model read from any format, in the names and shapes of `mvd_scale.models`."""

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
    """What a file does not tell. None: as the file, its `config.json` or the published tables say."""

    heads: int | None = None
    """Attention heads of the encoder."""

    decoder_heads: int | None = None
    """Attention heads of every decoder."""

    frames: int | None = None
    """Frames that the model shall take."""

    input_size: int | None = None
    """Side in pixels of the crop that the model shall take."""

    positions: Positions | None = None
    """Table that the model was trained with, for files that hold none."""


@dataclass(frozen=True)
class DecoderWeights:
    """One decoder: its shape, the channels it puts out and its tensors by the names of `Decoder`."""

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
    """Weights in the project's own names. Tensors keep the file's dtype and may be memory-mapped."""

    source: str
    """File or folder, for messages."""

    format: str
    """Which format it was read from."""

    model: ModelConfig
    """Shape of the encoder."""

    encoder: Mapping[str, Tensor]
    """By the names of `Encoder`; with `positions` (N, D) where the file's table is not the fixed one."""

    decoders: Mapping[str, DecoderWeights] = field(default_factory=dict)
    """By target name."""

    token_heads: Mapping[str, TokenHeadWeights] = field(default_factory=dict)
    """By target name."""

    head: Mapping[str, Tensor] = field(default_factory=dict)
    """`norm` and `head` of `Classifier`, `head` of `Detector`; empty without one."""

    leftovers: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that have no place in a model of ours, by the names of the file."""

    unused: tuple[str, ...] = ()
    """Known parts of the file that are left out on purpose."""

    class_names: tuple[str, ...] = ()
    """Of the classification head, in its order; empty where nobody told."""

    views: ViewsConfig | None = None
    """By which a classifier is tested; of a detector, the stride of its clips; None where nobody told."""

    detector: DetectorConfig | None = None
    """The head on boxes of people, whose tensors are in `head`; None if it is none."""

    @property
    def kind(self) -> Kind:
        """What the file can be loaded as."""
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
        """Outputs of the classification head."""
        return len(self.head["head.weight"]) if "head.weight" in self.head else None

    def tensors(self) -> dict[str, Tensor]:
        """Everything under the names of `Encoder`, `Student`, `Classifier` or `Detector`, by `kind`."""
        if self.kind == "encoder":
            return dict(self.encoder)
        flat = {f"encoder.{name}": tensor for name, tensor in self.encoder.items()}
        for target, decoder in self.decoders.items():
            flat |= {f"decoders.{target}.{name}": tensor for name, tensor in decoder.tensors.items()}
        for target, head in self.token_heads.items():
            flat |= {f"heads.{target}.{name}": tensor for name, tensor in head.tensors.items()}
        return flat | dict(self.head)
