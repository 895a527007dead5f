"""Linear layers and transformer blocks by their shapes: their FLOPs, and what they keep for the backward pass.

FLOPs are counted as `torch.utils.flop_counter` does: matrix products and attention, 2 per multiply-add.

Legend: N tokens that are keys, Q tokens that query, D width, F hidden width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mvd_scale.config.training import Checkpointing

Backward = Literal["fused", "unfused"]
"""`fused` attention (flash-attn, SDPA's kernels) computes the scores again in its backward pass, plain one does not."""


@dataclass(frozen=True)
class Linear:
    """A linear layer over some rows of every clip."""

    rows: int
    inputs: int
    outputs: int

    input_grad: bool = True
    """Whether its input needs a gradient: pixels do not."""

    input_kept: bool = True
    """Whether it is the one that keeps its input; decoders share the encoder's output."""

    @property
    def forward(self) -> int:
        """FLOPs."""
        return 2 * self.rows * self.inputs * self.outputs

    def backward(self, attention: Backward) -> int:
        """FLOPs: a product for the weight, and one for the input; it has no attention."""
        return (1 + self.input_grad) * self.forward

    def saved(self, size: int) -> int:
        """Bytes kept for the backward pass."""
        return size * self.rows * self.inputs if self.input_kept else 0


@dataclass(frozen=True)
class Elementwise:
    """A norm or an activation: no FLOPs that count, but it keeps its input."""

    rows: int
    width: int

    statistics: int = 0
    """Numbers in float32 that it keeps of each row."""

    forward = 0

    def backward(self, attention: Backward) -> int:
        """None that count."""
        return 0

    def saved(self, size: int) -> int:
        """Bytes kept for the backward pass."""
        return self.rows * (size * self.width + 4 * self.statistics)


@dataclass(frozen=True)
class Block:
    """A transformer block over sequences of tokens.

    All of its tokens are projected to queries, keys and values; scores are computed for some queries, the output
    projection and the MLP for some tokens.
    """

    keys: int
    """N."""

    queries: int
    """Tokens that ask."""

    outputs: int
    """Tokens that come out."""

    width: int
    hidden: int
    heads: int

    sequences: int = 1
    """Per clip; an image model sees each front frame as one."""

    drop_path: bool = False
    """Whether the output is dropped at random."""

    def weights(self, checkpointing: Checkpointing) -> int:
        """Numbers in the weights of the linear layers that checkpointing does not compute with again."""
        attention, mlp = 4 * self.width**2, 2 * self.width * self.hidden
        return {"none": attention + mlp, "attention": mlp, "block": 0}[checkpointing]

    @property
    def products(self) -> int:
        """FLOPs of the linear layers alone."""
        return self.sequences * self._products

    @property
    def _products(self) -> int:
        return self._packed + 2 * self.outputs * self.width**2 + 2 * self._half_mlp

    @property
    def _packed(self) -> int:
        return 6 * self.keys * self.width**2

    @property
    def _half_mlp(self) -> int:
        return 2 * self.outputs * self.width * self.hidden

    @property
    def _attention(self) -> int:
        """FLOPs of scores and of their product with the values, per sequence."""
        return 4 * self.queries * self.keys * self.width

    @property
    def forward(self) -> int:
        """FLOPs."""
        return self.sequences * (self._products + self._attention)

    def backward(self, attention: Backward) -> int:
        """FLOPs: two products for each one; of attention's two, `fused` computes the first once more."""
        again = self._attention // 2 if attention == "fused" else 0
        return 2 * self.forward + self.sequences * again

    def recomputed(self, checkpointing: Checkpointing) -> int:
        """FLOPs that gradient checkpointing adds.

        Recomputation ends with the last saved tensor: of a block before the product of the MLP's second layer, unless
        a random drop follows it; of the attention half before the output projection.
        """
        if checkpointing == "block":
            return self.forward - (0 if self.drop_path else self.sequences * self._half_mlp)
        return self.sequences * (self._packed + self._attention) if checkpointing == "attention" else 0

    def saved(self, size: int, checkpointing: Checkpointing = "none") -> int:
        """Bytes kept for the backward pass, of elements of `size` bytes; norms' and softmax's statistics are float32.

        Always the input. Of the attention half, for all tokens: normalised input, queries, keys and values; for those
        that ask: attended. Of the MLP's, for those that come out: the sum with the input, normalised, and the MLP
        before and after its activation.
        """
        attention = size * (4 * self.keys + self.queries) * self.width + 4 * (2 * self.keys + self.heads * self.queries)
        mlp = self.outputs * (size * 2 * (self.width + self.hidden) + 4 * 2)
        kept = {"none": attention + mlp, "attention": mlp, "block": 0}[checkpointing]
        return self.entry(size) + self.sequences * kept

    def entry(self, size: int) -> int:
        """Bytes of the input alone."""
        return self.sequences * size * self.keys * self.width

    def inference(self, size: int) -> int:
        """Bytes at the peak of a forward pass without gradients, at the MLP: input, sum, norm, both sides of GELU."""
        return self.sequences * size * (self.keys * self.width + 2 * self.outputs * (self.width + self.hidden))

    def gradients(self, size: int) -> int:
        """Bytes at the peak of the backward pass above what was saved: at the MLP's activation."""
        return self.sequences * size * self.outputs * (2 * self.width + self.hidden)


Layer = Linear | Elementwise | Block
