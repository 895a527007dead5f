from __future__ import annotations

import time

import pytest

from mvd_scale.performance.benchmarks.data.clip_stages import ClipStages, StageClock


def spin(milliseconds: float) -> None:
    end = time.thread_time() + milliseconds / 1e3
    while time.thread_time() < end:
        pass


def test_a_stage_within_another_one_counts_once() -> None:
    clock = StageClock()
    inner = clock.timed("inner", lambda: spin(2))
    started = time.thread_time()
    clock.timed("outer", lambda: (spin(4), inner(), inner()))()
    spent = time.thread_time() - started
    assert clock.spent["inner"] >= 0.004
    assert clock.spent["outer"] >= 0.004
    assert sum(clock.spent.values()) <= spent


def test_the_table_ends_with_the_sum_of_the_stages() -> None:
    stages = ClipStages("h264", open=1.0, seek=0.5, decode=20.0, convert=2.0, resize=3.0, hand_over=4.5)
    assert stages.total == pytest.approx(31)
    head, line = ClipStages.table([stages])
    assert head.split()[-1] == "total"
    assert sum(map(float, line.split()[1:-1])) == pytest.approx(float(line.split()[-1]))
