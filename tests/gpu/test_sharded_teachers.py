"""Sharded fp16 teachers."""

from __future__ import annotations

import pytest

from .conftest import Figure, Seen

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]


@pytest.mark.parametrize("name", ["image", "video"])
def test_sharded_fp16_teachers_give_the_features_of_whole_float32_ones(name: str, most: Seen, figure: Figure) -> None:
    for rank in most:
        seen = rank["sharded teachers"][name]
        figure("ranks", len(most))
        figure("cosine", seen["cosine"])
        figure("relative error", seen["error"])
        assert seen["cosine"] > 0.999
        assert seen["error"] < 1e-2
        # Vectors stay on every rank beside their shard.
        assert seen["held"] <= seen["whole"] * (1 / len(most) + 0.02)
