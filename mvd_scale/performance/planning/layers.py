"""Cost model of linear layers and transformer blocks: FLOPs, memory traffic, and bytes saved for the backward pass.

FLOPs are counted as by `torch.utils.flop_counter`: matrix products and attention only, 2 per multiply-add.

Legend: N tokens with keys and values, Q tokens with queries, D width, F hidden width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mvd_scale.config.training import Checkpointing

Backward = Literal["fused", "unfused"]
"""`fused` attention (flash-attn, SDPA's kernels) recomputes the scores in its backward pass; `unfused` stores them."""


@dataclass(frozen=True)
class LinearCost:
    """Linear layer that is applied to `rows` rows of every clip."""

    rows: float
    """A clip's share of rows that several clips have in common may be a fraction."""

    inputs: int
    outputs: int

    input_grad: bool = True
    """Whether its input needs a gradient; pixels need none."""

    input_kept: bool = True
    """Whether its input counts as saved here; decoders share the encoder's output, which must be counted once."""

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass per clip."""
        return 2 * self.rows * self.inputs * self.outputs

    def backward(self, attention: Backward) -> float:
        """FLOPs of the backward pass per clip: one product for the weight's gradient, one for the input's."""
        return (1 + self.input_grad) * self.forward

    def saved(self, size: int) -> int:
        """Bytes per clip saved for the backward pass, of elements of `size` bytes."""
        return round(size * self.rows * self.inputs) if self.input_kept else 0


@dataclass(frozen=True)
class ElementwiseCost:
    """Norm or activation: counts no FLOPs, but saves its input."""

    rows: float
    width: int

    statistics: int = 0
    """Float32 values saved per row."""

    passed: int = 2
    """Number of tensors (rows, width) that the forward pass reads and writes."""

    passed_back: int = 3
    """Number of tensors that the backward pass reads and writes: gradient and input, and the input's gradient."""

    forward = 0

    def backward(self, attention: Backward) -> int:
        """Return 0: elementwise operations are not counted."""
        return 0

    def saved(self, size: int) -> int:
        """Bytes per clip saved for the backward pass, of elements of `size` bytes."""
        return round(self.rows * (size * self.width + 4 * self.statistics))


@dataclass(frozen=True)
class AttentionCost:
    """Attention of a block: the scores, their softmax, and their product with the values."""

    keys: int
    """Tokens with keys and values per sequence, N."""

    queries: int
    """Tokens with queries per sequence, Q."""

    width: int
    heads: int

    sequences: int = 1
    """Sequences per clip."""

    @property
    def forward(self) -> int:
        """FLOPs of the two products of the forward pass per clip."""
        return 4 * self.sequences * self.queries * self.keys * self.width

    def backward(self, attention: Backward) -> int:
        """FLOPs of the backward pass per clip: two products for each product of the forward pass.

        `fused` attention also recomputes the first of its two products, the scores.
        """
        return 2 * self.forward + (self.forward // 2 if attention == "fused" else 0)


@dataclass(frozen=True)
class BlockCost:
    """Transformer block over sequences of tokens.

    All tokens are normalised and projected to queries, keys and values, unless clips share some. Attention is computed
    for `queries` tokens, the output projection and the MLP for `outputs` tokens.
    """

    keys: int
    """Tokens with keys and values per sequence, N."""

    queries: int
    """Tokens with queries per sequence, Q."""

    outputs: int
    """Output tokens per sequence."""

    width: int
    hidden: int
    heads: int

    sequences: int = 1
    """Sequences per clip; for an image model every front frame is a sequence."""

    shared_projections: float | None = None
    """Tokens per sequence that are normalised and projected, if the clips of a batch share some: a clip's own, and its
    share of the others. None if every clip computes all of its own."""

    @property
    def projected(self) -> float:
        """Tokens per sequence that are normalised and projected."""
        return self.keys if self.shared_projections is None else self.shared_projections

    def weights(self, checkpointing: Checkpointing) -> int:
        """Number of weights of the linear layers that checkpointing does not recompute."""
        attention, mlp = 4 * self.width**2, 2 * self.width * self.hidden
        return {"none": attention + mlp, "attention": mlp, "block": 0}[checkpointing]

    @property
    def linear_layers(self) -> tuple[LinearCost, LinearCost, LinearCost, LinearCost]:
        """Linear layers: packed projection, output projection, and both layers of the MLP."""
        projected, outputs = self.sequences * self.projected, self.sequences * self.outputs
        return (
            LinearCost(projected, self.width, 3 * self.width),
            LinearCost(outputs, self.width, self.width),
            LinearCost(outputs, self.width, self.hidden),
            LinearCost(outputs, self.hidden, self.width),
        )

    @property
    def attention(self) -> AttentionCost:
        """Attention between the packed and the output projection."""
        return AttentionCost(self.keys, self.queries, self.width, self.heads, self.sequences)

    @property
    def elementwise_layers(self) -> tuple[ElementwiseCost, ...]:
        """First norm, residual sum with its norm, activation, and second residual sum.

        The gradient of the residual connection is added in the backward pass of the norm beside it.
        """
        projected, outputs = self.sequences * self.projected, self.sequences * self.outputs
        return (
            ElementwiseCost(projected, self.width, 2, passed=2, passed_back=4),
            ElementwiseCost(outputs, self.width, 2, passed=4, passed_back=4),
            ElementwiseCost(outputs, self.hidden),
            ElementwiseCost(outputs, self.width, passed=3, passed_back=0),
        )

    @property
    def products(self) -> float:
        """FLOPs of the linear layers in the forward pass per clip."""
        return sum(layer.forward for layer in self.linear_layers)

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass per clip."""
        return self.products + self.attention.forward

    def backward(self, attention: Backward) -> float:
        """FLOPs of the backward pass per clip: two products for each product of the forward pass, and attention's."""
        return 2 * self.products + self.attention.backward(attention)

    def recomputed(self, checkpointing: Checkpointing) -> float:
        """FLOPs per clip that gradient checkpointing adds.

        Torch stops recomputing at the last tensor that the backward pass needs. For a block that is the input of the
        MLP's second layer; for the attention half, the input of the output projection.
        """
        if checkpointing == "block":
            return self.forward - self.linear_layers[-1].forward
        return self.linear_layers[0].forward + self.attention.forward if checkpointing == "attention" else 0

    def saved(self, size: int, checkpointing: Checkpointing = "none") -> int:
        """Bytes per clip saved for the backward pass, of elements of `size` bytes; statistics are float32.

        Saved are: the input; in the attention half the normalised input, queries, keys and values of all tokens, and
        attention's output of the tokens with queries; in the MLP half, for output tokens, the residual sum, its norm,
        and the hidden values before and after the activation; statistics of the norms and of the softmax.
        """
        rows = self.projected + 3 * self.keys + self.queries
        attention = size * rows * self.width + 4 * (2 * self.projected + self.heads * self.queries)
        mlp = self.outputs * (size * 2 * (self.width + self.hidden) + 4 * 2)
        kept = {"none": attention + mlp, "attention": mlp, "block": 0}[checkpointing]
        return self.entry(size) + round(self.sequences * kept)

    def entry(self, size: int) -> int:
        """Bytes of the block's input per clip."""
        return round(self.sequences * size * self.projected * self.width)

    def inference(self, size: int) -> int:
        """Bytes per clip at the peak of a forward pass without gradients.

        The peak is in the MLP: input, residual sum, norm, and hidden values before and after GELU exist together.
        """
        return self.sequences * size * (self.keys * self.width + 2 * self.outputs * (self.width + self.hidden))

    def gradients(self, size: int) -> int:
        """Bytes per clip at the peak of the backward pass beside the saved tensors; the peak is at the activation."""
        return self.sequences * size * self.outputs * (2 * self.width + self.hidden)


LayerCost = LinearCost | ElementwiseCost | BlockCost
