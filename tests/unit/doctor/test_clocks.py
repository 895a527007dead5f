"""Clocks of hosts are compared with the error of the measurement in mind."""

from __future__ import annotations

import time
from itertools import count

import pytest

from mvd_scale.doctor.checks import clocks
from mvd_scale.doctor.checks.clocks import RoundTrip, compare_clocks, judge
from mvd_scale.doctor.findings import Finding
from mvd_scale.doctor.meeting import Meeting
from tests.unit.doctor.conftest import Meet


def trip(ahead: float, seconds: float) -> RoundTrip:
    """A round trip of some seconds, in whose middle rank 0 answered."""
    return RoundTrip(1000.0 + ahead, 1000.0 + seconds / 2, 1000.0 + seconds + ahead)


@pytest.mark.parametrize(
    ("ahead", "seconds", "outcome"),
    [
        (0.001, 0.01, "ok"),
        (-0.4, 0.01, "ok"),
        (0.7, 0.01, "warning"),
        (-0.7, 0.01, "warning"),
        (0.7, 0.6, "ok"),
        (30.0, 0.01, "warning"),
        (-3600.0, 0.4, "warning"),
    ],
)
def test_the_difference_counts_beyond_its_error(ahead: float, seconds: float, outcome: str) -> None:
    finding = judge([trip(ahead, seconds)])
    assert finding.outcome == outcome
    assert finding.figures["ahead"] == pytest.approx(ahead)
    assert finding.figures["error"] == pytest.approx(seconds / 2)


def test_the_quickest_round_trip_counts() -> None:
    assert judge([trip(9.0, 4.0), trip(0.0, 0.002), trip(9.0, 1.0)]).detail == "0.0 ms behind rank 0, within 1.0 ms"


def test_hosts_are_compared_one_after_the_other(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(meeting: Meeting) -> list[Finding]:
        return list(compare_clocks(meeting, [0, 1, 2]))

    first, *others = meet(3, compare)
    assert first[0].detail == "the others are compared with it"
    assert [finding.outcome for (finding,) in others] == ["ok", "ok"]
    assert all(abs(finding.figures["ahead"]) < 1 for (finding,) in others)


def test_a_host_that_does_not_ask_does_not_hold_up_the_others(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "_PATIENCE", 0.3)

    def compare(meeting: Meeting) -> list[Finding]:
        return [] if meeting.seat.rank == 1 else list(compare_clocks(meeting, [0, 1, 2]))

    started = time.monotonic()
    _, _, (finding,) = meet(3, compare)
    assert finding.outcome == "ok"
    assert time.monotonic() - started < 5


def test_a_clock_that_is_wrong_is_found(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    # Times alternate between those that a host and rank 0 read: asked, answered, received.
    readings = count()
    monkeypatch.setattr(clocks, "_ROUND_TRIPS", 1)
    monkeypatch.setattr(clocks.time, "time", lambda: [100.0, 40.0, 100.2][next(readings) % 3])
    _, (finding,) = meet(2, lambda meeting: list(compare_clocks(meeting, [0, 1])))
    assert finding.outcome == "warning"
    assert finding.detail.startswith("60100.0 ms ahead of rank 0, within 100.0 ms: no run depends on it")
    assert "chrony" in finding.remedy
