"""Input of a decoder: visible tokens and mask tokens, each with its position (Sec. 3.3, "Decoder").

Legend: B clips, N tokens, P class tokens, V visible, M masked, D width, G decoders.
"""

from __future__ import annotations

from torch import Tensor

from mvd_kernels.dispatch import uses_triton
from mvd_kernels.reference.decoder_input import decoder_input as reference


def decoder_input(embedded: Tensor, mask_token: Tensor, positions: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """Concatenate class tokens, visible tokens plus positions, and one mask token plus position per masked token.

    Gradients flow to `embedded` and `mask_token`; positions are fixed.

    Args:
        embedded: (G B, P + V, D), any floating dtype, ordered by decoder; the first P tokens of a clip are class
            tokens, which get no position.
        mask_token: (G, 1, D), one per decoder.
        positions: (N, D), the fixed table; converted to the dtype of `embedded`.
        visible: int64 (B, V), indices of the visible tokens.
        masked: int64 (B, M), indices of the masked tokens.

    Returns:
        (G B, P + V + M, D) in the dtype of `embedded`.

    Raises:
        ValueError: `embedded` has fewer tokens than `visible`, or not G times as many clips.
    """
    if len(embedded) != len(mask_token) * len(visible):
        raise ValueError(
            f"`embedded` has {len(embedded)} clips: expected {len(mask_token)} decoders (`mask_token`) "
            f"x {len(visible)} clips (`visible`)"
        )
    if embedded.shape[1] < visible.shape[1]:
        raise ValueError(f"`embedded` has {embedded.shape[1]} tokens, fewer than the {visible.shape[1]} of `visible`")
    if uses_triton(embedded):
        from mvd_kernels.triton_ops.decoder_input import decoder_input as fused

        return fused(embedded, mask_token, positions, visible, masked)
    return reference(embedded, mask_token, positions, visible, masked)
