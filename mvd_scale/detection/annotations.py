"""Reader and writer of the files of AVA v2.2; errors name the first invalid line.

    ava_{train,val}_v2.2.csv             video, second, x1, y1, x2, y2, action, person
    ava_..._excluded_timestamps_v2.2.csv video, second
    ava_action_list_v2.2...pbtxt         names and numbers of the actions
    boxes of a person detector           video, second, x1, y1, x2, y2, (empty), score
    results                              video, second, x1, y1, x2, y2, action, score

Coordinates are fractions (0 to 1) of the frame's width and height.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from math import isfinite
from pathlib import Path

from mvd_scale.detection.boxes import Boxes, KeyFrame
from mvd_scale.errors import UserError

ANY_NUMBER_OF_CLASSES = 1 << 31
"""Number of classes for files whose number of actions is unknown: accepts any action number."""

_BLOCK = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r'\bname:\s*"((?:[^"\\]|\\.)*)"')
_NUMBER = re.compile(r"\b(?:label_)?id:\s*(\d+)")


def read_ground_truth(path: Path, classes: int) -> Boxes:
    """Read ground truth: one box of score 1 for every line.

    Args:
        path: CSV in the format of the official files; the column of the person may be missing.
        classes: number of actions; they are numbered from 1 to it.

    Raises:
        UserError: the file cannot be read, or a line is invalid; the message names the first one.
    """
    return _read(path, (7, 8), classes, scored=False)


def read_results(path: Path, classes: int) -> Boxes:
    """Read the results of a model in the official format.

    Args:
        path: CSV in the official format of results.
        classes: number of actions; they are numbered from 1 to it.

    Raises:
        UserError: see `read_ground_truth`.
    """
    return _read(path, (8,), classes, scored=True)


def read_person_boxes(path: Path, score: float) -> Boxes:
    """Read the boxes of a person detector whose score is high enough.

    Args:
        path: CSV in the format of the files that LFB and SlowFast distribute.
        score: boxes of a lower score are dropped.

    Raises:
        UserError: see `read_ground_truth`; or no box is left.
    """
    found = _read(path, (8,), None, scored=True)
    sure = found.take(found.scores >= score)
    if not len(sure):
        best = f"the highest is {found.scores.max():g}" if len(found) else "it has none"
        raise UserError(f"{path}: no box has a score of {score:g} or more, {best}. Lower the required score")
    return sure


def read_excluded(path: Path) -> frozenset[KeyFrame]:
    """Read the key frames that are excluded from the evaluation.

    Raises:
        UserError: see `read_ground_truth`.
    """
    return frozenset(_key(row, where) for where, row in _rows(path, (2,)))


def read_actions(path: Path, classes: int) -> dict[int, str]:
    """Read the name of each evaluated action, by its number.

    Raises:
        UserError: the file lists no action, an action twice, or a number above `classes`.
    """
    names: dict[int, str] = {}
    for block in _BLOCK.findall(_text(path)):
        name, number = _NAME.search(block), _NUMBER.search(block)
        if name is None or number is None:
            raise UserError(f'{path}: {{{block.strip()}}} is not an action: expected name: "..." and label_id: N')
        action = int(number[1])
        if not 1 <= action <= classes:
            raise UserError(f"{path}: action {action} ({name[1]}) is not among the {classes} classes, 1 to {classes}")
        if action in names:
            raise UserError(f"{path}: action {action} is listed twice, as {names[action]!r} and {name[1]!r}")
        names[action] = name[1]
    if not names:
        raise UserError(f"{path} lists no actions: expected the blocks of ava_action_list_v2.2_for_activitynet_2019")
    return names


def write_results(path: Path, found: Boxes) -> None:
    """Write boxes in the official format of results; the file is renamed into place, so it is never partial."""
    partial = path.with_name(path.name + ".partial")
    frames = [(frame.video, f"{frame.second:04.10g}") for frame in found.frames]
    columns = zip(found.frame.tolist(), found.corners.tolist(), found.actions.tolist(), found.scores, strict=True)
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for frame, corners, action, score in columns:
            writer.writerow([*frames[frame], *(f"{corner:.6g}" for corner in corners), action, f"{score:.6g}"])
    os.replace(partial, path)


def _read(path: Path, columns: tuple[int, ...], classes: int | None, *, scored: bool) -> Boxes:
    keys, corners, actions, scores = [], [], [], []
    for where, row in _rows(path, columns):
        keys.append(_key(row, where))
        corners.append(_corners(row, where))
        actions.append(0 if classes is None else _action(row[6], classes, where))
        scores.append(_number(row[7], "score", where) if scored else 1.0)
    return Boxes.of(keys, corners, actions, scores)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise UserError(f"{path} cannot be read: {reason}") from error


def _rows(path: Path, columns: tuple[int, ...]) -> Iterator[tuple[str, list[str]]]:
    """Yield the location (file and line, for messages) and the fields of every line that is not empty."""
    for number, row in enumerate(csv.reader(_text(path).splitlines()), start=1):
        where = f"{path}, line {number}"
        if row and len(row) not in columns:
            expected = " or ".join(map(str, columns))
            raise UserError(f"{where} has {len(row)} fields, expected {expected}: {','.join(row)[:80]}")
        if row:
            yield where, row


def _key(row: list[str], where: str) -> KeyFrame:
    second = _number(row[1], "second", where)
    if second < 0:
        raise UserError(f"{where}: second {row[1]} is before the start of the video")
    return KeyFrame(row[0], second)


def _corners(row: list[str], where: str) -> list[float]:
    corners = [_number(field, "coordinate", where) for field in row[2:6]]
    x1, y1, x2, y2 = corners
    if not (0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1):
        raise UserError(
            f"{where}: {', '.join(row[2:6])} is not a box: expected x1, y1, x2, y2 as fractions of the frame, "
            "0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1"
        )
    return corners


def _action(field: str, classes: int, where: str) -> int:
    if not field.isdecimal() or not 1 <= int(field) <= classes:
        raise UserError(f"{where}: action {field!r} is unknown: expected a number from 1 to {classes}")
    return int(field)


def _number(field: str, what: str, where: str) -> float:
    try:
        number = float(field)
    except ValueError as error:
        raise UserError(f"{where}: {what} {field!r} is not a number") from error
    if not isfinite(number):
        raise UserError(f"{where}: {what} {field!r} is not finite")
    return number
