"""Labelled videos without a download: real textures over real pictures, encoded as real videos.

In `appearance` the label is what the object looks like, and motion tells nothing: it drifts anywhere. In `motion` it is
whether object and scene go to the left or to the right, and nothing else tells it. Every frame by itself looks alike in
both classes, and so does the set of all frames without their order: backwards, a video is one of the other class.

The objects and backgrounds of the test videos are other ones than those of the training videos.
"""

from __future__ import annotations

import logging
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

TEXTURES = ("coffee", "coins", "gravel", "ihc", "retina", "text")
"""Pictures that objects are cut from: from the left half for training, from the right half for the test."""

BACKGROUNDS = {
    "train": ("astronaut", "camera", "chelsea", "clock_motion", "moon"),
    "test": ("hubble_deep_field", "motorcycle_left", "rocket"),
}

DIRECTIONS = ("left", "right")

_QUALITY = "10"
"""Of H.264: so fine that no trace of the motion is left in a single frame."""


def make_synthetic(kind: Kind, out: Path, *, train: int, test: int, seed: int = 0) -> Path:
    """Write `out/train/CLASS/*.mp4` and `out/test/CLASS/*.mp4`; files that are there already stay.

    Args:
        kind: what the label is.
        out: folder.
        train: training videos of each class.
        test: test videos of each class.
        seed: of everything that is drawn.

    Raises:
        UserError: scikit-image is not installed, or the folder holds videos that do not belong to the set.
    """
    classes = TEXTURES if kind == "appearance" else DIRECTIONS
    counts = {"train": train, "test": test}
    wanted = {out / s / c / f"{n:05d}.mp4" for s, count in counts.items() for c in classes for n in range(count)}
    others = sorted(set(out.rglob("*.mp4")) - wanted)
    if others:
        raise UserError(f"{out} holds other videos, such as {others[0]}: choose another folder, or remove it")
    made = 0
    for split, count in counts.items():
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
    scene = draw_background(pictures[str(rng.choice(BACKGROUNDS["test" if tested else "train"]))], rng)
    texture = TEXTURES[label] if kind == "appearance" else str(rng.choice(TEXTURES))
    picture = _tinted(_object(pictures[texture], tested, rng), rng)
    start, speeds = rng.uniform(0, SIDE, size=2), rng.uniform(2, 4, size=2)
    if kind == "appearance":
        drift, pan = speeds * rng.choice([-1, 1], size=2), 0.0
    else:
        # The sign is all that differs between the classes.
        drift, pan = np.array([0.0, speeds[0]]), float(speeds[1])
        if DIRECTIONS[label] == "left":
            drift, pan = -drift, -pan
    frames = []
    for number in range(FRAMES):
        # What leaves the frame on one side comes back on the other: every place is as likely in every frame.
        frame = np.roll(scene, round(pan * number), axis=1)
        rows, columns = (
            np.arange(first, first + OBJECT) % SIDE for first in np.rint(start + drift * number).astype(int)
        )
        frame[np.ix_(rows, columns)] = picture
        frames.append(frame)
    return frames


def _object(texture: Picture, tested: bool, rng: Generator) -> Picture:
    """Of a few places of a texture the one with the most to see: a coin, not the cloth between coins."""
    middle = texture.shape[1] // 2
    half = texture[:, middle:] if tested else texture[:, :middle]
    return max((_cut(half, OBJECT, rng) for _ in range(8)), key=np.std)


def draw_background(picture: Picture, rng: Generator) -> Picture:
    """A square of a picture as large as a frame, from a random place: uint8 (96, 96, 3)."""
    return _tinted(_cut(picture, SIDE, rng), rng)


def _cut(picture: Picture, side: int, rng: Generator) -> Picture:
    top, left = (int(rng.integers(size - side + 1)) for size in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def _tinted(picture: Picture, rng: Generator) -> Picture:
    """Turned, mirrored, and in another light: three backgrounds by themselves could be learnt by heart."""
    turned = np.rot90(picture, int(rng.integers(4)))[:, :: int(rng.choice([-1, 1]))]
    # One factor for all channels: colour is a good part of what tells textures apart at this size.
    tinted: Picture = np.clip(turned * rng.uniform(0.7, 1.2), 0, 255).astype(np.uint8)
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
