"""Tests of lists in the writings that people and spreadsheets have: every one is read alike, or named."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvd_scale.data.indexing.list_tables import read_table, whole_number
from mvd_scale.data.indexing.listing import ListOptions
from mvd_scale.data.indexing.sources import list_videos
from mvd_scale.errors import UserError

PAIRS = [("a.mp4", 0), ("b c.mp4", 1), ("d, e.mp4", 12)]


def listed(file: Path, **options: str) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    listing = list_videos([str(file)], ListOptions(**options))  # type: ignore[arg-type]
    return [(row.name, row.label) for row in listing.rows], listing.classes


def written(folder: Path, text: str | bytes, name: str = "list.csv") -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "lines",
    [
        ["a.mp4 0", "b c.mp4 1", "d, e.mp4 12"],
        ['a.mp4   " 0"', '"b c.mp4" "1"', "  d, e.mp4\t12  "],
        ["a.mp4,0", "b c.mp4,1", '"d, e.mp4",12'],
        ["a.mp4, 0", "", "b c.mp4, 1", '"d, e.mp4", "12"', "  "],
        ["a.mp4;0;", "b c.mp4;1;", "d, e.mp4;12;"],
        ["a.mp4\t0", "b c.mp4\t1", "d, e.mp4\t12"],
        ["path,label", "a.mp4,0", "b c.mp4,1", '"d, e.mp4",12'],
        ['"Label";"Video Name";"Path"', "0;x;a.mp4", "1;y;b c.mp4", "12;;d, e.mp4"],
        ["sep=;", "path;label", "a.mp4;0", "b c.mp4;1", "d, e.mp4;12"],
        [";Video;Path;Label", "0;x;a.mp4;0,0", "1;y;b c.mp4;1,0", "2;z;d, e.mp4;12,00"],
        ["path\tlabel\tcaption", 'a.mp4\t0\t"two\nlines\twith ""quotes"""', "b c.mp4\t1\t", "d, e.mp4\t12\t3"],
        ["path label", "a.mp4 0", "b c.mp4 1", "d, e.mp4 12"],
        ["label,filepath,,", "0.0,a.mp4,,", "1.0,b c.mp4,,,", '1.2e1,"d, e.mp4",,'],
    ],
)
def test_every_writing_means_the_same(tmp_path: Path, lines: list[str], ending: str, encoding: str) -> None:
    file = written(tmp_path, ending.join(lines).encode(encoding))
    assert listed(file) == (PAIRS, ())


@pytest.mark.parametrize(
    ("text", "number"),
    [(text, 2) for text in ("2", "2.0", " 2", "2.", "+2", "2e0", "02", "0.2E1")]
    + [("-1", -1), ("-1.0", -1)]
    + [(text, None) for text in ("2.5", "two", "", "1_0", "nan", "inf", "1e999", "2 3", "1,0", "0x2")],
)  # fmt: skip
def test_whole_numbers_in_any_writing(text: str, number: int | None) -> None:
    assert whole_number(text) == number


def test_names_without_a_header(tmp_path: Path) -> None:
    expected = ([("a.mp4", 1), ("b.mp4", 0)], ("jump", "run"))
    assert listed(written(tmp_path, "a.mp4,run\nb.mp4,jump\n")) == expected
    assert listed(written(tmp_path, "a.mp4 run\nb.mp4 jump\n")) == expected
    classes = written(tmp_path, "id,name\n0,run\n1,jump\n2,swim\n", "classes.csv")
    assert listed(written(tmp_path, "a.mp4,run\nb.mp4,jump\n"), classes=str(classes)) == (
        [("a.mp4", 0), ("b.mp4", 1)],
        ("run", "jump", "swim"),
    )


def test_whole_videos_without_a_class(tmp_path: Path) -> None:
    assert listed(written(tmp_path, "a.mp4 0 -1\nb c.mp4 0 -1\n")) == ([("a.mp4", -1), ("b c.mp4", -1)], ())
    assert listed(written(tmp_path, "a.mp4,0,-1\n")) == ([("a.mp4", -1)], ())
    with pytest.raises(UserError, match=r"list.csv:1: 3 columns"):
        listed(written(tmp_path, "a.mp4 0 -1\nb.mp4 5 -1\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v/a.mp4 1 5 7\nv/b.mp4 2\n", r"list.csv:1: 4 columns in 'v/a.mp4 1 5 7', expected 2"),
        ("v/a.mp4 1,5,7\nv/b.mp4 2\n", r"list.csv:1: no label in"),
        ("v/a.mp4,3\nv/b.mp4,1,good\n", r"list.csv:2: 3 columns .* the columns path and label are taken"),
        ("v_Archery 164 2\n", r"list.csv:1: 3 columns .* folders of frames .* Make a video of each folder"),
        ("v_Archery 1 164 2\n", r"list.csv:1: 4 columns .* folders of frames"),
        ("v/clip one 164 2\n", r"list.csv:1: 3 columns .* folders of frames"),
        ("v_Archery,164,2\n", r"list.csv:1: 3 columns .* folders of frames"),
        ("path,label\na.mp4,1\nb.mp4,2.5\n", r"list.csv:3: the label '2.5' is no number of a class"),
        ("path,label\na.mp4,1 5\nb.mp4,2\n", r"list.csv:2: the label '1 5' is no number of a class"),
        ("path,label\na.mp4,9999999999\n", r"list.csv:2: the label '9999999999' is no number of a class"),
        ("path,label\na.mp4,1\nb.mp4,run\n", r"list.csv:2: the label '1' is a number, but 'run' in line 3 is a name"),
        ("a.mp4,run\nb.mp4,1\n", r"list.csv:1: no label in 'a.mp4,run'"),
        ("clip,kind\na.mp4,1\n", r"list.csv:1: no label in 'clip,kind'.*If this line is a header"),
        ("clip,kind\na.mp4,run\n", r"list.csv:1: no label in 'clip,kind'"),
        ('path,label\na.mp4,1\n"b.mp4,2\nc.mp4,3\n', r"list.csv:3: the fields cannot be told apart"),
        ('path,label\na.mp4,1\n"b" c.mp4,2\n', r"list.csv:3: the fields cannot be told apart"),
        ("path,filepath,label\na.mp4,b,1\n", r"list.csv:1: the columns path and filepath can both be the path"),
        ("file,video,label\na.mp4,b,1\n", r"list.csv:1: the columns file and video can both be the path"),
        ("path,label\n,1\n", r"list.csv:2: no path in the column path"),
        ('path,label\na.mp4,"1\n2"\n', r"list.csv:2: "),
        ("path,label,note\na.mp4,1,\"x\ny\"\nb.mp4,1\n", r"list.csv:4: 2 fields, expected 3"),
        ("path,label\n", "is empty"),
        ("a.mp4 1\n\xff\xfe".encode("latin-1"), r"not a text file.*0xff, near line 2"),
        ("a.mp4 1\nb.mp4 2".encode("utf-16-le"), r"not a text file.*null character is in line 1"),
        ("youtube_id,time_start,time_end\nx,1.5,11\n", r"list.csv:2: the time '1.5' is malformed"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        listed(written(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "1 run\n3 jump\n", "have gaps or repeat"),
        ("c.txt", "run\nrun\n", "the class 'run' is named more than once"),
        ("c.json", '{"run": "one"}', "expected a JSON object of class names and numbers"),
        ("c.json", '{"run": 0', r"c.json:1: the file is not valid JSON"),
        ("c.txt", "run\njump\n", "label 5, but .* has 2 classes, 0 to 1"),
    ],
)
def test_files_of_classes_that_do_not_fit(tmp_path: Path, name: str, text: str, message: str) -> None:
    classes = written(tmp_path, text, name)
    with pytest.raises(UserError, match=message):
        listed(written(tmp_path, "a.mp4 0\nb.mp4 5\n"), classes=str(classes))


def test_names_that_are_numbers_are_told_by_a_file_of_classes(tmp_path: Path) -> None:
    classes = written(tmp_path, "b\n7\na\n", "classes.txt")
    assert listed(written(tmp_path, "path,label\nx.mp4,7\ny.mp4,a\n"), classes=str(classes))[0] == [
        ("x.mp4", 1),
        ("y.mp4", 2),
    ]


def test_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    text = 'path,label,note\n\na.mp4,0,"x\ny"\n\nb.mp4,1,z\n'
    assert [line for line, _ in read_table(str(written(tmp_path, text))).records] == [3, 6]
    assert [line for line, _ in read_table(str(written(tmp_path, "\nsep=;\n\na.mp4;0\n"))).records] == [4]
