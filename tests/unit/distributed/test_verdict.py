"""Tests of the judgement on ranks: silence, hangs, and the rank that the others wait for."""

from __future__ import annotations

import threading

from mvd_scale.distributed.health.progress import Position, Progress
from mvd_scale.distributed.health.verdict import Heartbeats, Member, Verdict, name_phases, name_ranks

MEMBERS = {rank: Member(rank, f"node-{rank // 2}", 100 + rank) for rank in range(12)}


def beat(number: int, position: Position) -> str:
    return f"{number} {position}"


def at(arrivals: int, phase: str = "backward", patience: int = 1) -> Position:
    return Position(arrivals, 3, 0, patience, 7, phase)


def heartbeats(*positions: Position, now: float = 0) -> Heartbeats:
    beats = Heartbeats()
    for rank, position in enumerate(positions):
        beats.record(rank, beat(0, position), now)
    return beats


def test_positions_survive_the_store() -> None:
    progress = Progress()
    progress.enter("data wait", 3)
    progress.tick()
    progress.begin_writing(progress, 2)
    progress.count_piece()
    progress.count_piece()
    progress.count_part()
    assert Position.parse(str(progress.position)) == progress.position == (1, 0, 1, 1, 3, "data wait", 1, 2, 2)


def test_of_several_checkpoints_that_are_being_written_the_oldest_counts() -> None:
    progress = Progress()
    for name, step in (("S", 10), ("B", 15)):
        progress.begin_writing(name, step)
    assert progress.position.writing == 10
    for name in ("S", "S", "B"):
        progress.end_writing(name)
    assert progress.position.writing == 0


def test_ticks_of_a_thread_take_no_phase_back() -> None:
    progress, ended = Progress(), threading.Event()

    def tick() -> None:
        while not ended.is_set():
            progress.tick()

    thread = threading.Thread(target=tick)
    thread.start()
    for step in range(50_000):
        progress.enter("forward", step)
    ended.set()
    thread.join()
    assert progress.position.arrivals == 50_000


def test_a_phase_within_another_returns_to_the_phase_before() -> None:
    progress = Progress()
    progress.enter("save", 5)
    with progress.passing("room for step 5"):
        assert progress.position.patience == 0
    assert progress.position[3:6] == (1, 5, "save")


def test_rank_whose_heartbeat_stands_still_is_silent() -> None:
    beats = heartbeats(at(1), at(1))
    for now in range(1, 6):
        beats.record(0, beat(now, at(1)), now)
        beats.record(1, beat(0, at(1)), now)
    assert beats.silent(5, 4.5) == [1]
    assert beats.silent(4, 4.5) == []


def test_hang_needs_that_no_rank_moves() -> None:
    beats = heartbeats(at(4), at(5))
    beats.record(1, beat(1, at(6)), 8)
    assert not beats.hang(10, 5)
    assert beats.hang(14, 5)


def test_collectives_are_progress() -> None:
    beats = heartbeats(at(4))
    beats.record(0, beat(1, at(4)._replace(collectives=4)), 8)
    assert not beats.hang(10, 5)


def test_rank_in_the_same_phase_that_began_fewer_collectives_is_late() -> None:
    assert heartbeats(at(4), at(4)._replace(collectives=2), at(4)).late() == [1]
    assert heartbeats(at(4), at(4)._replace(collectives=2), at(3)).late() == [2]


def test_rank_that_wrote_fewer_parts_of_checkpoints_is_late() -> None:
    """All wait in one phase for a checkpoint, which the thread of one rank has not written."""
    save = at(4, "save")
    assert heartbeats(save._replace(parts=2), save._replace(parts=1), save._replace(parts=2)).late() == [1]


def test_writing_that_stands_still_is_late_while_the_phases_go_on() -> None:
    """Rank 0 and rank 2 have not written their part of the checkpoint after step 5; rank 1 has, and writes no more."""
    first = [Position(4, 0, 0, 1, 6, "forward", parts=1, writing=5) for _ in range(3)]
    first[1] = first[1]._replace(parts=2, writing=0)
    beats = heartbeats(*first)
    for now in range(1, 40):
        for rank, position in enumerate(first):
            # Rank 2 writes a tensor at 20 s, and nothing after it.
            beats.record(rank, beat(now, position._replace(arrivals=now, pieces=int(rank == 2 and now >= 20))), now)
        if now == 32:
            assert beats.late_writers(now, 5) == []
    assert not beats.hang(39, 5)
    assert beats.late_writers(39, 5) == [0, 2]
    done = first[0]._replace(arrivals=40, parts=2)
    beats.record(0, beat(40, done), 40)
    beats.record(2, beat(40, first[2]._replace(arrivals=41, pieces=1)), 40)
    assert beats.late_writers(56, 5) == [2]
    beats.record(2, beat(57, first[2]._replace(arrivals=41, parts=2, writing=0)), 57)
    beats.record(0, beat(57, done._replace(arrivals=58)), 57)
    assert beats.late_writers(57, 5) == [], "rank 0 has not had the time to complete the checkpoint"
    assert beats.late_writers(80, 5) == [0], "all parts are on disk, and rank 0 has to complete the checkpoint"
    beats.record(0, beat(81, done._replace(writing=0)), 81)
    assert beats.late_writers(200, 5) == []


def test_ticks_are_progress() -> None:
    beats = heartbeats(at(4))
    beats.record(0, beat(1, at(4)._replace(ticks=1)), 8)
    assert not beats.hang(10, 5)


def test_first_step_has_more_patience_and_indexing_has_no_limit() -> None:
    assert not heartbeats(at(4, patience=6)).hang(25, 5)
    assert heartbeats(at(4, patience=6)).hang(31, 5)
    assert not heartbeats(at(4), at(4, "index", patience=0)).hang(1e6, 5)


def test_rank_with_the_fewest_phases_is_late() -> None:
    assert heartbeats(at(9), at(8, "data wait"), at(9)).late() == [1]
    assert heartbeats(at(9), at(9)).late() == []


def test_verdict_survives_the_store() -> None:
    verdict = Verdict("rank 3 is gone", 75, (3,), hangs=True)
    assert Verdict.parse(verdict.to_json()) == verdict


def test_few_ranks_are_named_one_by_one_and_many_by_host() -> None:
    assert name_ranks([1, 2], MEMBERS) == "rank 1 (host node-0, pid 101), rank 2 (host node-1, pid 102)"
    assert name_ranks(list(range(5)), MEMBERS) == "5 ranks (2 on host node-0, 2 on host node-1, 1 on host node-2)"
    assert name_ranks(list(range(12)), MEMBERS).endswith("2 on host node-3 and on 2 other hosts)")


def test_phases_are_named_by_frequency() -> None:
    positions = heartbeats(at(1, "data wait"), at(2), at(2)).positions
    assert name_phases([0, 1, 2], positions) == "'backward' of step 8 and 'data wait' of step 8"
