"""Invalid labels are refused, and the message names a video that has one."""

from __future__ import annotations

import pytest

from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.errors import UserError
from mvd_scale.evaluation.labels import check_labels, class_count


def manifest(labels: list[int], classes: tuple[str, ...] = (), left_out: str | None = None) -> Manifest:
    rows = [
        Row(name=f"{k}.mp4", path=f"/v/{k}.mp4", label=label, frames=9, left_out=left_out)
        for k, label in enumerate(labels)
    ]
    return Manifest.from_rows(rows, classes=classes)


def test_classes_are_counted_as_told_named_or_numbered() -> None:
    assert class_count(manifest([0, 3])) == 4
    assert class_count(manifest([0, 1], ("a", "b", "c"))) == 3
    assert class_count(manifest([0, 3]), 7) == 7
    assert class_count(manifest([-1])) == 0


@pytest.mark.parametrize(
    ("made", "classes", "said"),
    [
        (manifest([0], left_out="broken"), 1, "no usable video"),
        (manifest([0, -1]), 1, "1 videos have no label, the first is 1.mp4"),
        (manifest([0, 5]), 3, r"1.mp4 has label 5, but there are 3 classes \(0 to 2\)"),
        (manifest([0, 1], ("a", "b")), 3, "2 classes, but the classifier has 3"),
        (manifest([0, 2]), 3, "1 of 3 classes have no usable video: 1"),
        (manifest([0], ("swim", "run")), 2, "no usable video: run"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said(made: Manifest, classes: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_labels(made, classes, "data.source", every_class=True)


def test_a_test_may_leave_classes_out_but_not_name_others() -> None:
    learnt = manifest([0, 1], ("run", "swim"))
    check_labels(manifest([1], ("run", "swim")), 2, "validation.source", like=learnt)
    with pytest.raises(UserError, match=r"class 0 is 'jump' here, but 'run'"):
        check_labels(manifest([1], ("jump", "swim")), 2, "validation.source", like=learnt)


@pytest.mark.parametrize(("here", "there"), [("names", "numbers"), ("numbers", "names")])
def test_names_are_not_compared_with_numbers(here: str, there: str) -> None:
    named, numbered = manifest([0, 1], ("run", "swim")), manifest([0, 1])
    tested, learnt = (named, numbered) if here == "names" else (numbered, named)
    with pytest.raises(UserError, match=f"the classes are {here} here, but {there} in the training videos"):
        check_labels(tested, 2, "validation.source", like=learnt)
    check_labels(numbered, 2, "validation.source", like=numbered)
