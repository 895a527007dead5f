"""Tests of the end of launchers, as their ranks see it."""

from __future__ import annotations

import subprocess
import time

import psutil

from mvd_scale.distributed.health.launcher_processes import LauncherProcesses


def test_launcher_whose_exit_code_nobody_took_has_ended() -> None:
    with subprocess.Popen(["sleep", "100"]) as launcher:
        processes = LauncherProcesses()
        processes._processes = [psutil.Process(launcher.pid)]
        assert processes.ended() is None
        launcher.kill()
        while psutil.Process(launcher.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert processes.ended() == launcher.pid
    assert processes.ended() == launcher.pid, "also when it has gone from the table"


def test_parents_that_live_have_not_ended() -> None:
    assert LauncherProcesses().ended() is None
