from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image

from mvd_scale.cli import cli
from mvd_scale.data.indexing.statistics import Statistics
from mvd_scale.data.manifest import Manifest, Row


def manifest(videos: int = 400, classes: int = 30) -> Manifest:
    rng = np.random.default_rng(0)
    rows = [
        Row(
            name=f"{k}.mp4",
            path=f"/v/{k}.mp4",
            size=1_000_000,
            frames=100,
            duration=float(rng.gamma(8, 1.2)),
            height=240,
            width=int(rng.choice([320, 426, 428])),
            codec=str(rng.choice(["h264", "vp9"], p=[0.9, 0.1])),
            pixel_format="yuv420p",
            keyframe_interval=int(rng.integers(12, 250)),
            rotation=90 if k == 3 else 0,
            variable_rate=k in (4, 5),
            access="count" if k < 7 else "times" if k < 20 else "packets",
            plain=k >= 20,
            colour="bt709" if k == 50 else "bt601",
            label=int(rng.integers(classes - 1)),
        )
        for k in range(videos)
    ]
    bad = [
        Row(name=f"bad{k}", path="/", left_out=f"truncated: {k} frames readable of 300" if k < 7 else "empty file")
        for k in range(9)
    ]
    return Manifest.from_rows(rows + bad, classes=tuple(f"class {k}" for k in range(classes)))


def test_the_text_tells_what_is_there_and_what_is_not():
    text = Statistics.from_manifest(manifest()).to_text()
    assert "400 videos" in text
    assert "0.4 GB; 9 left out" in text
    assert "2 of variable frame rate, 1 rotated" in text
    assert "30 classes: 0 to " in text
    assert "1 without any" in text
    assert "7  truncated: n frames readable of n, such as bad0" in text
    assert "2  empty file, such as bad7" in text
    assert max(map(len, text.splitlines())) < 120


def test_the_text_tells_what_is_slow_and_why():
    text = Statistics.from_manifest(manifest()).to_text()
    assert re.search("the index of their packets +380 ", text)
    assert re.search("times, which the whole file was decoded for +13 ", text)
    assert "7 videos are decoded from their start for every clip" in text
    assert "`mvd-scale data shard --encode h264`" in text
    on_gpu = next(line for line in text.splitlines() if "PyAV on a GPU" in line)
    assert " 20 " in on_gpu  # those whose packets are no frames; other colours are corrected
    (unaligned,) = re.findall(r"(\d+) videos have a side that is no multiple of 16 pixels", text)
    assert int(unaligned) == sum(width != 320 for width in manifest().width[:400].tolist()) > 0
    fast = Statistics.from_manifest(Manifest.from_rows([Row("a", "a", frames=1)])).to_text()
    assert "--encode" not in fast


def test_counts_add_up():
    statistics = Statistics.from_manifest(manifest())
    assert sum(count for _, count in statistics.classes) == 400
    assert sum(count for _, count in statistics.codecs) == 400
    assert sum(count for _, count, _ in statistics.reasons) == statistics.left_out == 9


def test_the_command_draws_a_picture(tmp_path: Path):
    for name, one in (
        ("many", manifest()),
        ("few", manifest(3, 2)),
        ("none", Manifest.from_rows(manifest().rows[-9:])),
    ):
        one.save(tmp_path / f"{name}.parquet")
        arguments = ["data", "stats", str(tmp_path / f"{name}.parquet"), "--png", str(tmp_path / f"{name}.png")]
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert "left out" in result.output
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        assert picture.shape[1] > 1000
        assert picture.std() > 5
