"""Checks of the folder that all hosts share: it can be written, is the same everywhere, and renames are whole.

rank 0                                  every other host
writes a token                          reads it: the folder is the same one
reads the files of all                  writes a file of its own
replaces a file by another (rename)     opens it again and again: the old or the new content, whole, and soon the new
locks a file                            tries to lock it, too: information, since a run writes a lease
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO
from uuid import uuid4

from mvd_scale.doctor.findings import Finding, HostCheck
from mvd_scale.doctor.meeting import Meeting, NoAnswer
from mvd_scale.utils.io import write_atomic
from mvd_scale.utils.markdown import counted

_PREFIX = ".mvd-doctor-"
_FLOCK = "flock among hosts"

_SEEN = 15.0
"""Seconds within which the other hosts must see what one has written; NFS keeps what it knows of a folder for 3 to 60
(acdirmin, acdirmax)."""

_SOON = 2.0
"""Seconds after which it is worth a warning."""

_POLL = 0.02
_SYNCED = 2**20
"""Bytes of the file that is flushed to disk."""

_SLOW_SYNC = 1.0
"""Seconds of a flush that is worth a warning."""

_SIZE = 2**16
"""Bytes of each content of the file that is replaced: several blocks, so that half of one would be seen."""

_HUNG = (
    "the file system does not answer: see `mount`, and its server; a mount whose server does not come back goes by "
    "`umount -f`"
)


def folder_checks(folder: Path, needed: int | str) -> list[HostCheck]:
    """List the checks of a host alone.

    Args:
        folder: folder that runs write into; it need not exist, but one above it.
        needed: bytes of all checkpoints of a run, or the reason why they are not known.
    """
    return [
        HostCheck("folder", "writing", lambda: writing(folder), 30, _HUNG),
        HostCheck("folder", "free disk", lambda: free_disk(folder, needed), 10, _HUNG),
        HostCheck("folder", "flush to disk", lambda: flush(folder), 30, _HUNG),
        HostCheck("folder", "flock", lambda: own_lock(folder), 10, _HUNG),
    ]


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def writing(folder: Path) -> Iterator[Finding]:
    """Write a file and rename it, as every save does."""
    name, place = "writing", existing(folder)
    file = place / f"{_PREFIX}{uuid4().hex}"
    try:
        write_atomic(file, "written")
        read = file.read_text()
    except OSError as error:
        remedy = f"mount {place} writable for this user, or choose another with --folder or --run.folder"
        yield Finding(name, "fail", f"{place} cannot be written: {error.strerror}", remedy)
        return
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
    if read != "written":
        yield Finding(name, "fail", f"a renamed file in {place} is not whole", "choose another file system")
        return
    yield Finding(name, "ok", f"{place} can be written")


def free_disk(folder: Path, needed: int | str) -> Iterator[Finding]:
    """Compare the free space with what the checkpoints of a run take, as `folder_checks` knows it."""
    name, place = "free disk", existing(folder)
    free = shutil.disk_usage(place).free
    figures = {"free bytes": free, "needed bytes": needed if isinstance(needed, int) else None}
    detail = f"{place}: {free / 2**30:.1f} GiB free"
    if isinstance(needed, str):
        yield Finding(name, "ok", f"{detail}; {needed}", figures=figures)
    elif free < needed:
        remedy = "free some space, lower checkpoints.keep, or choose another --run.folder"
        yield Finding(name, "fail", f"{detail}, but its checkpoints take {needed / 2**30:.1f}", remedy, figures)
    else:
        yield Finding(name, "ok", f"{detail}, its checkpoints take {needed / 2**30:.1f}", figures=figures)


def flush(folder: Path) -> Iterator[Finding]:
    """Flush a file and its folder to disk, as every save does."""
    name, place = "flush to disk", existing(folder)
    file = place / f"{_PREFIX}{uuid4().hex}"
    try:
        started = time.perf_counter()
        _write_synced(file, place)
        seconds = time.perf_counter() - started
    except OSError as error:
        remedy = "choose a file system that can flush files and folders (fsync): a save would fail"
        yield Finding(name, "fail", f"{place}: {error.strerror}", remedy)
        return
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
    detail, figures = f"{_SYNCED / 2**20:g} MiB and its folder in {seconds * 1e3:.0f} ms", {"seconds": seconds}
    if seconds > _SLOW_SYNC:
        yield Finding(name, "warning", detail, "see the load of the disk or file server", figures)
        return
    yield Finding(name, "ok", detail, figures=figures)


def _write_synced(file: Path, place: Path) -> None:
    for path, flags in ((file, os.O_WRONLY | os.O_CREAT), (place, os.O_RDONLY)):
        descriptor = os.open(path, flags, 0o644)
        try:
            if path == file:
                os.write(descriptor, bytes(_SYNCED))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def own_lock(folder: Path) -> Iterator[Finding]:
    """Report whether the file system knows flock. Runs do not depend on it: they write a lease."""
    file = existing(folder) / f"{_PREFIX}{uuid4().hex}"
    try:
        yield Finding("flock", "ok", "works on this host" if _lock_excludes(file) else "not known; a lease is used")
    except OSError as error:
        yield Finding("flock", "ok", f"not known ({error.strerror}); a lease is used")
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def _lock_excludes(file: Path) -> bool:
    with file.open("w") as first, file.open("w") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def share_folder(meeting: Meeting, ready: Iterable[int], folder: Path) -> Iterator[Finding]:
    """Check that all hosts see the same folder. All hosts call it.

    Args:
        meeting: meeting of the hosts.
        ready: ranks of the hosts that take part.
        folder: folder that runs write into.

    Raises:
        NoAnswer: rank 0 does not answer in time.
    """
    if meeting.leads:
        yield from _lead(meeting, [rank for rank in ready if rank != 0], folder)
    else:
        yield from _follow(meeting, folder)


def _lead(meeting: Meeting, others: list[int], folder: Path) -> Iterator[Finding]:
    place = existing(folder) / f"{_PREFIX}{uuid4().hex}"
    try:
        place.mkdir()
        (place / "token").write_text(place.name)
        write_atomic(place / "replaced", _content("a"))
        with (place / "locked").open("w") as locked:
            refusal = _lock(locked)
            if refusal:
                yield Finding(_FLOCK, "ok", refusal)
            meeting.put("folder/place", [str(place), not refusal])
            until = time.monotonic() + 2 * _SEEN
            missing = [rank for rank in others if not _shows(meeting, place, rank, until)]
            write_atomic(place / "replaced", _content("b"))
            meeting.put("folder/replaced", time.time())
            until = time.monotonic() + _SEEN + _SOON
            for rank in others:
                with suppress(NoAnswer):  # that host finds so itself
                    meeting.get(f"folder/{rank}/done", until - time.monotonic())
    except OSError as error:
        meeting.put("folder/place", [None, False])
        reason = f"{place.parent} cannot be written: {error.strerror}"
        yield Finding("shared folder", "fail", reason, "choose a writable folder with --folder or --run.folder")
        return
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if missing:
        labels = [host.label for host in meeting.hosts if host.rank in missing]
        said = f"files of {', '.join(labels)} do not appear in {place.parent}"
        remedy = "mount the same file system at this path on all hosts"
        yield Finding("shared folder", "fail", said, remedy)
        return
    yield Finding("shared folder", "ok", f"{place.parent}: files of {counted(len(others), 'other host')} appear")


def _shows(meeting: Meeting, place: Path, rank: int, until: float) -> bool:
    """Whether the file that another host says it has written appears here, until a time."""
    try:
        wrote = meeting.get(f"folder/{rank}/wrote", until - time.monotonic())
    except NoAnswer:
        return False
    # At least once, however late it is.
    return bool(wrote) and _appears(place / f"host-{rank}", str(rank), max(until - time.monotonic(), _POLL)) is not None


def _follow(meeting: Meeting, folder: Path) -> Iterator[Finding]:
    rank = meeting.seat.rank
    told, locked = meeting.get("folder/place", 2 * _SEEN)
    if told is None:
        meeting.put(f"folder/{rank}/done", True)
        yield Finding("shared folder", "left out", "rank 0 cannot write there")
        return
    # By the name here: the same folder may be mounted elsewhere.
    place = existing(folder) / Path(told).name
    try:
        seconds = _appears(place / "token", place.name, _SEEN)
        if seconds is None:
            meeting.put(f"folder/{rank}/wrote", False)
            reason = f"a file of rank 0 does not appear in {place.parent} within {_SEEN:g} s"
            yield Finding("shared folder", "fail", reason, "mount the same file system at this path on all hosts")
            return
        (place / f"host-{rank}").write_text(str(rank))
        meeting.put(f"folder/{rank}/wrote", True)
        yield _visible(place.parent, seconds)
        if locked:
            yield _lock_of_other(place / "locked")
        yield _watch(meeting, place / "replaced")
    except OSError as error:
        meeting.put(f"folder/{rank}/wrote", False)
        remedy = "mount it writable, with the same user numbers on all hosts (root_squash of NFS maps root to nobody)"
        yield Finding("shared folder", "fail", f"{place}: {error.strerror}", remedy)
    finally:
        meeting.put(f"folder/{rank}/done", True)


def _appears(file: Path, content: str, seconds: float) -> float | None:
    """Seconds until a file has its content; None if it has not in time."""
    started = time.monotonic()
    while (waited := time.monotonic() - started) < seconds:
        with suppress(FileNotFoundError):
            if file.read_text() == content:
                return waited
        time.sleep(_POLL)
    return None


def _visible(place: Path, seconds: float) -> Finding:
    figures = {"seconds": seconds}
    if seconds > _SOON:
        remedy = "mount NFS with lookupcache=positive or a lower acdirmax: what is seen late holds up saves"
        return Finding(
            "shared folder", "warning", f"{place}: a new file appears after {seconds:.1f} s", remedy, figures
        )
    return Finding("shared folder", "ok", f"{place}: a new file appears in {seconds * 1e3:.0f} ms", figures=figures)


def _lock_of_other(file: Path) -> Finding:
    with file.open("r+") as opened:
        try:
            refusal = _lock(opened)
        except BlockingIOError:
            return Finding(_FLOCK, "ok", "a lock of rank 0 holds here")
    return Finding(_FLOCK, "ok", refusal or "a lock of rank 0 does not hold here; a lease is used")


def _lock(opened: TextIO) -> str:
    """Lock a file; returns what there is to say if the file system refuses it, which runs do not need.

    Raises:
        BlockingIOError: it is locked already.
    """
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        return f"not known ({error.strerror}); a lease is used"
    return ""


def _watch(meeting: Meeting, file: Path) -> Finding:
    """Read a file again and again while rank 0 replaces it."""
    name, old, new = "rename", _content("a"), _content("b")
    remedy = "saves of a run may be seen by halves: choose a file system whose renames are atomic (NFS, Lustre, GPFS)"
    started, replaced, reads = time.monotonic(), None, 0
    while time.monotonic() - started < 3 * _SEEN and (replaced is None or time.monotonic() - replaced < _SEEN):
        try:
            content = file.read_text()
        except OSError as error:
            return Finding(name, "fail", f"while rank 0 replaces it, a file is gone: {error.strerror}", remedy)
        reads += 1
        if content == new:
            return Finding(name, "ok", f"old or new content in {reads} reads", figures={"reads": reads})
        if content != old:
            return Finding(name, "fail", f"while rank 0 replaces it, a file has {len(content)} strange bytes", remedy)
        if replaced is None and meeting.has("folder/replaced"):
            replaced = time.monotonic()
        time.sleep(_POLL)
    if replaced is None:
        return Finding(name, "left out", "rank 0 did not replace the file")
    return Finding(name, "fail", f"the old content is read {_SEEN:g} s after rank 0 has replaced it", remedy)


def _content(letter: str) -> str:
    return letter * _SIZE
