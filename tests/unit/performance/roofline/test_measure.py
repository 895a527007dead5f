"""Roofline of a step: recipes that have none."""

from __future__ import annotations

import pytest

from mvd_scale.errors import UserError
from mvd_scale.performance.roofline.measure import measure_roofline


def test_a_recipe_of_several_students_is_refused_by_their_names() -> None:
    with pytest.raises(UserError, match=r"that of one student, but distill/sb_from_b has students s, b"):
        measure_roofline("distill/sb_from_b", [], batch=2, rounds=1)
