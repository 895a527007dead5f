"""A manifest whose columns are mapped is the one in memory: rows, digest, stream of clips; its pickle is small."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.random import Generator, Philox, SeedSequence

from mvd_scale.config.data import DataConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.data import columns, manifest
from mvd_scale.data.decoding.backends import Decoders
from mvd_scale.data.decoding.sample_source import ClipSource
from mvd_scale.data.host_cache import cache_folder
from mvd_scale.data.indexing.build import concat_manifests, merge
from mvd_scale.data.manifest import Kind, Manifest, Row
from mvd_scale.data.sampling import permutation
from mvd_scale.data.sampling.sampler import RankShard, Sampler, epoch_order, round_order
from mvd_scale.errors import UserError

MODEL = ModelConfig(width=16, depth=1, heads=1, frames=4, input_size=32, patch_size=8)


@pytest.fixture(autouse=True)
def mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Map manifests and orders of any size, in blocks that they do not fill."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(manifest, "MAPPED_FROM", 1)
    monkeypatch.setattr(permutation, "SHARED_FROM", 1)
    for module in (columns, manifest, permutation):
        monkeypatch.setattr(module, "BLOCK", 7)
    epoch_order.cache_clear()
    round_order.cache_clear()


def rows(count: int = 100) -> list[Row]:
    return [
        Row(
            name=f"é/{k}.mp4",
            path=f"/videos/é/{k}.mp4",
            label=k % 4 - 1,
            frames=20 + k,
            height=48 + k % 3,
            width=64,
            rotation=90 * (k % 2),
            still=k % 4 == 0,
            exif_orientation=k % 9,
            codec=("h264", "vp9", "jpeg")[k % 3],
            dataset=int(k >= count // 2),
            left_out=None if k % 5 else f"broken at {k}",
        )
        for k in range(count)
    ]


def in_memory(made: list[Row], classes: tuple[str, ...] = ("a", "b", "c")) -> Manifest:
    return Manifest._in_memory(made, source="list", classes=classes)


def saved(path: Path, made: list[Row]) -> Manifest:
    in_memory(made).save(path)
    return Manifest.load(path)


def test_a_mapped_manifest_is_the_one_in_memory(tmp_path):
    plain = in_memory(rows())
    for other in (saved(tmp_path / "m.parquet", rows()), plain.shared(), Manifest.from_rows(iter(rows()))):
        assert other._file is not None
        assert other.rows == rows()
        assert other.name == plain.name
        assert other.left_out == plain.left_out
        assert other.digest == plain.digest == "a8946daadc304796"
        assert other.usable.tolist() == plain.usable.tolist() == [k for k in range(100) if k % 5]
        assert other.unusable.tolist() == plain.unusable.tolist() == list(range(0, 100, 5))
        assert other.kinds == plain.kinds
        assert other.dataset_sizes == plain.dataset_sizes == [40, 40]
        assert other.take(np.array([5, 5, 0])).rows == [rows()[k] for k in (5, 5, 0)]
    usable = [row for row in rows() if row.left_out is None]
    assert plain.kinds == Counter(
        Kind(row.still, row.plain, row.codec, row.pixel_format, row.colour, *row.coded_size) for row in usable
    )


@pytest.mark.parametrize("left_out", [range(7), range(7, 21), range(14, 100), range(100)], ids=str)
def test_blocks_without_usable_videos_leave_no_trace(tmp_path, monkeypatch, left_out):
    made = [replace(row, left_out="broken" if k in left_out else None) for k, row in enumerate(rows())]
    loaded = saved(tmp_path / "m.parquet", made)
    assert loaded.usable.tolist() == [k for k in range(100) if k not in left_out]
    assert loaded.unusable.tolist() == list(left_out)
    monkeypatch.setattr(manifest, "BLOCK", 1000)
    assert in_memory(made).digest == loaded.digest


@pytest.mark.parametrize("left_out", [(), (0, 8, 13), range(3, 20), range(0, 60, 2)], ids=str)
def test_the_digest_is_that_of_the_names_and_numbers_one_after_the_other(left_out):
    names = ["", "a\udcff.mp4", "é", ""] * 15
    made = [
        Row(name=name, path=f"/{k}", frames=k, height=48 + k % 3, width=64, dataset=k // 30)
        for k, name in enumerate(names)
    ]
    made = [replace(row, left_out="broken" if k in left_out else None) for k, row in enumerate(made)]
    loaded = in_memory(made).shared()
    computed = replace(loaded)  # which has the mapped columns, but not what was derived from them
    assert computed._file is None
    usable = [row for row in made if row.left_out is None]
    expected = hashlib.sha256("\n".join(row.name for row in usable).encode("utf-8", "surrogateescape"))
    for column in ("frames", "height", "width", "dataset"):
        expected.update(np.array([getattr(row, column) for row in usable], np.int64).tobytes())
    assert loaded.digest == computed.digest == in_memory(made).digest == expected.hexdigest()[:16]
    assert loaded.kinds == computed.kinds == in_memory(made).kinds


@pytest.mark.parametrize("left_out", [None, "broken"])
def test_the_digest_makes_no_object_for_a_name(monkeypatch, left_out):
    for module in (columns, manifest):
        monkeypatch.setattr(module, "BLOCK", 1 << 16)
    count = 20_000
    made = (Row(name=f"{k}.mp4", path="", frames=1, left_out=None if k % 9 else left_out) for k in range(count))
    computed = replace(Manifest.from_rows(made))
    assert computed.digest  # what is made once
    tracemalloc.start()
    try:
        assert computed.digest
        assert tracemalloc.get_traced_memory()[1] < 50 * count
    finally:
        tracemalloc.stop()


def test_a_column_that_is_replaced_is_that_of_the_copy(tmp_path):
    changed = replace(saved(tmp_path / "m.parquet", rows()), frames=np.arange(100))
    assert changed.digest != in_memory(rows()).digest
    assert pickle.loads(pickle.dumps(changed)).frames.tolist() == list(range(100))
    assert changed.shared().frames.tolist() == list(range(100))


def test_a_copy_of_a_manifest_has_the_columns_of_the_first(tmp_path):
    first = saved(tmp_path / "m.parquet", rows())
    first.save(tmp_path / "copy.parquet")
    copy = Manifest.load(tmp_path / "copy.parquet")
    assert copy._file is not None
    assert first._file is not None
    assert os.path.sameopenfile(copy._file._descriptor, first._file._descriptor)
    before = (tmp_path / "copy.parquet").stat()
    first.save(tmp_path / "copy.parquet")
    in_memory(rows()).save(tmp_path / "copy.parquet")
    assert (tmp_path / "copy.parquet").stat().st_ino == before.st_ino


def test_another_manifest_at_the_same_path_has_columns_of_its_own(tmp_path):
    path = tmp_path / "m.parquet"
    first = saved(path, rows())
    # One label more or less may change no size and no bound of the Parquet file: the time does.
    changed = [replace(row, label=2) if row.name == rows()[50].name else row for row in rows()]
    second = saved(path, changed)
    assert second.rows == changed
    assert first.rows == rows()


def test_a_manifest_that_changes_while_it_is_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "m.parquet"
    in_memory(rows()).save(path)
    write = manifest._write_columns

    def change(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        in_memory(rows(50)).save(path)

    monkeypatch.setattr(manifest, "_write_columns", change)
    with pytest.raises(UserError, match="changed while it was read"):
        Manifest.load(path)
    assert not list(cache_folder().glob("*.columns"))


def test_a_read_only_folder_of_the_manifest_is_no_matter(tmp_path):
    folder = tmp_path / "data"
    in_memory(rows()).save(folder / "m.parquet")
    folder.chmod(0o500)
    try:
        assert Manifest.load(folder / "m.parquet").rows == rows()
        assert [file.name for file in folder.iterdir()] == ["m.parquet"]
    finally:
        folder.chmod(0o700)


def test_without_a_cache_workers_still_share_the_columns(tmp_path, caplog):
    in_memory(rows()).save(tmp_path / "m.parquet")
    cache_folder().write_text("in the way")
    loaded = Manifest.load(tmp_path / "m.parquet")
    assert "the manifest" in caplog.text
    assert "cannot be kept in" in caplog.text
    assert len(pickle.dumps(loaded)) < 300
    assert pickle.loads(pickle.dumps(loaded)).rows == rows()


def test_a_url_is_read(tmp_path):
    in_memory(rows()).save(tmp_path / "m.parquet")
    assert Manifest.load(f"file://{tmp_path}/m.parquet").rows == rows()


def test_merge_and_mixture_of_mapped_manifests(tmp_path):
    parts = [replace(saved(tmp_path / f"{k}.parquet", rows()[k * 50 : k * 50 + 50]), part=(k + 1, 2)) for k in (0, 1)]
    merged = merge(parts)
    assert merged.rows == rows()
    assert (merged.source, merged.classes, merged.part) == ("list", ("a", "b", "c"), None)
    other = Manifest.from_rows(rows()[:3], source="other", classes=("c", "d", "e"))
    mixed = concat_manifests([parts[0], other])
    assert mixed.classes == ("a", "b", "c", "d", "e")
    assert mixed.label.tolist() == [row.label for row in rows()[:50]] + [-1, 2, 3]
    assert mixed.dataset.tolist() == [0] * 50 + [1] * 3
    nameless = concat_manifests([other, Manifest.from_rows([Row("x", "/x", label=7)])])
    assert nameless.label.tolist() == [-1] * 4
    assert nameless.classes == ()


def test_stills_are_set_upright_in_blocks():
    upright = Manifest.from_rows(rows()).with_upright_stills()
    for row, before in zip(upright.rows, rows(), strict=True):
        if not before.still or before.exif_orientation in (0, 1):
            assert (row.height, row.width) == (before.height, before.width)
        if before.still:
            turned = before.exif_orientation in (5, 6, 7, 8)
            assert (row.height, row.width) == ((before.width, before.height)[:: 1 if turned else -1])
            assert row.exif_orientation == 1
    assert upright.rows == upright.with_upright_stills().rows


def plans(manifest: Manifest, clips: int = 30, **data: object) -> list[tuple[object, ...]]:
    config = DataConfig.model_validate({"stride": 2, "flip": 0.5, **data})
    sampler = Sampler(manifest, config, MODEL, 3)
    drawn = [sampler.plan(epoch, i, attempt) for epoch in (0, 2) for i in range(clips) for attempt in (0, 1)]
    return [(plan.row, plan.frames.tolist(), plan.copies[0].crop, plan.copies[0].flip) for plan in drawn]


@pytest.mark.parametrize("data", [{}, {"mixture": {"x": {"source": "x"}, "y": {"source": "y", "weight": 0.3}}}])
def test_the_stream_of_clips_is_that_of_a_manifest_in_memory(tmp_path, monkeypatch, data):
    made = [replace(row, dataset=row.dataset if data else 0) for row in rows()]
    mapped = plans(saved(tmp_path / "m.parquet", made), **data)
    assert list(cache_folder().glob("order-*.columns"))
    monkeypatch.setattr(permutation, "SHARED_FROM", 1 << 40)
    epoch_order.cache_clear()
    round_order.cache_clear()
    assert mapped == plans(in_memory(made), **data)


def source(made: Manifest) -> ClipSource:
    sampler = Sampler(made, DataConfig(), MODEL, 0)
    options = {"first": 0, "end": 10, "decoders": Decoders(), "pyav_samples": frozenset(), "timeout": 1.0}
    return ClipSource(made, sampler, RankShard(sampler.clips, 8, 0, 1), **options)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_what_workers_get_does_not_grow_with_the_rows(tmp_path, monkeypatch, kind):
    for module in (columns, manifest, permutation):
        monkeypatch.setattr(module, "BLOCK", 1 << 17)
    sizes = []
    for count in (1000, 100_000):
        made = in_memory(rows()[1:2]).take(np.zeros(count, np.int64))
        if kind == "file":
            made.save(tmp_path / f"{count}.parquet")
            made = Manifest.load(tmp_path / f"{count}.parquet")
        given = source(made.shared())
        given.sampler.plan(0, 0)  # orders that are drawn already do not go along
        sizes.append(len(pickle.dumps(given)))
    assert max(sizes) - min(sizes) < 32
    assert max(sizes) < 5000


def test_a_worker_maps_the_file_of_the_rank(tmp_path):
    loaded = saved(tmp_path / "m.parquet", rows(count=100)[:50])
    assert loaded._file is not None
    inode = os.fstat(loaded._file._descriptor).st_ino
    script = """
import pickle, sys
source = pickle.load(sys.stdin.buffer)
print(source.videos[7].path.encode(), {line.split()[4] for line in open("/proc/self/maps") if ".columns" in line})
"""
    answer = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(source(loaded)), capture_output=True, check=True
    )
    assert answer.stdout.decode().strip() == f"{'/videos/é/7.mp4'.encode()} {{'{inode}'}}"


def test_ranks_that_start_together_convert_a_manifest_once(tmp_path):
    in_memory(rows()).save(tmp_path / "m.parquet")
    script = """
import logging, sys
logging.basicConfig(level="INFO", stream=sys.stdout)
from mvd_scale.data import manifest
manifest.MAPPED_FROM = 1
print(manifest.Manifest.load(sys.argv[1]).digest)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "m.parquet")]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [text.split()[-1] for text in said] == [in_memory(rows()).digest] * 2
    assert "".join(said).count("once for all processes of this host") == 1


@pytest.mark.parametrize(
    ("order", "key"),
    [(lambda: epoch_order(3, 2, 1000), (1, 3, 2)), (lambda: round_order(3, 2, 1, 1000), (3, 3, 2, 1))],
    ids=["epoch", "round"],
)
def test_a_shared_order_is_the_permutation_of_earlier_releases(order, key):
    shared = order()
    assert len(shared) == 1000
    expected = Generator(Philox(SeedSequence(key))).permutation(1000)
    assert [shared[place] for place in range(1000)] == expected.tolist()
