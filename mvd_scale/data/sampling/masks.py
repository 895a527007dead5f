"""Rules that choose visible and masked tokens.

Legend: N tokens, V visible, M masked.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from mvd_scale.config.data import MaskConfig


def draw_mask(
    rng: Generator, mask: MaskConfig | None, grid: tuple[int, int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the visible and masked tokens of a grid (time, height, width); V and M are the same in every draw.

    A tube mask hides int(ratio x height x width) patches, the same ones in every time slice (VideoMAE, Sec. 3.2);
    a random mask hides int(ratio x N) tokens. With `mask.decode_ratio` below 1, only the masked tokens to predict are
    returned.

    Returns:
        visible int64 (V,), masked int64 (M,): ascending, time-major.
    """
    slices, height, width = grid
    if mask is None:
        return np.arange(slices * height * width, dtype=np.int64), np.empty(0, dtype=np.int64)
    if mask.kind == "random":
        order = rng.permutation(slices * height * width)
        hidden = int(mask.ratio * len(order))
        return np.sort(order[hidden:]), np.sort(order[:hidden])
    order = rng.permutation(height * width)
    hidden = int(mask.ratio * len(order))
    # Index of the first token of each time slice: added to the patches of one slice, it repeats the tube in all slices.
    starts = np.arange(slices, dtype=np.int64)[:, None] * len(order)
    visible, masked = (starts + np.sort(order[hidden:])).ravel(), (starts + np.sort(order[:hidden])).ravel()
    return visible, masked if mask.decode_ratio == 1 else masked[
        running_cell_mask(rng, mask.decode_ratio, grid)[masked]
    ]


def count_tokens(mask: MaskConfig | None, grid: tuple[int, int, int]) -> tuple[int, int]:
    """Number of visible tokens V and of masked tokens M, which are the same in every draw."""
    visible, masked = draw_mask(np.random.default_rng(0), mask, grid)
    return len(visible), len(masked)


def running_cell_mask(rng: Generator, share: float, grid: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Draw the tokens that decoders predict (VideoMAE V2, "dual masking"): 4 x share of each cell of 2 x 2 patches.

    The choice advances by one patch of the cell from each time slice to the next, so that four slices take every patch
    equally often. The start is random.

    Returns:
        bool (N,), time-major.
    """
    slices, height, width = grid
    # `place` is the index 0 to 3 of a patch within its cell. In time slice t, the patches with (place + start + t) % 4
    # below 4 x share are taken: all slices together cover a cell evenly.
    place = np.arange(height)[:, None] % 2 * 2 + np.arange(width) % 2
    turn = np.arange(slices)[:, None, None] + int(rng.integers(4))
    taken: NDArray[np.bool_] = (place + turn) % 4 < round(4 * share)
    return taken.ravel()
