"""Generated data set in AVA's format, without a download: textures that move over pictures, with exact boxes.

In every video one object moves in the upper half and one in the lower half, each to the left or to the right. The kind
of an object and its direction are its two actions. The boxes of people in the test set are those of the objects with
small random shifts, and false boxes among them.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from mvd_scale.data.generated.synthetic import (
    BACKGROUNDS,
    FPS,
    SIDE,
    Picture,
    draw_background,
    encode_video,
    load_picture,
)

log = logging.getLogger("mvd_scale")

OBJECTS = ("grass", "ihc", "text")
ACTIONS = (*OBJECTS, "goes left", "goes right")
"""Names of the actions; the first has the number 1."""

SECONDS, START = 3, 900
"""Length of a video in seconds, and the second of the annotations at which it starts, as in AVA."""

LARGEST = 40
"""Largest side of an object in pixels."""


@dataclass(frozen=True)
class Moving:
    """A moving object."""

    picture: Picture
    top: int
    left: float
    speed: float
    """Pixels per frame; positive to the right."""

    actions: tuple[int, int]

    def place(self, frame: int) -> tuple[int, int, int, int]:
        """Return the box on a frame: x1, y1, x2, y2 in pixels."""
        height, width, _ = self.picture.shape
        left = round(self.left + frame * self.speed)
        return left, self.top, left + width, self.top + height


def make_detection_set(out: Path, *, train: int, test: int, seed: int = 0) -> Path:
    """Write `train/*.mp4`, `test/*.mp4`, `actions.pbtxt`, `train.csv`, `test.csv`, `excluded.csv` and `people.csv`.

    Args:
        out: folder to write to.
        train: number of training videos, each with two key frames.
        test: number of test videos, each with two key frames.
        seed: seed of all random choices.

    Returns:
        `out`.

    Raises:
        UserError: scikit-image is not installed.
    """
    for split, count in (("train", train), ("test", test)):
        (out / split).mkdir(parents=True, exist_ok=True)
        pictures = {name: load_picture(name) for name in (*OBJECTS, *BACKGROUNDS[split])}
        truth, people = [], []
        for number in range(count):
            rng, video = default_rng((seed, split == "test", number)), f"{split}{number:04d}"
            background = draw_background(pictures[str(rng.choice(BACKGROUNDS[split]))], rng)
            objects = [_object(pictures, half, split == "test", rng) for half in (0, SIDE // 2)]
            encode_video([_frame(background, objects, n) for n in range(SECONDS * FPS)], out / split / f"{video}.mp4")
            for second in range(1, SECONDS):
                key = (video, f"{START + second:04d}")
                for person, thing in enumerate(objects):
                    box = np.array(thing.place(second * FPS)) / SIDE
                    truth += [(*key, *_text(box), action, person) for action in thing.actions]
                    people.append((*key, *_text(box + rng.uniform(-0.02, 0.02, 4)), "", "0.95"))
                people.append((*key, *_text(_anywhere(rng)), "", "0.85"))
                people.append((*key, *_text(_anywhere(rng)), "", "0.30"))
        _write(out / f"{split}.csv", truth)
        if split == "test":
            _write(out / "people.csv", people)
    _write(out / "excluded.csv", [("test0000", f"{START + 1:04d}")])
    labels = [f'label {{\n  name: "{name}"\n  label_id: {n}\n}}\n' for n, name in enumerate(ACTIONS, start=1)]
    (out / "actions.pbtxt").write_text("".join(labels))
    log.info("%d training and %d test videos written to %s", train, test, out)
    return out


def _object(pictures: dict[str, Picture], half: int, tested: bool, rng: Generator) -> Moving:
    """Draw an object that stays within its half of the frame.

    Its picture is cut from the left half of the texture for training and from the right half for the test, so that the
    two sets share no pixels.
    """
    kind, side = int(rng.integers(len(OBJECTS))), int(rng.integers(LARGEST - 8, LARGEST + 1))
    texture = pictures[OBJECTS[kind]]
    middle = texture.shape[1] // 2
    part = texture[:, middle:] if tested else texture[:, :middle]
    top, left = (int(rng.integers(size - side + 1)) for size in part.shape[:2])
    right = bool(rng.random() < 0.5)
    room = SIDE - side
    speed = room * rng.uniform(0.7, 1.0) / (SECONDS * FPS) * (1 if right else -1)
    return Moving(
        part[top : top + side, left : left + side],
        half + int(rng.integers(SIDE // 2 - side + 1)),
        0.0 if right else float(room),
        speed,
        (kind + 1, len(OBJECTS) + (2 if right else 1)),
    )


def _frame(background: Picture, objects: list[Moving], number: int) -> Picture:
    frame = background.copy()
    for thing in objects:
        x1, y1, x2, y2 = thing.place(number)
        frame[y1:y2, x1:x2] = thing.picture
    return frame


def _anywhere(rng: Generator) -> NDArray[np.float64]:
    x, y = rng.uniform(0, 0.5, 2)
    return np.array([x, y, x + rng.uniform(0.2, 0.5), y + rng.uniform(0.2, 0.5)])


def _text(box: NDArray[np.float64]) -> list[str]:
    return [f"{share:.4f}" for share in box.clip(0, 1)]


def _write(path: Path, rows: Sequence[tuple[object, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
