"""Tests of which file a line of a list means."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path

import pytest

from mvd_scale.data.indexing.listing import Listing, ListOptions
from mvd_scale.data.indexing.sources import list_videos
from mvd_scale.errors import UserError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def listed(folder: Path, text: str, name: str = "list.txt", **options: str) -> Listing:
    (folder / name).write_text(text, encoding="utf-8")
    return list_videos([str(folder / name)], ListOptions(**options))  # type: ignore[arg-type]


def paths(listing: Listing, folder: Path) -> list[str]:
    return [str(Path(row.path).relative_to(folder)) for row in listing.rows]


def test_the_class_of_a_line_tells_videos_of_one_name_apart(tmp_path: Path) -> None:
    touch(tmp_path, "Run/001.mp4", "Walk fast/001.mp4", "Walk_slow/001.mp4")
    named = listed(tmp_path, "001.mp4,Run\n001.mp4,Walk fast\n001.mp4,Walk slow\n")
    assert paths(named, tmp_path) == ["Run/001.mp4", "Walk fast/001.mp4", "Walk_slow/001.mp4"]
    with pytest.raises(UserError, match=r"list.txt:1: '001.mp4' can be any of 3 files, .*Run/001.mp4, .*Walk"):
        listed(tmp_path, "001.mp4 0\n001.mp4 1\n")


def test_a_video_of_another_class_is_not_taken(tmp_path: Path) -> None:
    touch(tmp_path, "videos/Run/001.mp4", "videos/Walk/002.mp4", "videos/Swim/003.mp4")
    root = str(tmp_path / "videos")
    for text, name in (
        ("Run/001.mp4 1\nRun/002.mp4 1\nRun/003.mp4 1\n", "trainlist01.txt"),
        ("Run/001.mp4 0\nRun/002.mp4 0\nRun/003.mp4 0\n", "list.txt"),
        ("/elsewhere/Run/001.mp4 0\n/elsewhere/Run/002.mp4 0\n/elsewhere/Run/003.mp4 0\n", "list.txt"),
    ):
        found = listed(tmp_path, text, name, root=root)
        assert [Path(row.path).is_file() for row in found.rows] == [True, False, False], text
    named = listed(tmp_path, "001.mp4,Run\n002.mp4,Run\nx.mp4,Walk\n", root=root)
    assert [Path(row.path).is_file() for row in named.rows] == [True, False, False]


def test_two_classes_do_not_share_a_file_that_was_searched(tmp_path: Path) -> None:
    touch(tmp_path, "deep/001.mp4")
    with pytest.raises(
        UserError, match=r"list.txt:2: '001.mp4' is found as .*deep/001.mp4, which line 1 has with anoth"
    ):
        listed(tmp_path, "001.mp4 0\n001.mp4 1\n")


def test_a_file_has_one_class_and_lines_that_repeat_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "v/a.mp4", "v/b.mp4")
    with pytest.raises(
        UserError, match=r"list.txt:3: './v/a.mp4' is found as .*v/a.mp4, which line 1 has with another"
    ):
        listed(tmp_path, "v/a.mp4 0\nv/b.mp4 1\n./v/a.mp4 1\n")
    with caplog.at_level(logging.INFO, logger="mvd_scale"):
        repeated = listed(tmp_path, "v/a.mp4 0\nv/b.mp4 1\nv/a.mp4 0\n")
    assert paths(repeated, tmp_path) == ["v/a.mp4", "v/b.mp4", "v/a.mp4"]
    assert "1 lines of" in caplog.text
    # What is not there is left out anyway.
    assert len(listed(tmp_path, "v/none.mp4 0\nv/none.mp4 1\nv/a.mp4 1\n").rows) == 3


@pytest.mark.parametrize(("written", "lies"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_of_a_folder_are_written_in_two_ways(tmp_path: Path, written: str, lies: str) -> None:
    name = "caf\u00e9/a.mp4"
    touch(tmp_path, unicodedata.normalize(lies, name))  # type: ignore[arg-type]
    (row,) = listed(tmp_path, f"{unicodedata.normalize(written, name)} 0\n").rows  # type: ignore[arg-type]
    assert Path(row.path).is_file()


def test_a_path_is_tried_from_the_root_and_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "work/v/a.mp4", "work/lists/v/b.mp4", "work/v/b.mp4", "else/v/c.mp4")
    (tmp_path / "work/lists").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "work")
    found = listed(tmp_path / "work/lists", f"v/a.mp4 0\nv/b.mp4 1\n{tmp_path}/else/v/c.mp4 2\nv/none.mp4 3\n")
    assert paths(found, tmp_path) == ["work/v/a.mp4", "work/lists/v/b.mp4", "else/v/c.mp4", "work/lists/v/none.mp4"]
    assert [row.name for row in found.rows][1] == "v/b.mp4"


def test_another_suffix_and_other_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "v/a.mkv", "v/deep/er/b.mp4", "v/c.MP4", "v/d.mp4", "v/d.avi", "v/1.2_e.mp4")
    with caplog.at_level(logging.INFO, logger="mvd_scale"):
        found = listed(tmp_path, "a.mp4 0\nb 0\nc.mp4 0\nv\\d.avi 0\n1.2_e 0\n", root=str(tmp_path / "v"))
    assert paths(found, tmp_path)[:3] == ["v/a.mkv", "v/deep/er/b.mp4", "v/c.MP4"]
    assert paths(found, tmp_path)[4] == "v/1.2_e.mp4"
    assert "videos of" in caplog.text
    assert "were found by their names, such as a.mp4 in" in caplog.text
    with pytest.raises(UserError, match=r"list.txt:1: 'd.webm' can be any of 2 files"):
        listed(tmp_path, "d.webm 0\n", root=str(tmp_path / "v"))


def test_lists_of_windows_and_names_of_mac_os(tmp_path: Path) -> None:
    touch(tmp_path, "v/a.mp4", f"v/{unicodedata.normalize('NFD', 'café')}.mp4")
    found = listed(tmp_path, f"v\\a.mp4 0\nv/{unicodedata.normalize('NFC', 'café')}.mp4 1\n")
    assert all(Path(row.path).is_file() for row in found.rows)


def test_the_longest_common_path_decides(tmp_path: Path) -> None:
    touch(tmp_path, "r/train/run/1.mp4", "r/val/run/1.mp4", "r/val/walk/1.mp4")
    found = listed(tmp_path, "/old/val/run/1.mp4 0\n/old/val/walk/1.mp4 1\n", root=str(tmp_path / "r"))
    assert paths(found, tmp_path) == ["r/val/run/1.mp4", "r/val/walk/1.mp4"]
    with pytest.raises(UserError, match=r"list.txt:1: '/old/run/1.mp4' can be any of 2 files"):
        listed(tmp_path, "/old/run/1.mp4 0\n", root=str(tmp_path / "r"))


def test_a_flat_folder_of_a_list_with_class_folders(tmp_path: Path) -> None:
    touch(tmp_path, "v/UCF-101/v_Run_g01.avi", "v/UCF-101/v_Walk_g01.avi")
    text = "Run/v_Run_g01.avi 1\nWalk/v_Walk_g01.avi 2\n"
    found = listed(tmp_path, text, "trainlist01.txt", root=str(tmp_path / "v"))
    assert paths(found, tmp_path) == ["v/UCF-101/v_Run_g01.avi", "v/UCF-101/v_Walk_g01.avi"]


def test_kinetics_with_two_copies_of_a_video(tmp_path: Path) -> None:
    touch(
        tmp_path, "v/train/yoga/aa_000001_000011.mp4", "v/val/yoga/aa_000001_000011.mp4", "v/rest/bb_000002_000012.mkv"
    )
    text = "label,youtube_id,time_start,time_end\nyoga,bb,2.0,12.0\nyoga,aa,1,11\n"
    with pytest.raises(UserError, match=r"k.csv:3: 'aa_000001_000011.mp4' can be any of 2 files"):
        listed(tmp_path, text, "k.csv", root=str(tmp_path / "v"))
    found = listed(tmp_path, text, "k.csv", root=str(tmp_path / "v/train"))
    assert paths(found, tmp_path) == ["v/train/bb_000002_000012.mp4", "v/train/yoga/aa_000001_000011.mp4"]


def test_a_folder_of_frames_is_left_out_with_the_reason(tmp_path: Path) -> None:
    touch(tmp_path, "v/a/img_00001.jpg")
    (row,) = listed(tmp_path, "v/a 0\n").rows
    assert row.left_out == "a folder, not a video: make one video of a folder of frames"


def test_a_root_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.root .*nowhere is not a folder"):
        listed(tmp_path, "a.mp4 0\n", root=str(tmp_path / "nowhere"))
