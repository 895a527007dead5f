"""`mvd-scale status` tells what a run is doing from any files that a run leaves, whole or not."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mvd_scale.cli.status import status
from mvd_scale.config import load_detection_recipe, load_recipe
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.run_status import RunStatus, find_runs, read_statuses
from mvd_scale.utils.events import EventLog
from mvd_scale.utils.lease import Holder, Lease
from mvd_scale.utils.machine import ProcessSpace

READING = {"loss": 0.5, "clips_per_second": 8.0, "seconds_per_step": 2.0}
DEAD = Holder(*ProcessSpace.own(), pid=2**22 + 1, start=1, token="t", since="then", renewed="then")
FAULT = "rank 3 of host b hangs in 'backward'"


def make_run(path: Path, *, step: int = 40, steps: int = 100) -> RunFolder:
    """A run that has made some steps; its lease is missing."""
    folder = RunFolder(path)
    (folder.checkpoints / f"step_{step - 10:08d}").mkdir(parents=True)
    log = EventLog(folder.events)
    log.write("start", steps=steps, ranks=4, hosts={"a": 2, "b": 2})
    log.write("fault", message=FAULT)
    log.write("restart", attempt=1)
    log.write("start", steps=steps, ranks=2, hosts={"a": 2})
    folder.metrics.write_text("".join(json.dumps({"step": n, **READING}) + "\n" for n in (step - 1, step)) + '{"step"')
    folder.quarantine.write_text('{"row": 3, "path": "a"}\n{"row": 3, "path": "a"}\n{"row": 4}\n{"ro')
    folder.recipe.touch()
    return folder


def read(folder: RunFolder, patience: float = 0.0) -> RunStatus:
    (found,) = read_statuses([folder.path], patience)
    return found


def write_lease(folder: RunFolder, holder: Holder = DEAD, **values: Any) -> None:
    folder.lease_file.write_bytes(replace(holder, **values).encode())


def test_a_running_run_tells_step_speed_and_what_remains(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    lease = Lease(folder.lease_file)
    run = read(folder)
    lease.release()
    assert (run.state, run.note, run.step, run.total_steps, run.eta_seconds) == ("running", "", 40, 100, 120.0)
    assert (run.loss, run.clips_per_second, run.ranks, run.hosts) == (0.5, 8.0, 2, {"a": 2})
    assert (run.faults, run.restarts, run.quarantined) == (1, 1, 2)
    assert run.last_fault is not None
    assert run.last_fault.message == FAULT
    assert run.checkpoint is not None
    assert run.checkpoint.step == 30
    assert 0 <= run.checkpoint.age_seconds < 60


def test_a_fault_that_several_hosts_record_counts_once_in_each_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rank 0 is killed, each other host says so; an attempt may also fail before its start is recorded."""
    folder = make_run(tmp_path / "run")
    log = EventLog(folder.events)
    for host in ("b", "c", "d", "b", "c"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        log.write("fault", message=f"rank 0 is gone, says {host}")
    run = read(folder)
    assert run.faults == 3
    assert run.last_fault is not None
    assert run.last_fault.message == "rank 0 is gone, says b"


def test_a_run_that_is_quiet_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    os.utime(folder.metrics, (0, time.time() - 3600))
    lease = Lease(folder.lease_file)
    assert read(folder).note == "the last reading is 60 minutes old"
    folder.metrics.unlink()
    assert (read(folder).state, read(folder).note) == ("running", "no reading yet")
    lease.release()


@pytest.mark.parametrize(
    ("reason", "message", "expected"),
    [
        ("stopped", "", ("stopped", "exit code 143")),
        ("fault", FAULT, ("failed", FAULT)),
        ("invalid", "no room", ("failed", "no room")),
    ],
)
def test_a_run_that_ended_says_why(reason: str, message: str, expected: tuple[str, str], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    EventLog(folder.events).write("end", reason=reason, message=message, exit_code=143)
    write_lease(folder, released=True)
    run = read(folder)
    assert (run.state, run.note) == expected
    assert run.eta_seconds is None


def test_a_finished_run_is_finished_however_its_process_ended(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", step=100)
    folder.summary.write_text('{"steps": 100}')
    for released in (True, False):
        write_lease(folder, released=released)
        assert read(folder).state == "finished"
    folder.summary.write_text('{"steps": 50}')
    assert read(folder).state == "dead"


def test_a_process_that_is_gone_is_dead_with_the_fault_of_its_own_start(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_lease(folder)
    run = read(folder)
    assert (run.state, run.note) == ("dead", f"process {DEAD.pid} of host {DEAD.host} renewed its lease last at then")
    EventLog(folder.events).write("fault", message="the link to host b is cut")
    assert read(folder).note == "the link to host b is cut"


@pytest.mark.parametrize(("age", "clock"), [(0.0, 0.0), (3600.0, 3600.0)])
def test_a_run_of_another_host_is_alive_if_it_renews(age: float, clock: float, tmp_path: Path) -> None:
    """With clocks that agree one look is enough; otherwise the lease is watched."""
    folder = make_run(tmp_path / "run")
    renewed = datetime.fromtimestamp(time.time() - age, UTC).isoformat()
    write_lease(folder, host="elsewhere", renewed=renewed)
    timer = threading.Timer(0.2, lambda: write_lease(folder, host="elsewhere", renewed=renewed, renewals=1))
    timer.start()
    assert read(folder, patience=1.0).state == "running"
    timer.join()
    assert read(folder, patience=0.0).state == ("running" if not clock else "stale")


def test_a_lease_that_cannot_be_read_is_stale(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    folder.lease_file.write_bytes(b"\x00" * 100)
    run = read(folder)
    assert (run.state, run.note) == ("stale", "lease.json cannot be read")


def test_an_old_run_without_events_and_lease_tells_what_its_files_tell(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    checkpoint = folder.checkpoints / "step_00000030"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"layout": {"ranks": 8}}')
    recipe = load_recipe("quickstart/video_teacher", ["--run.folder", str(folder.path), "--training.max_steps", "70"])
    folder.recipe.write_text(recipe.to_yaml())
    rows = [Row(name=f"{n}.mp4", path=f"{n}.mp4", frames=16, width=32, height=32) for n in range(200)]
    Manifest.from_rows(rows, source="list").save(folder.manifest)
    folder.metrics.write_text('{"step": 40}\n')
    run = read(folder)
    assert (run.state, run.step, run.total_steps, run.ranks, run.loss) == ("unknown", 40, 70, 8, None)


def test_an_old_run_of_detection_does_not_tell_its_last_step(tmp_path: Path) -> None:
    """Its epochs count key frames, which the manifest of the run does not list."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    recipe = load_detection_recipe("quickstart/detector", ["--run.folder", str(folder.path)])
    folder.recipe.write_text(recipe.to_yaml())
    rows = [Row(name=f"{n}.mp4", path=f"{n}.mp4", frames=16, width=32, height=32) for n in range(200)]
    Manifest.from_rows(rows, source="list").save(folder.manifest)
    assert read(folder).total_steps is None


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl", "quarantine.jsonl", "summary.json", "lease.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"5\n", b"[]\n", b"null\n", b"\xff\xfe\n", b'{"event": "start"}\n', b"{}\n"]
)
def test_files_that_are_partial_or_garbage_are_no_error(name: str, content: bytes, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_lease(folder)
    (folder.path / name).write_bytes(content)
    read(folder)


def test_runs_are_found_beneath_a_folder_and_not_within_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / place).path for place in ("a", "pipeline/student", "pipeline/teacher")]
    make_run(tmp_path / "a" / "within")
    make_run(tmp_path / ".hidden")
    make_run(tmp_path / "1/2/3/4/5")
    assert find_runs(tmp_path) == runs
    assert find_runs(runs[0]) == [runs[0]]
    for wrong in ("missing", "pipeline/student/checkpoints"):
        with pytest.raises(UserError, match=wrong):
            find_runs(tmp_path / wrong)


def invoke(*words: str | Path) -> Result:
    return CliRunner().invoke(status, [str(word) for word in words])


def test_wrong_paths_are_named_and_the_other_runs_are_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_lease(folder)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "same").symlink_to(folder.path)
    result = invoke(folder.path, tmp_path / "missing", tmp_path / "run", tmp_path / "runs", "--json")
    assert result.exit_code == 2
    shown = json.loads(result.stdout)
    assert [run["path"] for run in shown["runs"]] == [str(folder.path)]
    assert shown["runs"][0]["checkpoint"]["step"] == 30
    (error,) = shown["errors"]
    assert error.startswith(f"{tmp_path / 'missing'}: expected the folder of a run")


def test_the_table_has_a_row_for_each_run_and_its_faults_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second\x1b[31m"):
        write_lease(make_run(Path(name)))
    result = invoke("first", "second\x1b[31m")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    lines = result.output.splitlines()
    row = next(line for line in lines if line.startswith("first "))
    assert row.split() == ["first", "dead", "40/100", "0.5000", "8.0", "30", row.split()[6], "2", "1", "1", "2"]
    assert "ETA" not in lines[0], "no run has one"
    assert any(line.startswith("first: last fault, 20") and line.endswith(FAULT) for line in lines)


def test_watching_looks_again_until_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run")
    write_lease(folder)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        folder.metrics.write_text('{"step": 41}\n')
        if len(waited) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    result = invoke(folder.path, "--json", "--watch", "5")
    assert result.exit_code == 0
    assert [json.loads(line)["runs"][0]["step"] for line in result.stdout.splitlines()] == [40, 41]
    assert waited == [5.0, 5.0]
