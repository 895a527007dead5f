"""Files of AVA: valid files are read, and errors name the invalid line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mvd_scale.detection.annotations import (
    read_actions,
    read_excluded,
    read_ground_truth,
    read_person_boxes,
    read_results,
    write_results,
)
from mvd_scale.detection.boxes import KeyFrame
from mvd_scale.errors import UserError

ACTIONS = """
label {
  name: "bend/bow (at the waist)"
  label_id: 1
  label_type: PERSON_MOVEMENT
}
item {
  name: "crouch/kneel"
  id: 3
}
"""


@pytest.fixture
def write(tmp_path: Path):
    def made(text: str, name: str = "ava.csv") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return made


def test_ground_truth_is_read_as_it_is_published(write) -> None:
    path = write("-5KQ66BBWC4,0902,0.077,0.151,0.283,0.811,80,1\n-5KQ66BBWC4,0902,0.077,0.151,0.283,0.811,9,1\n")
    truth = read_ground_truth(path, 80)
    assert truth.frames == (KeyFrame("-5KQ66BBWC4", 902),)
    assert truth.actions.tolist() == [80, 9]
    np.testing.assert_allclose(truth.corners[0], [0.077, 0.151, 0.283, 0.811])


def test_people_below_the_score_are_left_out(write) -> None:
    path = write("a,902,0,0,1,1,,0.9\na,903,0,0,1,1,,0.79\n")
    assert read_person_boxes(path, 0.8).scores.tolist() == [0.9]
    with pytest.raises(UserError, match=r"no box has a score of 0\.95 or more, the highest is 0\.9"):
        read_person_boxes(path, 0.95)


def test_actions_and_excluded_key_frames_are_read(write) -> None:
    assert read_actions(write(ACTIONS), 80) == {1: "bend/bow (at the waist)", 3: "crouch/kneel"}
    assert read_excluded(write("a,0902\nb,1000\n")) == {KeyFrame("a", 902), KeyFrame("b", 1000)}


def test_results_come_back_as_they_were_written(write, tmp_path: Path) -> None:
    text = "a,0902,0.1,0.2,0.3,0.4,7,0.125\na,0902.5,0,0,1,1,8,0.5\n"
    found = read_results(write(text), 80)
    write_results(tmp_path / "results.csv", found)
    assert (tmp_path / "results.csv").read_text().replace("\r", "") == text.replace("0902.5", "902.5")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a,902,0,0,1", "line 2 has 5 fields, expected 7 or 8"),
        ("a,902,0,0,1,1,81,1", "line 2: action '81' is unknown: expected a number from 1 to 80"),
        ("a,902,0,0,1,1,stand,1", "line 2: action 'stand' is unknown"),
        ("a,902,0,0,1,1,,1", "line 2: action '' is unknown"),
        ("a,902,0,0,1.01,1,3,1", "line 2: 0, 0, 1.01, 1 is not a box"),
        ("a,902,0.5,0,0.4,1,3,1", "line 2: 0.5, 0, 0.4, 1 is not a box"),
        ("a,902,12,30,200,300,3,1", "as fractions of the frame"),
        ("a,noon,0,0,1,1,3,1", "line 2: second 'noon' is not a number"),
        ("a,-1,0,0,1,1,3,1", "before the start"),
        ("a,902,nan,0,1,1,3,1", "line 2: coordinate 'nan' is not finite"),
    ],
)
def test_a_bad_line_is_named(write, line: str, said: str) -> None:
    with pytest.raises(UserError, match=r"ava\.csv, line 2") as error:
        read_ground_truth(write(f"a,902,0,0,1,1,3,1\n{line}\n"), 80)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "lists no actions"),
        ('label { name: "run" }', "is not an action"),
        ('label { name: "run" label_id: 81 }', "action 81"),
        ('label { name: "run" label_id: 1 } label { name: "go" label_id: 1 }', "listed twice, as 'run' and 'go'"),
    ],
)
def test_a_bad_list_of_actions_is_refused(write, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_actions(write(text), 80)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.csv cannot be read: No such file"):
        read_excluded(tmp_path / "nothing.csv")
