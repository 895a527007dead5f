"""What a launcher must tell a rank."""

from __future__ import annotations

import pytest

from mvd_scale.errors import UserError
from mvd_scale.training.ranks import join_ranks

PLACE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("missing", "said"),
    [(["LOCAL_RANK"], "LOCAL_RANK is"), (["WORLD_SIZE", "MASTER_PORT"], "WORLD_SIZE, MASTER_PORT are")],
)
def test_a_gap_is_named_with_the_way_to_fill_it(missing: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    for name in missing:
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f"^RANK is 1, but {said} not set: .*`deepspeed` launcher.* unset RANK"):
        join_ranks("cpu", timeout_minutes=1)
