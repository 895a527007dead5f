"""Tests of the runner of a bring-up: its files are whole however a stage or the runner itself ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mvd_scale.performance.bringup import __main__ as command_line
from mvd_scale.performance.bringup import runner, session
from mvd_scale.performance.bringup.__main__ import main
from mvd_scale.performance.bringup.results import BringUp
from mvd_scale.performance.bringup.runner import Runner, Settings
from mvd_scale.performance.bringup.stages import STAGES, Stage, budgets, choose_stages

Run = Callable[..., BringUp]

AFTERWARDS = "session.check('afterwards', lambda check: check.figure('answer', 42), seconds=0.1)"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run stages whose bodies are given as text; `session` and `LeftOut` are in scope."""
    monkeypatch.setattr(runner, "_LEAST", 0.1)

    def run_stages(*bodies: str, seconds: float = 30.0, needs: tuple[str, ...] = ()) -> BringUp:
        stages = []
        for number, body in enumerate(bodies):
            lines = textwrap.indent(textwrap.dedent(body), "    ")
            head = "import os, signal, time\nfrom mvd_scale.performance.bringup.session import LeftOut\n\n"
            (tmp_path / f"stage_{number}.py").write_text(f"{head}def run(session):\n{lines}\n")
            stages.append(Stage("abc"[number], f"Stage {number}", f"stage_{number}", seconds, needs))
        return Runner(stages, Settings(tmp_path / "out", "cpu", None, (str(tmp_path),))).run()

    return run_stages


def outcomes(results: BringUp, stage: int = 0) -> dict[str, str]:
    return {check.name: check.outcome for check in results.stages[stage].checks}


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bringup.json").read_text())


def test_checks_pass_fail_and_are_left_out(run: Run, tmp_path: Path) -> None:
    results = run(
        """
        session.check("sound", lambda check: check.figure("error", 0.000123456))
        session.check("unsound", lambda check: check.expect(2 < 1, "two is more than one"))
        def leave_out(check):
            raise LeftOut("no such card")
        session.check("elsewhere", leave_out)
        """
    )
    assert outcomes(results) == {"sound": "passed", "unsound": "failed", "elsewhere": "left out"}
    assert results.stages[0].outcome == "done"
    assert results.faults == 1
    page = (tmp_path / "out" / "bringup.md").read_text()
    assert "| check | outcome | s | error | reason |" in page
    assert "| 0.0001235 |" in page
    assert "CheckFailed: two is more than one" in page
    assert "no such card" in page
    assert "It came to its end." in page
    assert written(tmp_path / "out")["ended"]


@pytest.mark.parametrize(
    ("crash", "manner"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "by signal SIGKILL"),
        ("os._exit(3)", "with code 3"),
        ("os.abort()", "SIGABRT"),
    ],
)
def test_a_crash_costs_one_check(run: Run, crash: str, manner: str) -> None:
    results = run(f"session.check('crash', lambda check: {crash})\n{AFTERWARDS}", AFTERWARDS)
    assert outcomes(results) == {"crash": "crashed", "afterwards": "passed"}
    assert outcomes(results, 1) == {"afterwards": "passed"}
    assert manner in results.stages[0].checks[0].reason
    assert results.stages[0].outcome == "done"


def test_a_stage_that_cannot_start_is_tried_a_few_times_only(run: Run) -> None:
    results = run("os._exit(3)", AFTERWARDS)
    assert results.stages[0].outcome == "cut off"
    assert "code 3" in results.stages[0].reason
    assert outcomes(results, 1) == {"afterwards": "passed"}


def test_a_check_that_hangs_is_ended_and_the_stage_goes_on(run: Run) -> None:
    results = run(
        f"""
        from mvd_scale.performance.bringup import session as module
        module.HANG = 0.5
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        session.check("hang", lambda check: time.sleep(600), seconds=0.1)
        {AFTERWARDS}
        """
    )
    assert outcomes(results) == {"hang": "hung", "afterwards": "passed"}


def test_no_process_of_a_stage_outlives_it(run: Run, tmp_path: Path) -> None:
    run(
        f"""
        from mvd_scale.performance.bringup import session as module
        import subprocess
        module.HANG = 0.5
        def hang(check):
            child = subprocess.Popen(["sleep", "600"])
            open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
            child.wait()
        session.check("hang", hang, seconds=0.1)
        """
    )
    assert ended(int((tmp_path / "child").read_text()))


def test_the_stage_is_cut_off_when_its_time_ends(run: Run) -> None:
    results = run("session.check('long', lambda check: time.sleep(600), seconds=0.1)", AFTERWARDS, seconds=2.0)
    assert outcomes(results) == {"long": "cut off"}
    assert results.stages[0].outcome == "cut off"
    assert results.stages[0].reason == "the time of the stage is spent"
    assert outcomes(results, 1) == {"afterwards": "passed"}


def test_a_check_that_takes_longer_than_is_left_is_not_begun(run: Run) -> None:
    results = run(f"session.check('long', lambda check: None, seconds=60)\n{AFTERWARDS}", seconds=20.0)
    assert outcomes(results) == {"long": "left out", "afterwards": "passed"}
    assert "it takes up to 60 s" in results.stages[0].checks[0].reason


def test_a_missing_package_leaves_out_its_stage(run: Run) -> None:
    results = run(AFTERWARDS, needs=("json", "no_such_package", "no_such.part"))
    assert results.stages[0].outcome == "left out"
    assert "not installed: no_such_package, no_such.part" in results.stages[0].reason
    assert not results.stages[0].checks


def test_a_package_that_cannot_be_imported_leaves_out_its_stage(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ImportError('libnvcuvid.so.1: cannot open')")
    results = Runner(
        [Stage("a", "Broken", "broken", 30)], Settings(tmp_path / "out", "cpu", None, (str(tmp_path),))
    ).run()
    assert results.stages[0].outcome == "left out"
    assert "libnvcuvid.so.1" in results.stages[0].reason


def test_a_gpu_is_not_made_up(run: Run, tmp_path: Path) -> None:
    results = Runner([Stage("a", "GPU", "stage_0", 30)], Settings(tmp_path / "out", "cuda", None)).run()
    assert results.stages[0].outcome == "left out"
    assert "torch finds no GPU" in results.stages[0].reason


@pytest.mark.parametrize("victim", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_bring_up_leaves_whole_files_and_no_process(tmp_path: Path, victim: signal.Signals) -> None:
    (tmp_path / "stage_0.py").write_text(
        "import os, time\n"
        "def run(session):\n"
        "    session.check('first', lambda check: check.figure('figure', 1.5))\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "    session.check('second', lambda check: time.sleep(600))\n"
    )
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from mvd_scale.performance.bringup.runner import Runner, Settings\n"
        "from mvd_scale.performance.bringup.stages import Stage\n"
        "Runner([Stage('a', 'One', 'stage_0', 60), Stage('b', 'Two', 'stage_0', 60)],"
        " Settings(Path(sys.argv[1]) / 'out', 'cpu', None, (sys.argv[1],))).run()\n"
    )
    job = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    try:
        wait_for(lambda: (tmp_path / "out" / "bringup.md").is_file() and "second" in page(tmp_path))
    finally:
        job.send_signal(victim)
        job.wait()
    found = written(tmp_path / "out")
    assert not found["ended"]
    assert [(check["name"], check["outcome"]) for check in found["stages"][0]["checks"]] == [
        ("first", "passed"),
        ("second", "running"),
    ]
    assert found["stages"][1]["outcome"] == "not run"
    assert "was cut off" in page(tmp_path)
    assert "| first | passed |" in page(tmp_path)
    wait_for(lambda: ended(int((tmp_path / "pid").read_text())))


def test_stages_share_the_time() -> None:
    assert sum(budgets(STAGES[:5], None)) == pytest.approx(7 * 60)
    assert sum(budgets(STAGES, None)) == pytest.approx(10 * 60)
    assert sum(budgets(choose_stages("be"), 4)) == pytest.approx(240)
    assert [stage.letter for stage in choose_stages("ca")] == ["a", "c"]
    with pytest.raises(ValueError, match="unknown x"):
        choose_stages("ax")


def test_the_gpu_s_lasting_error_ends_the_process_but_not_the_stage(run: Run) -> None:
    results = run(
        f"""
        from mvd_scale.performance.bringup import session as module
        def broken():
            raise RuntimeError("an illegal memory access was encountered")
        def fail(check):
            module.settle = broken
            raise RuntimeError("an illegal memory access was encountered")
        session.check("broken", fail)
        {AFTERWARDS}
        """
    )
    assert outcomes(results) == {"broken": "failed", "afterwards": "passed"}
    assert session.PATIENCE >= 2


def page(folder: Path) -> str:
    return (folder / "out" / "bringup.md").read_text()


def ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_figures_that_are_not_finite_are_json(run: Run, tmp_path: Path) -> None:
    run("session.check('infinite', lambda check: check.figure('error', float('inf')))")
    assert "Infinity" not in (tmp_path / "out" / "bringup.json").read_text()
    assert "| inf |" in page(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--stages", "xyz"), "unknown xyz; expected some of abcdefg"),
        (("--minutes", "0"), "--minutes 0: expected a number above 0"),
        (("--wheels", "nowhere"), "--wheels nowhere: expected a folder with files *.whl"),
    ],
)
def test_wrong_arguments_end_with_one_message(
    words: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended_with:
        main(words)
    assert ended_with.value.code == 2
    assert said in capsys.readouterr().err


def test_wheels_are_installed_for_the_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "wheels" / "carried-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr("carried.py", "answer = 42\n")
        files.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        files.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        files.writestr("carried-1.0.dist-info/RECORD", "")
    (tmp_path / "stage.py").write_text(
        "import carried\ndef run(session):\n"
        "    session.check('carried', lambda check: check.figure('answer', carried.answer))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command_line, "choose_stages", lambda _: (Stage("a", "Carried", "stage", 30, ("carried",)),))
    assert main(["--wheels", str(wheel.parent), "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    assert written(tmp_path / "out")["stages"][0]["checks"][0]["figures"] == {"answer": 42}
