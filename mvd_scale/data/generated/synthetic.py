"""Synthetic labelled videos without a download: real textures move over real pictures, encoded as H.264.

In the kind `appearance`, the label is the texture of the object, and the motion is independent of it. In the kind
`motion`, the label is the direction, left or right, in which object and scene move, and nothing else depends on it:
single frames, and the set of all frames without their order, have the same distribution in both classes. A video that
is played backwards is a video of the other class.

In the kinds `object` and `direction`, an object crosses a dim scene that stands still. The label is the texture of the
object or the direction, one of eight, and does not depend on the other. A model needs less training for these: object
and scene differ in brightness, and the scene tells nothing about the motion.

Training, validation and test videos have different objects and backgrounds.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Literal

import av
import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from mvd_scale.errors import UserError

log = logging.getLogger("mvd_scale")

Kind = Literal["appearance", "motion", "object", "direction"]
Split = Literal["train", "validation", "test"]
Picture = NDArray[np.uint8]

SIDE, FRAMES, FPS, OBJECT = 96, 32, 25, 44
"""Side of a frame in pixels, frames per video, frames per second, and side of an object in pixels."""

CROSSING_FRAMES, CROSSING_SPEEDS, OFFSET, DIMMED = 6, (6.0, 12.0), 20, 0.4
"""For an object that crosses a dim scene: frames per video, slowest and fastest motion in pixels per frame, greatest
distance from the middle of the scene to that of the path by axis in pixels, and factor on the scene's brightness."""

TEXTURES = ("coffee", "coins", "gravel", "ihc", "retina", "text")
"""Pictures of scikit-image from which objects are cut: from the left half for training, the right half for the test.

Where there are validation videos, the right half is divided between them and the test.
"""

BACKGROUNDS = {
    "train": ("astronaut", "camera", "chelsea", "clock_motion", "moon"),
    "validation": ("brick", "cell", "grass"),
    "test": ("hubble_deep_field", "motorcycle_left", "rocket"),
}

DIRECTIONS = ("left", "right")

EIGHT_DIRECTIONS = ("right", "right_down", "down", "left_down", "left", "left_up", "up", "right_up")
"""Directions of an object that crosses a scene, in steps of 45 degrees."""

CLASSES: dict[Kind, tuple[str, ...]] = {
    "appearance": TEXTURES,
    "motion": DIRECTIONS,
    "object": TEXTURES,
    "direction": EIGHT_DIRECTIONS,
}
"""Names of the classes by kind."""

_SPLIT_SEEDS: dict[Split, int] = {"train": 0, "test": 1, "validation": 2}

_QUALITY = "10"
"""Constant rate factor of H.264: so low that compression artefacts do not show the motion in a single frame."""


@dataclass(frozen=True)
class SplitPictures:
    """Pictures that the videos of one split are made of."""

    backgrounds: tuple[str, ...]

    columns: tuple[float, float]
    """First and last column of the pictures of `TEXTURES` that objects are cut from, as shares of their width."""


def split_pictures(split: Split, *, validated: bool) -> SplitPictures:
    """Pictures of a split; `validated` says whether there are validation videos beside the test's."""
    columns = {
        "train": (0.0, 0.5),
        "validation": (0.5, 0.75),
        "test": (0.75 if validated else 0.5, 1.0),
    }
    return SplitPictures(BACKGROUNDS[split], columns[split])


def write_synthetic_videos(kind: Kind, out: Path, *, train: int, test: int, validation: int = 0, seed: int = 0) -> Path:
    """Write `out/SPLIT/CLASS/*.mp4` for the splits `train`, `validation` and `test`; existing files are kept.

    Args:
        kind: property that the label describes.
        out: folder to write to.
        train: number of training videos per class.
        test: number of test videos per class.
        validation: number of validation videos per class; without any, the test has their objects too.
        seed: seed of all random choices.

    Returns:
        `out`.

    Raises:
        UserError: scikit-image is not installed, or the folder holds other videos.
    """
    classes = CLASSES[kind]
    counts: dict[Split, int] = {"train": train, "validation": validation, "test": test}
    wanted = {out / s / c / f"{n:05d}.mp4" for s, count in counts.items() for c in classes for n in range(count)}
    others = sorted(set(out.rglob("*.mp4")) - wanted)
    if validation and not others and not (out / "validation").is_dir():
        # Tests without validation videos beside them were made of other pictures.
        others = sorted((out / "test").rglob("*.mp4"))
    if others:
        raise UserError(f"{out} holds other videos, such as {others[0]}: choose another folder, or remove these videos")
    splits = {split: split_pictures(split, validated=validation > 0) for split, count in counts.items() if count}
    backgrounds = [name for made_of in splits.values() for name in made_of.backgrounds]
    pictures = {name: load_picture(name) for name in (*TEXTURES, *backgrounds)}

    def write(split: Split, label: int, number: int) -> bool:
        file = out / split / classes[label] / f"{number:05d}.mp4"
        if file.exists():
            return False
        rng = default_rng((seed, list(CLASSES).index(kind), _SPLIT_SEEDS[split], label, number))
        encode_video(draw_video(kind, label, splits[split], pictures, rng), file)
        return True

    for split, name in product(splits, classes):
        (out / split / name).mkdir(parents=True, exist_ok=True)
    videos = [(s, label, n) for s in splits for label in range(len(classes)) for n in range(counts[s])]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = sum(pool.map(write, *zip(*videos, strict=True)))
    log.info("%d videos of %d classes written to %s", made, len(classes), out)
    return out


def draw_video(
    kind: Kind, label: int, made_of: SplitPictures, pictures: dict[str, Picture], rng: Generator
) -> list[Picture]:
    """Draw the frames of one video, uint8 (96, 96, 3) each: 32, or 6 of the kinds `object` and `direction`.

    Args:
        kind: property that the label describes.
        label: class of the video.
        made_of: pictures of the split of the video.
        pictures: pictures of objects and backgrounds by name, uint8 (H, W, 3) each.
        rng: random generator of this video.
    """
    scene = draw_background(pictures[str(rng.choice(made_of.backgrounds))], rng)
    texture = TEXTURES[label] if kind in ("appearance", "object") else str(rng.choice(TEXTURES))
    picture = _tinted(_object(pictures[texture], made_of.columns, rng), rng)
    if kind in ("object", "direction"):
        towards = label if kind == "direction" else int(rng.integers(len(EIGHT_DIRECTIONS)))
        return _crossing((scene * DIMMED).astype(np.uint8), picture, 45 * towards, rng)
    start, speeds = rng.uniform(0, SIDE, size=2), rng.uniform(2, 4, size=2)
    if kind == "appearance":
        drift, pan = speeds * rng.choice([-1, 1], size=2), 0.0
    else:
        # The classes differ in the sign of the motion only.
        drift, pan = np.array([0.0, speeds[0]]), float(speeds[1])
        if DIRECTIONS[label] == "left":
            drift, pan = -drift, -pan
    frames = []
    for number in range(FRAMES):
        # Object and scene wrap around at the borders, so that every position is equally likely in every frame.
        frame = np.roll(scene, round(pan * number), axis=1)
        rows, columns = (
            np.arange(first, first + OBJECT) % SIDE for first in np.rint(start + drift * number).astype(int)
        )
        frame[np.ix_(rows, columns)] = picture
        frames.append(frame)
    return frames


def _crossing(scene: Picture, picture: Picture, degrees: float, rng: Generator) -> list[Picture]:
    """Frames of an object that crosses a scene in a direction, in degrees clockwise from right.

    The middle of its path has the same distribution for all directions, so that the middle frame does not tell them.
    """
    angle, speed = np.deg2rad(degrees), rng.uniform(*CROSSING_SPEEDS)
    middle = (SIDE - OBJECT) / 2 + rng.uniform(-OFFSET, OFFSET, size=2)
    frames = []
    for number in range(CROSSING_FRAMES):
        passed = speed * (number - (CROSSING_FRAMES - 1) / 2)
        top, left = np.rint(middle + passed * np.array([np.sin(angle), np.cos(angle)])).astype(int)
        # Parts of the object that have left the scene are not drawn.
        frame = np.pad(scene, ((SIDE, SIDE), (SIDE, SIDE), (0, 0)))
        frame[SIDE + top : SIDE + top + OBJECT, SIDE + left : SIDE + left + OBJECT] = picture
        frames.append(frame[SIDE:-SIDE, SIDE:-SIDE])
    return frames


def _object(texture: Picture, columns: tuple[float, float], rng: Generator) -> Picture:
    """Cut the object: of eight random patches, the one of highest contrast, as a coin, not the cloth between coins."""
    first, last = (int(share * texture.shape[1]) for share in columns)
    part = texture[:, first:last]
    return max((_cut(part, OBJECT, rng) for _ in range(8)), key=np.std)


def draw_background(picture: Picture, rng: Generator) -> Picture:
    """Cut a background of the size of a frame from a random position of a picture: uint8 (96, 96, 3)."""
    return _tinted(_cut(picture, SIDE, rng), rng)


def _cut(picture: Picture, side: int, rng: Generator) -> Picture:
    top, left = (int(rng.integers(size - side + 1)) for size in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def _tinted(picture: Picture, rng: Generator) -> Picture:
    """Rotate, mirror and brighten or darken a picture at random: a model could memorise a few unchanged backgrounds."""
    turned = np.rot90(picture, int(rng.integers(4)))[:, :: int(rng.choice([-1, 1]))]
    # One factor for all channels: at this size, textures are distinguished by their colours for a good part.
    tinted: Picture = np.clip(turned * rng.uniform(0.7, 1.2), 0, 255).astype(np.uint8)
    return tinted


def load_picture(name: str) -> Picture:
    """Load a picture of scikit-image's wheel, at half its size so that a small object shows its texture.

    Returns:
        uint8 (H, W, 3).

    Raises:
        UserError: scikit-image is not installed.
    """
    try:
        from skimage import data, io
    except ImportError as error:
        raise UserError("synthetic videos need scikit-image: pip install 'mvd-scale[samples]'") from error
    folder = Path(data.__file__).parent
    (file,) = folder.glob(f"{name}.*")
    picture = np.asarray(io.imread(file))
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=2)
    shrunk: Picture = np.ascontiguousarray(picture[::2, ::2, :3], dtype=np.uint8)
    return shrunk


def encode_video(frames: list[Picture], file: Path) -> None:
    """Encode frames, uint8 (H, W, 3) each, as H.264, and write the file atomically."""
    # No name of a video: what a killed process leaves must not count as one.
    partial = file.with_name(f".{file.name}.partial")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        # The pixels of several encoder threads would depend on the number of cores.
        stream.codec_context.thread_count = 1
        height, width, _ = frames[0].shape
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": _QUALITY}
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    partial.replace(file)
