"""Decisions of the coordinator, told what happens on the hosts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from mvd_scale.elastic.coordinator import Coordinator, Member, Membership, Phase
from mvd_scale.elastic.policy import Limits, RestartBudget


@dataclass
class Command:
    """Command whose global batch is 8."""

    holder: str | None = None
    restarts: list[tuple[str, dict[str, int], int]] = field(default_factory=list)

    def allows(self, ranks: int) -> bool:
        return 8 % ranks == 0

    def folder_holder(self) -> str | None:
        return self.holder

    def record_restart(self, reason: str, ranks: dict[str, int], attempt: int) -> None:
        self.restarts.append((reason, ranks, attempt))


class Job:
    """Coordinator with the time of a test."""

    def __init__(self, *hosts: str, slots: int = 2, limits: Limits | None = None, **membership: Any) -> None:
        self.command = Command()
        wanted = Membership(hosts, **{"join_seconds": 60, "wait_seconds": 600} | membership)
        self.coordinator = Coordinator(wanted, self.command, RestartBudget(limits or Limits()))
        self.slots = slots
        self.now = 1000.0

    def join(self, *hosts: str, number: int = 0) -> None:
        for host in hosts:
            self.coordinator.join(host, Member(self.slots, f"address of {host}", 29500), number, self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.coordinator.tick(self.now)

    def end(self, *codes: int, host: str, attempt: int = 1) -> None:
        if any(codes):
            self.coordinator.failed(host, attempt, [code for code in codes if code])
        self.coordinator.ended(host, attempt, list(codes), 29501, self.now)

    def told(self, kind: str) -> dict[str, dict[str, Any]]:
        """Messages of a kind by host; removes all messages."""
        outbox, self.coordinator.outbox = self.coordinator.outbox, []
        return {host: message for host, message in outbox if message["kind"] == kind}

    @property
    def over(self) -> int | None:
        assert (self.coordinator.phase is Phase.OVER) == (self.coordinator.exit_code is not None)
        return self.coordinator.exit_code


def running(*hosts: str, **options: Any) -> Job:
    """Job whose first attempt runs on all hosts."""
    job = Job(*hosts, **options)
    job.join(*hosts)
    job.wait(0)
    return job


def test_all_hosts_start_at_once_with_their_places() -> None:
    job = running("a", "b")
    started = job.told("start")
    assert [started[host]["first_rank"] for host in "ab"] == [0, 2]
    for number, host in enumerate("ab"):
        common = {"world_size": 4, "address": "address of a", "port": 29500, "ranks": 2, "attempt": 1, "node": number}
        assert common.items() <= started[host].items()
    assert job.command.restarts == []


def test_missing_hosts_are_waited_for_and_then_left() -> None:
    job = Job("a", "b")
    job.join("b")
    job.wait(59)
    assert job.told("start") == {}
    job.wait(2)
    assert job.told("start")["b"]["address"] == "address of b"


def test_fewer_than_the_least_hosts_end_after_the_wait() -> None:
    job = Job("a", "b", min_hosts=2)
    job.join("a")
    job.wait(599)
    assert job.over is None
    job.wait(2)
    assert job.over == 75
    assert "1 of at least 2 hosts" in job.told("end")["a"]["reason"]


def test_a_host_that_the_batch_has_no_ranks_for_is_a_spare_and_ends_with_the_others() -> None:
    job = running("a", "b", "c", slots=3)
    assert {host: message["ranks"] for host, message in job.coordinator.outbox if message["kind"] == "start"} == {
        "a": 3,
        "b": 3,
        "c": 2,
    }
    job = running("a", "b", "c", slots=4)
    assert job.told("start").keys() == {"a", "b"}
    for host in "ab":
        job.end(0, 0, 0, 0, host=host)
    assert job.over == 0
    assert job.told("end").keys() == {"a", "b", "c"}


def test_a_batch_that_no_number_of_ranks_divides_is_invalid() -> None:
    job = Job("a")
    job.command.allows = lambda ranks: False  # type: ignore[method-assign]
    job.join("a")
    job.wait(0)
    assert job.over == 2


@pytest.mark.parametrize("code", [75, -9, 1])
def test_a_failure_stops_the_others_and_restarts_after_a_wait(code: int) -> None:
    job = running("a", "b")
    job.coordinator.failed("b", 1, [code])
    stopped = job.told("stop")
    assert {host: message["saves"] for host, message in stopped.items()} == {"a": False, "b": False}
    job.end(-15, -15, host="a")
    assert job.coordinator.phase is Phase.STOPPING
    job.end(code, -15, host="b")
    job.wait(4)
    assert job.told("start") == {}
    job.wait(2)
    assert job.told("start")["b"]["attempt"] == 2
    assert job.told("start") == {}
    reason, ranks, attempt = job.command.restarts[0]
    assert f"exit code {code}" in reason
    assert (ranks, attempt) == ({"a": 2, "b": 2}, 2)


def test_a_host_that_cannot_start_its_ranks_stops_the_others() -> None:
    job = running("a", "b")
    job.coordinator.ended("b", 1, [75], 29501, job.now)
    assert job.told("stop").keys() == {"a"}
    job.end(-15, -15, host="a")
    job.wait(6)
    assert job.told("start").keys() == {"a", "b"}


def test_invalid_input_is_final() -> None:
    job = running("a", "b")
    job.end(2, -15, host="a")
    job.end(-15, -15, host="b")
    assert job.over == 2


def test_the_first_failure_counts_not_what_it_causes() -> None:
    job = running("a", "b")
    job.end(-9, -15, host="a")
    job.end(2, 2, host="b")
    assert job.over is None


def test_a_host_that_is_lost_is_waited_for_and_then_left() -> None:
    job = running("a", "b")
    job.coordinator.leave("b", job.now)
    assert job.told("stop")["a"]["saves"] is False
    job.end(75, 75, host="a")
    job.wait(59)
    assert job.told("start") == {}
    job.wait(2)
    assert job.told("start")["a"]["world_size"] == 2
    assert job.command.restarts[0][0].startswith("lost b")


def test_a_loss_counts_even_where_ranks_saved_because_their_supervisor_is_gone() -> None:
    job = running("a", "b")
    job.coordinator.leave("b", job.now)
    job.end(143, 143, host="a")
    assert job.over is None


def test_a_host_that_comes_back_is_taken_in_after_a_save() -> None:
    job = Job("a", "b")
    job.join("a")
    job.wait(0)
    job.wait(61)
    assert job.told("start").keys() == {"a"}
    job.join("b")
    job.wait(59)
    assert job.told("stop") == {}
    job.wait(2)
    assert job.told("stop")["a"]["saves"] is True
    job.end(143, 143, host="a")
    job.wait(0)
    assert job.told("start")["b"]["world_size"] == 4
    assert job.command.restarts == [("host joined: b", {"a": 2, "b": 2}, 2)]
    assert job.coordinator.budget.failures == []


def test_a_third_host_that_is_missing_does_not_hold_up_one_that_came_back() -> None:
    job = Job("a", "b", "c")
    job.join("a")
    job.wait(0)
    job.wait(61)
    job.join("b")
    job.wait(61)
    job.end(143, 143, host="a")
    job.wait(0)
    assert job.told("start").keys() == {"a", "b"}


def test_a_host_that_adds_no_ranks_does_not_disturb_the_run() -> None:
    job = Job("a", "b", slots=8)
    job.join("a")
    job.wait(0)
    job.wait(61)
    job.told("start")
    job.join("b")
    job.wait(61)
    assert job.coordinator.phase is Phase.RUNNING


@pytest.mark.parametrize(("number", "code"), [(15, 143), (10, 138), (2, 130)])
def test_a_stop_request_reaches_all_hosts_and_is_passed_on(number: int, code: int) -> None:
    job = running("a", "b")
    job.coordinator.request_stop(number, job.now)
    assert {host: (told["signal"], told["saves"]) for host, told in job.told("stop").items()} == {
        "a": (number, True),
        "b": (number, True),
    }
    for host in "ab":
        job.end(code, code, host=host)
    assert job.over == code


def test_a_stop_request_that_meets_a_failing_save_tells_the_failure() -> None:
    job = running("a")
    job.coordinator.request_stop(15, job.now)
    job.end(2, -15, host="a")
    assert job.over == 2


def test_a_stop_request_between_attempts_ends_the_job() -> None:
    job = running("a")
    job.end(75, host="a")
    job.coordinator.request_stop(15, job.now)
    assert job.over == 143


def test_ranks_that_somebody_asked_to_stop_are_not_restarted() -> None:
    job = running("a")
    job.coordinator.failed("a", 1, [143])
    assert job.told("stop")["a"]["saves"] is True
    job.end(143, 143, host="a")
    assert job.over == 143


def test_a_run_that_finished_while_it_was_asked_to_stop_is_finished() -> None:
    job = running("a")
    job.coordinator.request_stop(15, job.now)
    job.end(0, 0, host="a")
    assert job.over == 0


@pytest.mark.parametrize(("code", "last"), [(75, 75), (1, 1)])
def test_too_many_failures_end_the_job(code: int, last: int) -> None:
    job = running("a", limits=Limits(restarts=1, errors=1))
    job.end(code, host="a")
    job.wait(400)
    job.end(code, host="a", attempt=2)
    assert job.over == last


def test_another_coordinator_goes_on_counting_attempts_and_waits_for_the_run_folder() -> None:
    job = Job("a", "b")
    job.command.holder = "another process"
    job.join("b", number=3)
    job.wait(0)
    job.wait(61)
    assert job.told("start") == {}
    job.command.holder = None
    job.wait(3)
    assert job.told("start")["b"]["attempt"] == 4
    assert job.command.restarts[0][0] == "the coordinating host was lost"


def test_a_refusal_by_ranks_of_the_missing_hosts_is_not_final() -> None:
    job = running("a", "b")
    job.coordinator.leave("b", job.now)
    job.end(75, host="a")
    job.wait(61)
    job.command.holder = "a process of b"
    job.end(2, host="a", attempt=2)
    job.wait(61)
    assert job.coordinator.phase is Phase.GATHERING
    job.command.holder = None
    job.wait(3)
    job.end(2, host="a", attempt=3)
    assert job.over == 2


def test_the_first_start_of_all_hosts_leaves_the_refusal_to_the_ranks() -> None:
    job = Job("a")
    job.command.holder = "another process"
    job.join("a")
    job.wait(0)
    assert job.told("start").keys() == {"a"}


def test_what_an_earlier_attempt_still_says_is_ignored() -> None:
    job = running("a")
    job.end(75, host="a")
    job.wait(10)
    job.coordinator.failed("a", 1, [75])
    job.end(0, host="a", attempt=1)
    assert job.coordinator.phase is Phase.RUNNING


def test_a_host_that_comes_at_the_end_ends_as_well() -> None:
    job = running("a", "b")
    job.coordinator.leave("b", job.now)
    job.coordinator.request_stop(15, job.now)
    job.end(143, host="a")
    job.told("end")
    job.join("b")
    assert job.told("end")["b"]["code"] == 143
