"""Labelled videos without a download: real textures over real pictures, encoded as real videos.

In `appearance` the label is what the object looks like, and motion tells nothing. In `motion` it is where two objects
go: one to the left or right, one up or down, and nothing else tells it. Every frame by itself looks alike in all
classes, and so does the set of all frames without their order: each object runs around its line, from a random place.

The objects and backgrounds of the test videos are other ones than those of the training videos.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from mvd_scale.errors import UserError

log = logging.getLogger("mvd_scale")

Kind = Literal["appearance", "motion"]
Picture = NDArray[np.uint8]

SIDE, FRAMES, FPS, OBJECT = 96, 32, 25, 44
"""Pixels of a frame, frames of a video, and pixels of an object."""

TEXTURES = ("brick", "coins", "grass", "gravel", "ihc", "text")
"""Pictures that objects are cut from: from the left half for training, from the right half for the test."""

BACKGROUNDS = {
    "train": ("astronaut", "camera", "chelsea", "clock_motion", "coffee", "moon"),
    "test": ("hubble_deep_field", "motorcycle_left", "rocket"),
}

DIRECTIONS = ("left_up", "left_down", "right_up", "right_down")

_QUALITY = "10"
"""Of H.264: so fine that no trace of the motion is left in a single frame."""


@dataclass(frozen=True)
class Track:
    """An object and its way: place at the first frame and pixels per frame, rows and columns."""

    picture: Picture
    start: tuple[float, float]
    speed: tuple[float, float]


def make_synthetic(kind: Kind, out: Path, *, train: int, test: int, seed: int = 0) -> Path:
    """Write `out/train/CLASS/*.mp4` and `out/test/CLASS/*.mp4`; files that are there already stay.

    Args:
        kind: what the label is.
        out: folder.
        train: training videos of each class.
        test: test videos of each class.
        seed: of everything that is drawn.

    Raises:
        UserError: scikit-image is not installed.
    """
    classes = TEXTURES if kind == "appearance" else DIRECTIONS
    made = 0
    for split, count in (("train", train), ("test", test)):
        pictures = {name: load_picture(name) for name in (*TEXTURES, *BACKGROUNDS[split])}
        for label, name in enumerate(classes):
            folder = out / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                file = folder / f"{number:05d}.mp4"
                if not file.exists():
                    rng = default_rng((seed, kind == "motion", split == "test", label, number))
                    encode_video(draw_video(kind, label, split == "test", pictures, rng), file)
                    made += 1
    log.info("%d videos of %d classes written to %s", made, len(classes), out)
    return out


def draw_video(kind: Kind, label: int, tested: bool, pictures: dict[str, Picture], rng: Generator) -> list[Picture]:
    """The frames of one video: uint8 (96, 96, 3) each."""
    background = draw_background(pictures[str(rng.choice(BACKGROUNDS["test" if tested else "train"]))], rng)
    speeds = rng.uniform(2, 4, size=2)
    if kind == "appearance":
        signs = rng.choice([-1, 1], size=2)
        tracks = [_track(pictures[TEXTURES[label]], tested, (speeds[0] * signs[0], speeds[1] * signs[1]), rng)]
    else:
        across, along = (1 if word in ("right", "down") else -1 for word in DIRECTIONS[label].split("_"))
        textures = [pictures[str(name)] for name in rng.choice(TEXTURES, size=2)]
        tracks = [
            _track(textures[0], tested, (0.0, speeds[0] * across), rng),
            _track(textures[1], tested, (speeds[1] * along, 0.0), rng),
        ]
    return [_frame(background, tracks, number) for number in range(FRAMES)]


def _track(texture: Picture, tested: bool, speed: tuple[float, float], rng: Generator) -> Track:
    middle = texture.shape[1] // 2
    half = texture[:, middle:] if tested else texture[:, :middle]
    # Of a few places the one with the most to see: a joint of a wall, not the face of a brick.
    places = rng.integers(np.array(half.shape[:2]) - OBJECT + 1, size=(8, 2))
    cuts = [half[top : top + OBJECT, left : left + OBJECT] for top, left in places]
    start = tuple(float(place) for place in rng.uniform(0, SIDE, size=2))
    return Track(tinted(max(cuts, key=np.std), rng), (start[0], start[1]), speed)


def _frame(background: Picture, tracks: list[Track], number: int) -> Picture:
    frame = background.copy()
    for track in tracks:
        # What leaves the frame on one side comes back on the other: every place is as likely in every frame.
        top, left = (round(place + number * step) for place, step in zip(track.start, track.speed, strict=True))
        rows, columns = (np.arange(first, first + OBJECT) % SIDE for first in (top, left))
        frame[np.ix_(rows, columns)] = track.picture
    return frame


def draw_background(picture: Picture, rng: Generator) -> Picture:
    """A square of a picture as large as a frame, from a random place."""
    top, left = (int(rng.integers(size - SIDE + 1)) for size in picture.shape[:2])
    return tinted(picture[top : top + SIDE, left : left + SIDE], rng)


def tinted(picture: Picture, rng: Generator) -> Picture:
    """Turned, mirrored, and in another light: three backgrounds by themselves could be learnt by heart."""
    turned = np.rot90(picture, int(rng.integers(4)))[:, :: int(rng.choice([-1, 1]))]
    tinted: Picture = np.clip(turned * rng.uniform(0.6, 1.2, size=3), 0, 255).astype(np.uint8)
    return tinted


def load_picture(name: str) -> Picture:
    """A picture of scikit-image's wheel: uint8 (H, W, 3), halved so that textures show in a small object."""
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
    """Write H.264; the file appears whole or not at all."""
    partial = file.with_name(f".{file.name}")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        height, width, _ = frames[0].shape
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": _QUALITY}
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    partial.replace(file)
