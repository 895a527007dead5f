"""Locations for others to read hold no credentials."""

from __future__ import annotations

import pytest

from mvd_scale.utils.locations import without_credentials


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (
            "https://me:pw@host.example:8000/a/b.parquet?X-Amz-Signature=0a#here",
            "https://host.example:8000/a/b.parquet",
        ),
        ("https://host/a@b/x.parquet?by=me@host", "https://host/a@b/x.parquet"),
        ("ftp://user:p/w@host/x", "ftp://host/x"),
        ("ftp://user:p?w@host/x", "ftp://..."),
        ("ftp://user:p://w@host/x", "ftp://...p://host/x"),
        ("zip://in.csv::https://me:pw@host/b.zip?sig=1", "zip://in.csv::https://host/b.zip"),
        ("pipe:curl -s https://me:pw@host/x.tar?sig=1", "pipe:curl -s https://host/x.tar"),
        ("s3://bucket/train.parquet", "s3://bucket/train.parquet"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
        ("file:///home/me/x", "file:///home/me/x"),
        ("/home/me/x?y#z@a", "/home/me/x?y#z@a"),
    ],
)
def test_urls_lose_their_credentials(text: str, left: str) -> None:
    assert without_credentials({"source": [text], "seed": 3}) == {"source": [left], "seed": 3}
