"""Decisions of a supervised job: exit codes, limits, waits, and the number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mvd_scale.elastic.policy import Cause, Failure, Limits, RestartBudget, cause_of, first_cause, plan_ranks


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (0, Cause.FINISHED),
        (2, Cause.INVALID),
        (143, Cause.STOPPED),
        (130, Cause.STOPPED),
        (138, Cause.STOPPED),
        (-15, Cause.STOPPED),
        (75, Cause.FAULT),
        (-9, Cause.FAULT),
        (-11, Cause.FAULT),
        (1, Cause.ERROR),
        (137, Cause.ERROR),
    ],
)
def test_exit_codes_tell_the_cause(code: int, cause: Cause) -> None:
    assert cause_of(code) is cause


def test_of_ranks_that_end_together_the_fault_counts() -> None:
    assert first_cause([2, 0, 75]) == (Cause.FAULT, 75)
    assert first_cause([2, 1]) == (Cause.ERROR, 1)
    assert first_cause([143, 2]) == (Cause.INVALID, 2)
    assert first_cause([0, 143]) == (Cause.STOPPED, 143)


def budget(*times: float, cause: Cause = Cause.FAULT, seconds: float = 1, **limits: float) -> RestartBudget:
    made = RestartBudget(Limits(**limits))  # type: ignore[arg-type]
    for time in times:
        assert made.record(Failure(time, seconds, cause)) is None
    return made


def test_restarts_are_limited_within_a_period() -> None:
    spent = budget(0, 10, restarts=2, period=3600)
    said = spent.record(Failure(20, 1, Cause.HOST_LOST))
    assert said == "3 failures in 1 h, of which 2 may be restarted"
    later = budget(0, 10, restarts=2, period=3600)
    assert later.record(Failure(3605, 1, Cause.FAULT)) is None


def test_tracebacks_have_a_lower_limit_of_their_own() -> None:
    errors = budget(0, 10, cause=Cause.ERROR, restarts=10, errors=2)
    assert errors.record(Failure(20, 1, Cause.FAULT)) is None
    assert errors.record(Failure(30, 1, Cause.ERROR)) == (
        "3 errors with a traceback in 24 h, of which 2 may be restarted"
    )


def test_each_wait_is_twice_the_last_up_to_the_longest() -> None:
    waits = [budget(*range(count), backoff=5, longest_backoff=30).delay() for count in range(6)]
    assert waits == [0, 5, 10, 20, 30, 30]


def test_an_attempt_that_ran_for_long_starts_the_waits_anew() -> None:
    known = budget(0, 1, 2, backoff=5, longest_backoff=30)
    known.record(Failure(500, 400, Cause.FAULT))
    assert known.delay() == 5
    known.record(Failure(510, 1, Cause.FAULT))
    assert known.delay() == 10


def test_another_host_takes_over_the_failures_whatever_its_clock_shows() -> None:
    known = budget(100, 130, seconds=7)
    other = RestartBudget(known.limits)
    other.take_over([(age, seconds, cause) for age, seconds, cause in known.to_message(140)], now=9040)  # type: ignore[misc]
    assert [failure.time for failure in other.failures] == [9000, 9030]
    assert other.failures[0].cause is Cause.FAULT
    fewer = budget(5)
    other.take_over(fewer.to_message(6), now=9040)  # type: ignore[arg-type]
    assert len(other.failures) == 2


def divides(batch: int) -> Callable[[int], bool]:
    return lambda ranks: batch % ranks == 0


@pytest.mark.parametrize(
    ("slots", "batch", "planned"),
    [
        ({"a": 8, "b": 8}, 256, {"a": 8, "b": 8}),
        ({"a": 8, "b": 8, "c": 8}, 256, {"a": 8, "b": 8}),
        ({"a": 4, "b": 4, "c": 4}, 30, {"a": 4, "b": 4, "c": 2}),
        ({"b": 3}, 256, {"b": 2}),
        ({"a": 8, "b": 8}, 7, {"a": 7}),
        ({}, 8, {}),
    ],
)
def test_the_largest_number_of_ranks_that_divides_fills_the_first_hosts(
    slots: dict[str, int], batch: int, planned: dict[str, int]
) -> None:
    assert plan_ranks(slots, divides(batch)) == planned
    assert list(plan_ranks(slots, divides(batch))) == list(planned)


def test_no_ranks_where_none_divide() -> None:
    assert plan_ranks({"a": 8}, lambda ranks: False) == {}
