"""Videos in which a bright rectangle stands still around each second, and elsewhere in the next one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.manifest import Manifest
from mvd_scale.detection.boxes import Boxes, KeyFrame

HEIGHT, WIDTH, RATE, SECONDS, START = 64, 96, Fraction(10000, 1001), 4, 100


@dataclass(frozen=True)
class Scene:
    """Videos and the boxes of their rectangles; one video lies on its side."""

    folder: Path
    videos: Manifest
    truth: Boxes


def encode(path: Path, frames: list[np.ndarray], rate: Fraction) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt, stream.gop_size = "yuv420p", 6
        stream.options = {"preset": "veryfast", "crf": "5"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder, rng = tmp_path_factory.mktemp("scene"), np.random.default_rng(0)
    keys, corners = [], []
    for turns, name in ((0, "upright"), (1, "turned"), (0, "third")):
        frames = []
        for second in range(SECONDS):
            x, y = 2 * rng.integers(0, 24), 2 * rng.integers(0, 16)
            w, h = 2 * rng.integers(8, 24), 2 * rng.integers(6, 16)
            picture = np.full((HEIGHT, WIDTH, 3), 20, np.uint8)
            picture[y : y + h, x : x + w] = 230
            frames += [np.rot90(picture, -turns)] * 10
            keys.append(KeyFrame(name, START + second + 0.5))
            corners.append([x / WIDTH, y / HEIGHT, min(x + w, WIDTH) / WIDTH, min(y + h, HEIGHT) / HEIGHT])
        encode(folder / f"{name}.mp4", frames, RATE)
    count = len(keys)
    manifest = build_manifest(folder, workers=1)
    rows = [
        replace(row, rotation=90, height=HEIGHT, width=WIDTH) if row.name == "turned.mp4" else row
        for row in manifest.rows
    ]
    actions = [1 + n % 2 for n in range(count)]
    return Scene(folder, Manifest.from_rows(rows), Boxes.of(keys, corners, actions, [1.0] * count))
