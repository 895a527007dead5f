"""Checks always end, in a finding with a remedy, however they fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from mvd_scale.doctor.findings import Finding, HostCheck, TimeLimit, hanging, within


def check(make: object, seconds: float = 5) -> HostCheck:
    return HostCheck("machine", "thing", make, seconds, "restart the thing")  # type: ignore[arg-type]


@pytest.mark.parametrize("outcome", ["warning", "fail"])
def test_a_fault_without_remedy_is_refused(outcome: str) -> None:
    with pytest.raises(ValueError, match="'thing' has no remedy"):
        Finding("thing", outcome, "broken")  # type: ignore[arg-type]


def test_a_check_yields_its_findings() -> None:
    assert check(lambda: [Finding("thing", "ok", "sound")]).findings() == [Finding("thing", "ok", "sound")]


def test_a_check_that_raises_is_a_failure() -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("thing", "ok", "sound")
        raise ZeroDivisionError("by zero\nand more")

    (finding,) = check(broken).findings()
    assert finding.outcome == "fail"
    assert finding.detail == "the check ended by ZeroDivisionError: by zero"
    assert finding.remedy


def test_a_check_that_hangs_is_a_failure_in_time() -> None:
    ended = threading.Event()
    started = time.monotonic()
    (finding,) = check(lambda: ended.wait(60), seconds=0.1).findings()
    assert time.monotonic() - started < 5
    assert (finding.outcome, finding.detail) == ("fail", "no answer within 0.1 s")
    assert finding.remedy == "restart the thing"
    assert finding.figures == {"hung": True}
    assert hanging()
    ended.set()


def test_within_hands_on_results_and_exceptions() -> None:
    assert within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        within(5, lambda: {}["missing"])
    with pytest.raises(TimeLimit, match=r"within 0\.05 s"):
        within(0.05, lambda: time.sleep(0.5))
