"""Files that one process of a host makes: together, after a kill, where a file is torn, where there is no room."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from mvd_scale.data import host_cache
from mvd_scale.data.columns import ColumnFile, ColumnWriter
from mvd_scale.data.host_cache import cache_folder, make_unnamed, open_or_make, open_unnamed


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def write(file: BinaryIO) -> None:
    writer = ColumnWriter(file)
    writer.add("numbers", [np.arange(10)], np.int64)
    writer.finish({})


def never(file: BinaryIO) -> None:
    raise AssertionError("the file is there")


def files() -> list[str]:
    return sorted(path.name for path in cache_folder().iterdir())


def test_a_file_is_made_once(caplog):
    with caplog.at_level(logging.INFO):
        made = open_or_make("manifest-a.columns", "the numbers", write)
        found = open_or_make("manifest-a.columns", "the numbers", never)
    assert made["numbers"].tolist() == found["numbers"].tolist() == list(range(10))
    assert os.path.sameopenfile(made._descriptor, found._descriptor)
    assert files() == ["manifest-a.columns", "manifest-a.lock"]
    assert caplog.text.count("once for all processes of this host") == 1
    assert cache_folder().stat().st_mode & 0o777 == 0o700


SCRIPT = """
import sys, time
from pathlib import Path
from mvd_scale.data import host_cache
from mvd_scale.data.columns import ColumnWriter
import numpy as np

def write(file):
    print("writes", flush=True)
    writer = ColumnWriter(file)
    writer.add("numbers", [np.arange(5)], np.int64)
    time.sleep(float(sys.argv[1]))
    writer.add("others", [np.arange(5)], np.int64)
    writer.finish({})

print("starts", flush=True)
print(host_cache.open_or_make("manifest-a.columns", "the numbers", write)["others"].sum())
"""


def start(seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(seconds)], stdout=subprocess.PIPE, text=True)


def test_processes_that_start_together_make_one_file():
    processes = [start(0.5) for _ in range(3)]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sorted(words[-1] for words in said) == ["10"] * 3
    assert sum(words.count("writes") for words in said) == 1
    assert files() == ["manifest-a.columns", "manifest-a.lock"]


def test_a_process_that_is_killed_while_it_writes_keeps_nobody_from_it():
    killed = start(600)
    assert killed.stdout is not None
    while killed.stdout.readline() != "writes\n":
        pass
    waiting = start(0)
    assert waiting.stdout is not None
    waiting.stdout.readline()
    assert "manifest-a.columns" not in files()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert waiting.communicate(timeout=60)[0].split() == ["writes", "10"]
    assert files() == ["manifest-a.columns", "manifest-a.lock"]


@pytest.mark.parametrize("length", [0, 5, 200])
def test_a_torn_file_is_named_and_made_again(caplog, length):
    open_or_make("manifest-a.columns", "the numbers", write)
    path = cache_folder() / "manifest-a.columns"
    os.truncate(path, length)
    with caplog.at_level(logging.WARNING):
        assert open_or_make("manifest-a.columns", "the numbers", write)["numbers"].tolist() == list(range(10))
    assert f"{path}, which holds the numbers, is not whole: it is made again" in caplog.text
    assert ColumnFile.open(path)["numbers"].tolist() == list(range(10))


def test_a_full_disk_is_named_and_columns_stay_in_memory(caplog):
    places = []

    def write_until_full(file: BinaryIO) -> None:
        write(file)
        places.append(os.readlink(f"/proc/self/fd/{file.fileno()}"))
        if len(places) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with caplog.at_level(logging.WARNING):
        made = open_or_make("manifest-a.columns", "the numbers", write_until_full)
    assert made["numbers"].tolist() == list(range(10))
    assert places == [str(cache_folder() / f"manifest-a.{os.getpid()}.partial"), "/memfd:mvd_scale (deleted)"]
    assert f"the numbers cannot be kept in {cache_folder()}: No space left on device" in caplog.text
    assert "set TMPDIR" in caplog.text
    assert files() == ["manifest-a.lock"]


def test_a_disk_too_full_for_a_file_without_a_name_is_named(caplog):
    calls = []

    def write_until_full(file: BinaryIO) -> None:
        calls.append(file)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file)

    with caplog.at_level(logging.WARNING):
        made = make_unnamed("the numbers", write_until_full)
    assert made["numbers"].tolist() == list(range(10))
    assert f"the numbers cannot be kept in {cache_folder()}: No space left on device" in caplog.text
    assert "set TMPDIR" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(caplog, temporary):
    (temporary / f"mvd_scale-{os.getuid()}").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        made = open_or_make("manifest-a.columns", "the numbers", write)
    assert made["numbers"].tolist() == list(range(10))
    assert f"the numbers cannot be kept in {cache_folder()}: File exists" in caplog.text
    assert make_unnamed("others", write)["numbers"].tolist() == list(range(10))
    with open_unnamed("a list") as file:
        file.write(b"a")
    assert f"others cannot be kept in {cache_folder()}: File exists" in caplog.text
    assert f"a list cannot be kept in {cache_folder()}: File exists" in caplog.text
    assert caplog.text.count("set TMPDIR") == 3
    open_unnamed("a list").close()
    assert caplog.text.count("set TMPDIR") == 3, "once for all lists"


def test_a_folder_of_another_user_is_not_trusted(caplog, monkeypatch):
    folder = cache_folder()
    folder.mkdir()
    monkeypatch.setattr(host_cache, "cache_folder", lambda: folder)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with caplog.at_level(logging.WARNING):
        assert open_or_make("manifest-a.columns", "the numbers", write)["numbers"].tolist() == list(range(10))
    assert "is no folder of this user" in caplog.text
    assert not list(folder.iterdir())


def test_an_old_lock_stays_while_its_file_is_made():
    """Another process would take a new one, and remove the part that this one writes."""
    cache_folder().mkdir(mode=0o700)
    lock = cache_folder() / "manifest-a.lock"
    lock.touch()
    past = time.time() - 15 * 86400
    os.utime(lock, (past, past))

    def look(file: BinaryIO) -> None:
        assert lock.name in files()
        write(file)

    assert open_or_make("manifest-a.columns", "the numbers", look)["numbers"].tolist() == list(range(10))


def test_files_that_nobody_uses_go_when_another_is_made():
    kept = open_or_make("manifest-old.columns", "old numbers", write)
    for name in ("manifest-used", "manifest-fresh", "order-old", "order-fresh"):
        open_or_make(f"{name}.columns", name, write)
    (cache_folder() / "manifest-x.17.partial").write_bytes(b"of a process that was killed")
    for name, days in (
        *(("manifest-old.columns", 15), ("manifest-old.lock", 15), ("manifest-used.columns", 15)),
        *(("manifest-fresh.columns", 13), ("order-old.columns", 2), ("manifest-x.17.partial", 15)),
    ):
        past = time.time() - days * 86400
        os.utime(cache_folder() / name, (past, past))
    open_or_make("manifest-used.columns", "used numbers", never)
    open_or_make("order-new.columns", "new numbers", write)
    assert [name for name in files() if name.endswith(".columns")] == [
        *("manifest-fresh.columns", "manifest-used.columns", "order-fresh.columns", "order-new.columns")
    ]
    assert not {"manifest-old.lock", "manifest-x.17.partial"} & set(files())
    assert kept["numbers"].tolist() == list(range(10))
