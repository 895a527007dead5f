"""Frame mAP against cases that were worked out by hand, and against a plain loop."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvd_scale.detection.boxes import Boxes, KeyFrame
from mvd_scale.detection.metrics import average_precision, compute_frame_map, overlap
from mvd_scale.errors import UserError

A, B, C = KeyFrame("a", 902), KeyFrame("a", 903), KeyFrame("b", 902)
LEFT, RIGHT, ALL = (0.0, 0.0, 0.4, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)
STAND, RUN, SWIM = 1, 2, 3
ACTIONS = {STAND: "stand", RUN: "run", SWIM: "swim"}

Line = tuple[KeyFrame, tuple[float, float, float, float], int, float]


def boxes(*lines: Line) -> Boxes:
    keys, corners, actions, scores = zip(*lines, strict=True) if lines else ((), (), (), ())
    return Boxes.of(keys, corners, actions, scores)


TRUTH = boxes((A, LEFT, STAND, 1), (A, RIGHT, STAND, 1), (B, LEFT, STAND, 1), (C, LEFT, RUN, 1))


def precision_of(*found: Line, action: int = STAND, **options: object) -> float:
    return compute_frame_map(TRUTH, boxes(*found), ACTIONS, **options).actions[action].precision


def test_finding_all_and_nothing_else_is_one() -> None:
    assert precision_of((A, LEFT, STAND, 0.2), (A, RIGHT, STAND, 0.1), (B, LEFT, STAND, 0.9)) == 1


def test_a_wrong_box_of_a_high_score_costs_precision() -> None:
    # Right at ranks 2 and 3 of 3: the envelope is 2/3 over two thirds of the recall.
    found = [(C, LEFT, STAND, 0.9), (A, LEFT, STAND, 0.8), (B, LEFT, STAND, 0.7)]
    assert precision_of(*found) == pytest.approx(2 / 3 * 2 / 3)


def test_the_envelope_lifts_what_lies_before_a_better_point() -> None:
    # right, wrong, right, right: precisions 1, 1/2, 2/3, 3/4, of which the last two count as 3/4.
    assert average_precision(np.array([True, False, True, True]), 3) == pytest.approx((1 + 3 / 4 + 3 / 4) / 3)
    assert math.isnan(average_precision(np.array([True]), 0))
    assert average_precision(np.zeros(0, dtype=np.bool_), 4) == 0


def test_a_box_of_ground_truth_is_found_once() -> None:
    twice = [(A, LEFT, STAND, 0.9), (A, LEFT, STAND, 0.8), (A, RIGHT, STAND, 0.7), (B, LEFT, STAND, 0.6)]
    assert precision_of(*twice) == pytest.approx((1 + 3 / 4 + 3 / 4) / 3)


def test_a_box_claims_only_the_one_that_it_overlaps_most() -> None:
    truth = boxes((A, (0, 0, 1, 1), STAND, 1), (A, (0, 0, 1, 0.9), STAND, 1))
    # Both overlap the whole frame most: the second is wrong, although the other box is free and overlaps by 0.95.
    found = boxes((A, (0, 0, 1, 1), STAND, 0.9), (A, (0, 0, 1, 0.96), STAND, 0.8))
    assert compute_frame_map(truth, found, ACTIONS).actions[STAND].precision == 0.5


def test_an_overlap_of_one_half_counts_and_less_does_not() -> None:
    truth = boxes((A, (0, 0, 0.5, 1), STAND, 1))
    for width, expected in ((0.25, 1), (0.2499, 0)):
        found = boxes((A, (0, 0, width, 1), STAND, 1))
        assert compute_frame_map(truth, found, ACTIONS).mean == expected


def test_the_mean_is_over_actions_that_have_ground_truth() -> None:
    found = [(C, LEFT, RUN, 0.5), (A, LEFT, STAND, 0.4), (A, LEFT, SWIM, 0.9)]
    score = compute_frame_map(TRUTH, boxes(*found), ACTIONS)
    assert score.mean == pytest.approx((1 / 3 + 1) / 2)
    assert score.tested == 2
    assert math.isnan(score.actions[SWIM].precision)


def test_no_box_found_is_zero() -> None:
    assert compute_frame_map(TRUTH, boxes(), ACTIONS).mean == 0


def test_excluded_key_frames_and_other_actions_do_not_count() -> None:
    found = [(A, LEFT, STAND, 0.5), (A, RIGHT, STAND, 0.5), (B, ALL, STAND, 0.9)]
    assert precision_of(*found) < 1
    assert precision_of(*found, excluded={B}) == 1
    only = compute_frame_map(TRUTH, boxes(*found), {RUN: "run"})
    assert list(only.actions) == [RUN]
    with pytest.raises(UserError, match="no box of one of the 1 listed actions"):
        compute_frame_map(TRUTH, boxes(), {SWIM: "swim"})


def test_only_the_highest_scores_of_a_key_frame_count_where_they_are_limited() -> None:
    found = [(A, (0, 0, 0.1, 1), STAND, 0.9), (A, LEFT, STAND, 0.5), (B, LEFT, STAND, 0.1)]
    score = compute_frame_map(TRUTH, boxes(*found), ACTIONS, per_frame=1)
    assert score.actions[STAND].found == 2
    assert score.actions[STAND].precision == pytest.approx(1 / 3 * 1 / 2)


def test_the_table_has_a_line_for_each_action(tmp_path: Path) -> None:
    compute_frame_map(TRUTH, boxes((C, LEFT, RUN, 0.5)), ACTIONS).write(tmp_path / "actions.csv")
    assert (tmp_path / "actions.csv").read_text().splitlines() == [
        "action,name,boxes,found,average_precision",
        "1,stand,3,0,0.0000",
        "2,run,1,1,1.0000",
        "3,swim,0,0,",
    ]


def test_overlap_is_torchvisions() -> None:
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("torchvision.ops", reason="needs torchvision: the detection extra")
    corners = np.sort(np.random.default_rng(0).random((2, 50, 2, 2)), axis=2).reshape(2, 50, 4)
    expected = ops.box_iou(*map(torch.from_numpy, corners)).diagonal()
    np.testing.assert_allclose(overlap(*corners), expected)


def plainly(truth: list[Line], found: list[Line], action: int) -> float:
    """The protocol, one box after the other."""
    wanted = [line for line in truth if line[2] == action]
    taken, right = set(), []
    for key, corners, _, _ in sorted((line for line in found if line[2] == action), key=lambda line: -line[3]):
        here = [n for n, line in enumerate(wanted) if line[0] == key]
        shared = [float(overlap(np.array([corners]), np.array([wanted[n][1]]))[0]) for n in here]
        best = here[int(np.argmax(shared))] if here else -1
        right.append(bool(here) and max(shared) >= 0.5 and best not in taken)
        if right[-1]:
            taken.add(best)
    area, recall, best_precision = 0.0, sum(right), 0.0
    for rank in range(len(right), 0, -1):
        best_precision = max(best_precision, recall / rank)
        recall -= right[rank - 1]
        area += best_precision * right[rank - 1]
    return area / len(wanted)


CORNERS = st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(1, 3)] * 2).map(
    lambda at: (at[0] / 6, at[1] / 6, (at[0] + at[2]) / 6, (at[1] + at[3]) / 6)
)
LINES = st.lists(
    st.tuples(
        st.sampled_from([A, B, C]), CORNERS, st.sampled_from([STAND, RUN]), st.integers(1, 9).map(lambda n: n / 9)
    ),
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(truth=LINES, found=LINES)
def test_it_is_the_protocol_one_box_after_the_other(truth: list[Line], found: list[Line]) -> None:
    truth = [*truth, (A, ALL, STAND, 1.0)]
    score = compute_frame_map(boxes(*truth), boxes(*found), ACTIONS)
    for action, of in score.actions.items():
        if of.truth:
            assert of.precision == pytest.approx(plainly(truth, found, action))
