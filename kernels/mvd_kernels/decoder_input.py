"""What a decoder reads: visible tokens and mask tokens, each with its position (Sec. 3.3, "Decoder").

Legend: B clips, N tokens, P class tokens, V visible, M masked, D width, G decoders.
"""

from __future__ import annotations

from torch import Tensor

from mvd_kernels.dispatch import takes_kernel
from mvd_kernels.twins.decoder_input import decoder_input as twin


def decoder_input(embedded: Tensor, mask_token: Tensor, positions: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """Class tokens as they are, then visible tokens, then one mask token for each masked place, both plus positions.

    Gradients flow to `embedded` and `mask_token`; positions are fixed.

    Args:
        embedded: (G B, P + V, D), any floating dtype, the clips of the first decoder first; the P tokens in front are
            those that `visible` does not count.
        mask_token: (G, 1, D), of each decoder.
        positions: (N, D), the fixed table; taken in the dtype of `embedded`.
        visible: int64 (B, V).
        masked: int64 (B, M).

    Returns:
        (G B, P + V + M, D) in the dtype of `embedded`.

    Raises:
        ValueError: `embedded` has fewer tokens than `visible`, or not G times its clips.
    """
    if len(embedded) != len(mask_token) * len(visible):
        raise ValueError(f"{len(embedded)} embedded clips for {len(mask_token)} mask tokens on {len(visible)} clips")
    if embedded.shape[1] < visible.shape[1]:
        raise ValueError(f"{embedded.shape[1]} embedded tokens for {visible.shape[1]} visible ones")
    if takes_kernel(embedded):
        from mvd_kernels.fused.decoder_input import decoder_input as fused

        return fused(embedded, mask_token, positions, visible, masked)
    return twin(embedded, mask_token, positions, visible, masked)
