"""Tests of values on the command line: YAML, but for text without quotes, which stays as it was typed."""

from __future__ import annotations

from typing import Any

import pytest

from mvd_scale.config.reading import parse_overrides


@pytest.mark.parametrize(
    "text",
    [
        "runs/my run",
        "runs/take #2",
        "runs/it's",
        'runs/"quoted" name',
        "runs/a;b",
        "$(touch marker)",
        "a\nb",
        "a  b",
        "back\\slash",
        "100%h",
        "videos/*.mp4",
        "größe",
    ],
    ids=repr,
)
@pytest.mark.parametrize("form", ["two words", "one word"])
def test_text_is_what_was_typed(text: str, form: str) -> None:
    words = ["--run.folder", text] if form == "two words" else [f"--run.folder={text}"]
    assert parse_overrides(words) == [(["run", "folder"], text)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-2", "1e-2"),
        ("true", True),
        ("null", None),
        ("{kind: pixels, a: b #c\n}", {"kind": "pixels", "a": "b"}),
        ("[1, two]", [1, "two"]),
        ("'a #b'", "a #b"),
        ('"a\\nb"', "a\nb"),
        ("!!str 3", "3"),
        ("a: b", {"a": "b"}),
        ("  bf16 ", "bf16"),
    ],
)
def test_other_values_are_yaml(text: str, value: Any) -> None:
    assert parse_overrides(["--key", text]) == [(["key"], value)]
