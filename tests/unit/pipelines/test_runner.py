"""Promise: the ranks of a stage get the devices that the user made visible."""

from __future__ import annotations

import pytest

from mvd_scale.pipelines.runner import device_ids


@pytest.mark.parametrize(
    ("visible", "ranks", "expected"),
    [
        (None, 2, ["0", "1"]),
        ("", 2, ["0", "1"]),
        ("2,3", 2, ["2", "3"]),
        ("2,3,5", 2, ["2", "3"]),
        ("7", 1, ["7"]),
        # More ranks than visible GPUs: each rank that finds none says so itself.
        ("7", 2, ["0", "1"]),
    ],
)
def test_ranks_of_a_stage_take_the_visible_devices(
    visible: str | None, ranks: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_ids(ranks) == expected
