"""Tests of lists in the formats that data sets publish, and of other kinds of sources."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
import tracemalloc
from itertools import chain
from pathlib import Path

import fsspec
import pytest

from mvd_scale.data.indexing.listing import ListOptions
from mvd_scale.data.indexing.media_probe import probe_video
from mvd_scale.data.indexing.sources import list_videos
from mvd_scale.data.manifest import Manifest
from mvd_scale.errors import UserError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def listed(source: Path | str, **options: object) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    listing = list_videos([str(source)], ListOptions(**options))  # type: ignore[arg-type]
    return [(row.name, row.label) for row in listing.rows], listing.classes


def test_a_folder_of_class_folders_has_labels(tmp_path):
    touch(tmp_path, "train/n02/b.JPEG", "train/n01/a.JPEG", "train/n02/deep/c.png", "train/n01/notes.md")
    rows, classes = listed(tmp_path / "train")
    assert rows == [("n01/a.JPEG", 0), ("n02/b.JPEG", 1), ("n02/deep/c.png", 1)]
    assert classes == ("n01", "n02")
    touch(tmp_path, "train/loose.mp4")
    rows, classes = listed(tmp_path / "train")
    assert {label for _, label in rows} == {-1}
    assert classes == ()


def write_long(folder: Path, form: str, count: int) -> Path:
    """Write a list of some form, or a tar file, of so many videos."""
    file = folder / f"{form}-{count}{'.tar' if form == 'tar' else '.csv'}"
    if form == "tar":
        with tarfile.open(file, "w") as archive:
            for number in range(count):
                archive.addfile(tarfile.TarInfo(f"set/{number:08d}.mp4"))
        return file
    lines = {
        "plain": (f"memory://set/{number:08d}.mp4 {number % 7}" for number in range(count)),
        "named": (f"set/{number:08d}.mp4,class_{number % 7}" for number in range(count)),
        "header": chain(
            ["path,note,label"], (f"memory://set/{number:08d}.mp4,x,{number % 7}" for number in range(count))
        ),
        "kinetics": chain(
            ["label,youtube_id,time_start,time_end,split"],
            (f"class_{number % 7},{number:011d},{number},{number + 10},train" for number in range(count)),
        ),
    }
    file.write_text("\n".join(lines[form]))
    return file


@pytest.mark.parametrize("form", ["plain", "named", "header", "kinetics", "tar"])
def test_memory_does_not_grow_with_a_list_or_a_tar_file(tmp_path, monkeypatch, form):
    expected = list(list_videos([str(write_long(tmp_path, form, 2000))], ListOptions()).rows)
    monkeypatch.setattr("mvd_scale.data.spool.IN_MEMORY", 100)
    monkeypatch.setattr("mvd_scale.data.spool._PIECE", 256)
    monkeypatch.setattr("mvd_scale.data.indexing.list_tables._PIECE", 1024)
    monkeypatch.setattr("mvd_scale.data.indexing.tars._CHUNK", 1024)
    peaks = []
    for count in (500, 2000):
        file = str(write_long(tmp_path, form, count))
        tracemalloc.start()
        listing = list_videos([file], ListOptions())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1500 * 100, "bytes for 1500 more videos"
    assert list(listing.rows) == expected


def test_repeated_lines_are_told_apart_on_disk_as_in_memory(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("mvd_scale.data.spool.IN_MEMORY", 3)
    caplog.set_level(logging.INFO)
    names = [f"{number}.mp4" for number in range(12)]
    touch(tmp_path / "deep", *names)
    lines = [f"{name} 1" for name in [*names, *names[:2]]]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert listed(tmp_path / "list.txt")[0] == [(f"deep/{line.split()[0]}", 1) for line in lines]
    assert "12 videos of" in caplog.text
    assert "such as 0.mp4 in" in caplog.text
    assert "2 lines of" in caplog.text
    (tmp_path / "list.txt").write_text("\n".join([*lines, "7.mp4 2", "1.mp4 2"]))
    with pytest.raises(UserError, match=r"list.txt:15: '7.mp4' is found as .*, which line 8 has with another class"):
        listed(tmp_path / "list.txt")


def test_a_link_to_a_parent_folder_is_not_followed_forever(tmp_path):
    touch(tmp_path, "videos/a.mp4")
    (tmp_path / "videos" / "loop").symlink_to(tmp_path / "videos")
    assert listed(tmp_path / "videos")[0] == [("a.mp4", -1)]


def test_a_recursive_glob_takes_each_folder_once(tmp_path):
    touch(tmp_path, "videos/run/a.mp4", "videos/walk/b.mp4")
    (tmp_path / "videos" / "run" / "loop").symlink_to(tmp_path / "videos")
    assert listed(f"{tmp_path}/videos/**/*.mp4") == ([("run/a.mp4", 0), ("walk/b.mp4", 1)], ("run", "walk"))


def test_a_file_whose_name_is_no_text_is_left_out_not_fatal(tmp_path):
    encoded = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    try:
        with open(encoded, "wb"):
            pass
    except OSError as error:
        pytest.skip(f"this file system wants UTF-8 names: {error}")
    touch(tmp_path, "good.mp4")
    listing = list_videos([str(tmp_path)], ListOptions())
    assert [row.left_out for row in listing.rows] == ["its name is not valid UTF-8: rename the file", None]
    manifest = Manifest.from_rows([probe_video(row, timeout=5) for row in listing.rows])
    manifest.save(tmp_path / "m.parquet")
    assert Manifest.load(tmp_path / "m.parquet").name == ["caf?.mp4", "good.mp4"]


def test_globs(tmp_path):
    touch(tmp_path, "x/a.mp4", "y/b.mp4", "y/c.txt")
    listing = list_videos([f"{tmp_path}/*/*.mp4"], ListOptions())
    assert [row.path for row in listing.rows] == [str(tmp_path / "x/a.mp4"), str(tmp_path / "y/b.mp4")]
    assert [(row.name, row.label) for row in listing.rows] == [("x/a.mp4", 0), ("y/b.mp4", 1)]
    assert listing.classes == ("x", "y")
    assert listed(f"{tmp_path}/x/*.mp4") == ([("a.mp4", -1)], ())
    with pytest.raises(UserError, match="no file matches"):
        list_videos([f"{tmp_path}/*/*.webm"], ListOptions())


def test_csv_with_a_header_and_names_or_numbers(tmp_path):
    file = tmp_path / "list.csv"
    file.write_text('\ufeffvideo,label,length\n"a, b.mp4",run,3\nc.mp4,jump,4\nd.mp4,,4\n', encoding="utf-8")
    assert listed(file) == ([("a, b.mp4", 1), ("c.mp4", 0), ("d.mp4", -1)], ("jump", "run"))
    file.write_text("label,path\n7,a.mp4\n,b.mp4\n")
    assert listed(file) == ([("a.mp4", 7), ("b.mp4", -1)], ())
    file.write_text("path,label\na.mp4\n")
    with pytest.raises(UserError, match=r"list.csv:2: 1 fields, expected 2 as in the header"):
        listed(file)


def test_plain_lists_may_name_urls(tmp_path):
    (tmp_path / "list.txt").write_text("s3://bucket/a.mp4 3\nb.mp4 -1\n")
    listing = list_videos([str(tmp_path / "list.txt")], ListOptions(root="gs://other/videos"))
    assert [row.path for row in listing.rows] == ["s3://bucket/a.mp4", "gs://other/videos/b.mp4"]
    assert [row.label for row in listing.rows] == [3, -1]


def test_kinetics(tmp_path):
    touch(tmp_path, "videos/abseiling/aa-_1_000001_000011.mp4", "videos/bb_000010_000020.webm")
    (tmp_path / "k400.csv").write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "zumba,bb,10,20,train\nabseiling,aa-_1,1,11,train\nyoga,cc,3,13,val\n"
    )
    rows, classes = listed(tmp_path / "k400.csv", root=str(tmp_path / "videos"))
    assert classes == ("abseiling", "yoga", "zumba")
    assert rows == [
        ("bb_000010_000020.webm", 2),
        ("abseiling/aa-_1_000001_000011.mp4", 0),
        ("cc_000003_000013.mp4", 1),  # missing file: the probe reports it
    ]
    rows, _ = listed(tmp_path / "k400.csv", root=str(tmp_path / "videos"), split="train")
    assert len(rows) == 2
    with pytest.raises(UserError, match="no videos of the split test"):
        listed(tmp_path / "k400.csv", root=str(tmp_path / "videos"), split="test")


def test_something_something(tmp_path):
    touch(tmp_path, "videos/78687.webm", "videos/42326.webm")
    labels = {"Holding something": "1", "Dropping something onto something": "0"}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    train = [
        {"id": "78687", "label": "holding potato", "template": "Holding [something]", "placeholders": ["potato"]},
        {"id": "42326", "label": "dropping", "template": "Dropping [something] onto [something]"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "test.json").write_text(json.dumps([{"id": "42326"}]))
    rows, classes = listed(tmp_path / "train.json", root=str(tmp_path / "videos"))
    assert rows == [("78687.webm", 1), ("42326.webm", 0)]
    assert classes == ("Dropping something onto something", "Holding something")
    assert listed(tmp_path / "test.json", root=str(tmp_path / "videos"))[0] == [("42326.webm", -1)]
    (tmp_path / "train.json").write_text(json.dumps([{"id": "1", "template": "Flying"}]))
    with pytest.raises(UserError, match="'Flying' is not one of the 2 known classes"):
        listed(tmp_path / "train.json", root=str(tmp_path / "videos"))


def test_ucf101(tmp_path):
    touch(tmp_path, "videos/Archery/v_Archery_g01_c01.avi", "videos/v_Basketball_g01_c01.avi")
    (tmp_path / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 Archery\n3 Basketball\n")
    (tmp_path / "trainlist01.txt").write_text("Archery/v_Archery_g01_c01.avi 2\n")
    (tmp_path / "testlist01.txt").write_text("Basketball/v_Basketball_g01_c01.avi\n")
    rows, classes = listed(tmp_path / "trainlist01.txt", root=str(tmp_path / "videos"))
    assert (rows, classes) == ([("Archery/v_Archery_g01_c01.avi", 1)], ("ApplyEyeMakeup", "Archery", "Basketball"))
    listing = list_videos([str(tmp_path / "testlist01.txt")], ListOptions(root=str(tmp_path / "videos")))
    (row,) = listing.rows
    assert row.label == 2
    assert row.path == str(tmp_path / "videos/v_Basketball_g01_c01.avi")


def test_hmdb51(tmp_path):
    touch(tmp_path, "videos/wave/a b.avi", "videos/wave/c.avi", "videos/run/d.avi")
    folds = tmp_path / "splits"
    folds.mkdir()
    (folds / "wave_test_split1.txt").write_text("a b.avi 1 \nc.avi 2 \n")
    (folds / "run_test_split1.txt").write_text("d.avi 1 \nunused.avi 0 \n")
    (folds / "run_test_split2.txt").write_text("d.avi 2\n")
    root = str(tmp_path / "videos")
    assert listed(folds, root=root, split="train") == ([("run/d.avi", 0), ("wave/a b.avi", 1)], ("run", "wave"))
    assert listed(folds, root=root, split="test")[0] == [("wave/c.avi", 1)]
    assert listed(folds, root=root, split="test", fold=2) == ([("run/d.avi", 0)], ("run",))
    assert len(listed(f"{folds}/*_split1.txt", root=root)[0]) == 3
    with pytest.raises(UserError, match="no files"):
        listed(folds, root=root, fold=3)


def test_tar_files_and_labels_of_webdataset(tmp_path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (("../../etc/a.mp4", b"first"), ("b.webm", b"second"), ("b.cls", b"7\n"), ("c.txt", b"")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (first, second) = list_videos([str(path)], ListOptions()).rows
    assert (first.name, first.path, first.label) == ("../../etc/a.mp4", str(path), -1)
    assert (second.name, second.label) == ("b.webm", 7)
    data = path.read_bytes()
    assert data[first.offset : first.offset + first.size] == b"first"
    assert data[second.offset : second.offset + second.size] == b"second"
    assert os.listdir(tmp_path) == ["shard.tar"]
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(UserError, match="cannot be read as a tar file"):
        list_videos([str(tmp_path / "bad.tar")], ListOptions())


def tar(path: Path, **members: str) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    return path


def test_a_key_of_webdataset_ends_at_the_first_dot(tmp_path, caplog):
    members = {
        "./a/0.left.mp4": "x",
        "a/0.cls": "3",
        "1.mp4": "x",
        "1.seg.cls": "4.0",
        "v1.5.mp4": "x",
        "v1.6.mp4": "x",
    }
    labels = {"v1.5.cls": "7", "v1.6.cls": "8"}
    path = tar(tmp_path / "s.tar", **members, **labels)
    assert [label for _, label in listed(path)[0]] == [3, 4, 7, 8]
    path = tar(tmp_path / "s.tar", **{"a/0.left.mp4": "x", "a/0.cls": "3", "b/0.mp4": "x", "c/9.json": "{}"})
    with caplog.at_level(logging.INFO, logger="mvd_scale"):
        assert listed(path)[0] == [("a/0.left.mp4", 3), ("b/0.mp4", -1)]
    assert "1 members of" in caplog.text
    assert "describe videos that it does not hold, such as c/9.json" in caplog.text
    assert "1 of 2 videos of" in caplog.text
    assert "have no label, because a .cls member of the same key is missing, such as b/0.mp4" in caplog.text
    path = tar(tmp_path / "s.tar", **{"0.mp4": "x", "0.a.cls": "3", "0.b.cls": "4"})
    with pytest.raises(UserError, match=r"0.mp4 has several labels, \[3, 4\]"):
        listed(path)
    with pytest.raises(UserError, match=r"0.cls holds 'cat': expected the number of a class"):
        listed(tar(tmp_path / "s.tar", **{"0.mp4": "x", "0.cls": "cat"}))


def test_a_tar_file_that_goes_on_behind_its_end_is_refused(tmp_path, caplog):
    path = tar(tmp_path / "s.tar", **{"0.mp4": "x", "0.cls": "1", "1.mp4": "x", "1.cls": "2"})
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2].offset
    damaged = bytearray(whole)
    damaged[third + 150] ^= 1
    for content, place in ((bytes(damaged), third), (whole + whole, len(whole)), (whole[: third + 100], third)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"it goes on at byte {place}. Expected one whole tar file"):
            listed(path)
    path.write_bytes(whole[:third])
    assert listed(path)[0] == [("0.mp4", 1)]
    assert "has no end mark: members may be missing" in caplog.text


def test_members_that_are_no_labels_are_counted_and_labels_are_of_one_content(tmp_path, caplog):
    path = tar(tmp_path / "s.tar", **{"0.MP4": "x", "0.CLS": "1", "0.json": "{}", "0.label": "2"})
    with caplog.at_level(logging.INFO, logger="mvd_scale"):
        assert listed(path)[0] == [("0.MP4", 1)]
    assert "2 members of" in caplog.text
    assert "are not taken, by their suffixes: 1 .json, 1 .label" in caplog.text
    tar(path, **{"0.mp4": "x", "0.cls": "1"})
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("0.cls")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"2"))
    with pytest.raises(UserError, match=r"0\.cls is in it more than once, with other contents"):
        listed(path)


def test_members_that_are_no_range_of_the_file_are_left_out(tmp_path):
    path = tar(tmp_path / "s.tar", **{"a.mp4": "x"})
    with tarfile.open(path, "a") as archive:
        for name, kind in (("hard.mp4", tarfile.LNKTYPE), ("soft.mp4", tarfile.SYMTYPE), ("holes.mp4", b"S")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.mp4"
            archive.addfile(member)
    reasons = [row.left_out for row in list_videos([str(path)], ListOptions()).rows]
    assert reasons[0] is None
    assert [str(reason).split(":")[0] for reason in reasons[1:]] == [
        "a link in the tar file",
        "a link in the tar file",
        "stored with holes in the tar file",
    ]


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz", "s.zip", "list.csv.gz", "list.xlsx"])
def test_packed_files_are_told(tmp_path, name):
    touch(tmp_path, name)
    with pytest.raises(UserError, match=r"cannot be indexed: .*\. Unpack it first"):
        listed(tmp_path / name)


HIDDEN = (
    "__MACOSX/run/._a.mp4",
    "run/._a.mp4",
    "run/.hidden.mp4",
    "run/.ipynb_checkpoints/a.mp4",
    "@eaDir/a.mp4/s.jpg",
)


def test_hidden_files_and_those_of_systems_are_nothing(tmp_path):
    source = tmp_path / ".cache" / "set"
    touch(source, "run/a.mp4", "walk/b.mp4", *HIDDEN)
    expected = ([("run/a.mp4", 0), ("walk/b.mp4", 1)], ("run", "walk"))
    assert listed(source) == expected
    assert listed(f"{source}/**/*.mp4") == expected
    memory = fsspec.filesystem("memory")
    for name in ("run/a.mp4", "walk/b.mp4", *HIDDEN):
        memory.pipe_file(f"/hidden/{name}", b"x")
    assert listed("memory://hidden") == expected
    path = tar(tmp_path / "s.tar", **dict.fromkeys(("./run/a.mp4", *HIDDEN), "x"))
    assert [name for name, _ in listed(path)[0]] == ["./run/a.mp4"]
    assert listed(f"{source}/run/.hidden.*")[0] == [(".hidden.mp4", -1)]


def test_files_that_are_not_taken_are_counted_by_kind(tmp_path, caplog):
    touch(tmp_path, "v/a.mp4", "v/b.gif", "v/c.txt", "v/d.txt", "v/e.npy", "v/README")
    with caplog.at_level(logging.INFO, logger="mvd_scale"):
        assert [name for name, _ in listed(tmp_path / "v")[0]] == ["a.mp4", "b.gif"]
    assert "4 files of" in caplog.text
    assert "are not taken, by their suffixes: 2 .txt, 1 no suffix, 1 .npy" in caplog.text
    touch(tmp_path, "w/a.txt", "w/b.heic")
    with pytest.raises(UserError, match=r"no videos in the folder .*w, which holds 1 .txt, 1 .heic: expected"):
        listed(tmp_path / "w")


def test_urls(tmp_path):
    memory = fsspec.filesystem("memory")
    for name in ("cats/a.mp4", "dogs/b.mp4"):
        memory.pipe_file(f"/set/{name}", b"x")
    memory.pipe_file("/set/list.txt", b"cats/a.mp4 4\n")
    listing = list_videos(["memory://set"], ListOptions())
    assert [(row.name, row.path, row.label) for row in listing.rows] == [
        ("cats/a.mp4", "memory:///set/cats/a.mp4", 0),
        ("dogs/b.mp4", "memory:///set/dogs/b.mp4", 1),
    ]
    assert [row.path for row in list_videos(["memory://set/*/*.mp4"], ListOptions()).rows] == [
        "memory:///set/cats/a.mp4",
        "memory:///set/dogs/b.mp4",
    ]
    (row,) = list_videos(["memory://set/list.txt"], ListOptions()).rows
    assert (row.label, row.path) == (4, "memory://set/cats/a.mp4")
    with pytest.raises(UserError, match="does not exist"):
        list_videos(["memory://nothing/here"], ListOptions())
    with pytest.raises(UserError, match="Protocol not known: nowhere"):
        list_videos(["nowhere://bucket"], ListOptions())


def test_several_sources_unite_their_classes_by_name(tmp_path):
    touch(tmp_path, "one/run/a.mp4", "one/wave/b.mp4", "two/jump/c.mp4", "two/run/d.mp4", "loose/e.mp4")
    listing = list_videos([str(tmp_path / "one"), str(tmp_path / "two")], ListOptions())
    assert listing.classes == ("run", "wave", "jump")
    assert [row.label for row in listing.rows] == [0, 1, 2, 0]
    assert len(list_videos([str(tmp_path / "one"), str(tmp_path / "loose")], ListOptions()).rows) == 3
    (tmp_path / "list.txt").write_text("one/run/a.mp4 5\n")
    with pytest.raises(UserError, match="has class names, but"):
        list_videos([str(tmp_path / "one"), str(tmp_path / "list.txt")], ListOptions())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.json", "{}", "is not a list of Something-Something"),
        ("list.json", "{", "is not valid JSON"),
        ("list.xyz", "a 1", "cannot be indexed: expected a folder"),
        ("list.txt", "", "is empty"),
    ],
)
def test_what_is_no_source_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        listed(tmp_path / name)


def test_templates_of_something_that_are_none(tmp_path):
    touch(tmp_path, "1.webm", "2.webm")
    (tmp_path / "t.json").write_text('[{"id": 1, "template": "Holding [something]"}, {"id": 2, "template": null}]')
    assert listed(tmp_path / "t.json") == ([("1.webm", 0), ("2.webm", -1)], ("Holding something",))


def test_columns_that_cannot_be_told_apart_and_columns_without_labels(tmp_path, caplog):
    touch(tmp_path, "a.mp4")
    path = tmp_path / "list.csv"
    path.write_text("path,label,label\na.mp4,0,5\n")
    with pytest.raises(UserError, match=r"list.csv:1: several columns are called label: rename"):
        listed(path)
    path.write_text("path,target\na.mp4,0\n")
    assert listed(path)[0] == [("a.mp4", -1)]
    assert "has no column of labels, so that its videos get none: its columns are path, target" in caplog.text
    path.write_text("path,label_id,label\na.mp4,7,run\n")
    with caplog.at_level(logging.INFO, logger="mvd_scale"):
        assert listed(path) == ([("a.mp4", 0)], ("run",))
    assert "labels are those of the column label, not of label_id" in caplog.text
    path.write_text(f"path,label,caption\na.mp4,3,{'long ' * 40_000}\n")
    assert listed(path)[0] == [("a.mp4", 3)]


def test_labels_that_count_from_1_are_told(tmp_path, caplog):
    touch(tmp_path, "a.mp4", "b.mp4")
    path = tmp_path / "list.csv"
    for labels, told in (((1, 2), True), ((0, 1), False), ((-1, 1), True), ((-1, -1), False)):
        caplog.clear()
        path.write_text("path,label\na.mp4,{}\nb.mp4,{}\n".format(*labels))
        with caplog.at_level(logging.INFO, logger="mvd_scale"):
            assert [label for _, label in listed(path)[0]] == list(labels)
        assert ("has the label 0: if its labels count from 1, class 0 is empty" in caplog.text) == told


def test_the_split_of_any_list_with_such_a_column(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    path = tmp_path / "list.csv"
    path.write_text("path,label,split\na.mp4,0,Train\nb.mp4,1,validation\n")
    assert listed(path, split="train")[0] == [("a.mp4", 0)]
    assert listed(path, split="validation")[0] == [("b.mp4", 1)]
    assert len(listed(path)[0]) == 2
    with pytest.raises(UserError, match="lists no videos of the split test"):
        listed(path, split="test")
    for text in ("path,label\na.mp4,0\n", "a.mp4 0\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="has no column `split`: leave --split train out"):
            listed(path, split="train")


@pytest.mark.parametrize("classes", ["none.txt", "."])
def test_a_file_of_classes_that_cannot_be_read(tmp_path, classes):
    touch(tmp_path, "a.mp4")
    (tmp_path / "list.csv").write_text("a.mp4,run\n")
    with pytest.raises(UserError, match=r"cannot be read: (No such file|Is a directory)"):
        listed(tmp_path / "list.csv", classes=str(tmp_path / classes))


@pytest.mark.parametrize("label", ["9" * 5000, "1e400", "[1, 2]", "(3)"])
def test_a_label_that_is_no_number_of_a_class(tmp_path, label):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "list.csv").write_text(f'path,label\na.mp4,"{label}"\nb.mp4,run\n')
    with pytest.raises(UserError, match=r"list.csv:2: the label .* is no number of a class"):
        listed(tmp_path / "list.csv")


def test_json_that_is_nested_too_deep(tmp_path):
    (tmp_path / "t.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="its brackets are nested too deep"):
        listed(tmp_path / "t.json")
