"""Encoders leave no real-time priority behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.indexing.transcode import TranscodeOptions, transcode
from mvd_scale.utils.scheduling import leave_real_time
from tests import streams


def policies() -> set[int]:
    return {os.sched_getscheduler(int(task.name)) for task in Path("/proc/self/task").glob("*")}


def test_an_encoder_of_av1_leaves_no_real_time_priority(tmp_path: Path) -> None:
    source = streams.write("h264", "mp4", "whole", tmp_path)
    leave_real_time()
    transcode(
        build_manifest([str(source)], workers=1).row(0),
        source.read_bytes(),
        TranscodeOptions("av1"),
        tmp_path / "a.mp4",
    )
    assert policies() == {os.SCHED_OTHER}


def test_real_time_priority_is_given_back() -> None:
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        pytest.skip("only root may take real-time priority")
    leave_real_time()
    assert policies() == {os.SCHED_OTHER}
