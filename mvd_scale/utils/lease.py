"""Lease of a folder: a file that says which process works in it, on any file system that hosts share.

Locks of the kernel (flock, fcntl) do not reach over many network file systems, or in silence only over the processes of
one host. The file holds host, boot, process and a token; its holder renews it every `RENEW_SECONDS`. Another process
may take it over

    at once                 if it was given back, or its holder was a process of this machine that has ended
    after `STALE_RENEWALS`  unchanged readings, one for each renewal that is due, if it is of another machine, or torn

Readings are timed by the clock of the reader alone: no clocks of two hosts are compared. Two processes never hold a
lease: a file that is linked into place holds the next one, and takes the place of the old one only while that is
unchanged. A holder renews the file through the descriptor by which it made it, so that one that was stopped for long
cannot undo a takeover; `Lease.check` ends it.
"""

from __future__ import annotations

import atexit
import errno
import json
import logging
import os
import secrets
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from mvd_scale.errors import UserError
from mvd_scale.utils.machine import ProcessSpace, is_running, process_start

logger = logging.getLogger("mvd_scale")

RENEW_SECONDS = 5.0
"""Seconds from one renewal to the next."""

STALE_RENEWALS = 6
"""Renewals in a row that were due and were not seen, after which the holder on another machine counts as dead."""

_BYTES = 512
"""Size of the file: one write in place, whatever its values."""

_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK})
"""Errors of `link` on file systems that have no hard links."""


@dataclass(frozen=True)
class Holder:
    """Content of a lease: the process that holds it, or gave it back."""

    host: str
    boot: str
    pids: str
    """PID namespace."""
    pid: int
    start: int | None
    """Start of the process in clock ticks after the boot."""
    token: str
    """Random name of this lease, of no other."""
    since: str
    """When the lease began (UTC, ISO 8601)."""
    renewed: str
    """When it was renewed, likewise, by the clock of the holder."""
    renewals: int = 0
    released: bool = False
    """Whether the holder has ended in order."""

    def __str__(self) -> str:
        return f"process {self.pid} of host {self.host} since {self.since}"

    def is_in(self, space: ProcessSpace) -> bool:
        """Whether the holder's process id has a meaning in this machine and PID namespace."""
        return (self.host, self.boot, self.pids) == space

    def is_gone(self, space: ProcessSpace) -> bool:
        """Whether the lease is free for certain: given back, or left by a process of this machine that has ended."""
        return self.released or (self.is_in(space) and not is_running(self.pid, self.start))

    def encode(self) -> bytes:
        """Return the content of the file, `_BYTES` long."""
        return json.dumps(asdict(self)).encode().ljust(_BYTES - 1) + b"\n"


def decode_holder(content: bytes) -> Holder | None:
    """Read the content of a lease; None if it is torn or something else."""
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None


def read_lease(path: Path) -> bytes | None:
    """Read the content of a lease; None if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Lease:
    """Lease that this process holds, and a thread that renews it until `release` or the end of the process.

    Args:
        path: file of the lease.
        renew_seconds: seconds from one renewal to the next, the same for all processes that use the file.
        space: machine and PID namespace of this process; those that the kernel tells if omitted.

    Raises:
        UserError: another process holds it.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, *, renew_seconds: float = RENEW_SECONDS, space: ProcessSpace | None = None) -> None:
        self.path = path
        self.renew_seconds = renew_seconds
        self.space = space or ProcessSpace.own()
        now, pid = _now(), os.getpid()
        self._holder = Holder(*self.space, pid, process_start(pid), secrets.token_hex(16), since=now, renewed=now)
        self._file = -1
        self._warned = False
        self._writing = threading.Lock()
        self._ended = threading.Event()
        try:
            while not self._acquire():
                time.sleep(0.01)
        except (UserError, OSError):
            self._close()
            raise
        self._thread = threading.Thread(target=self._renew_for_ever, name=f"lease {path}", daemon=True)
        self._thread.start()
        atexit.register(self.release)

    def check(self) -> None:
        """Check that this process holds the lease still.

        Raises:
            UserError: another process has taken it over, or its file is gone.
        """
        try:
            with self._writing:
                content = read_lease(self.path)
        except OSError as error:
            # A network file system that does not answer for a moment has told nothing of another holder.
            self._warn(f"{self.path} cannot be read: {error.strerror}")
            return
        if content is None:
            raise UserError(
                f"{self.path} is gone: somebody has moved or deleted the folder of this run, which ends before it "
                "writes there again"
            )
        if not self._is_mine(content):
            raise UserError(
                f"{self.path} was taken over by {decode_holder(content) or 'another process'}, while this process did "
                "not renew it: this run ends before it overwrites anything; let the other one go on"
            )

    def release(self) -> None:
        """Give the lease back and end the thread; does nothing the second time, and in a forked process."""
        if self._ended.is_set() or os.getpid() != self._holder.pid:
            return
        self._ended.set()
        # A file system that hangs must not hold up the end of the process.
        self._thread.join(self.renew_seconds)
        atexit.unregister(self.release)
        if self._thread.is_alive():
            # It holds the lock, and the lease becomes stale by itself.
            return
        self._renew(released=True)
        self._close()

    def _acquire(self) -> bool:
        """Try once to become the holder; False if another process changed something meanwhile.

        Raises:
            UserError: another process holds the lease.
        """
        content = read_lease(self.path)
        if content is None:
            return self._create(self.path)
        return self._is_mine(content) or (self._is_free(self.path, content) and self._succeed(content))

    def _is_mine(self, content: bytes) -> bool:
        holder = decode_holder(content)
        return holder is not None and holder.token == self._holder.token

    def _is_free(self, path: Path, content: bytes) -> bool:
        """Whether the lease with this content may be taken over; False if it changed, so that it must be judged anew.

        Raises:
            UserError: its holder is alive.
        """
        holder = decode_holder(content)
        if holder is not None and holder.is_gone(self.space):
            return True
        if holder is None or not holder.is_in(self.space):
            found = f"was left by {holder}" if holder else "cannot be read"
            seconds = STALE_RENEWALS * self.renew_seconds
            logger.info("%s %s: watching for %g s whether it is renewed", path, found, seconds)
            later = self._watch(path, content)
            if later == content:
                logger.warning("%s %s, and was not renewed for %g s: taking it over", path, found, seconds)
                return True
            now = decode_holder(later) if later is not None else None
            if holder is None or now is None or now.token != holder.token or now.released:
                return False
        raise UserError(
            f"another process is training in {path.parent}: {holder}; wait for it, end it, or choose another "
            "`--run.folder`"
        )

    def _watch(self, path: Path, content: bytes) -> bytes | None:
        """Read a lease until it changes, or until so many readings were equal that its holder must be dead.

        Returns:
            the content at the end; None if the file is gone.
        """
        unchanged, now = 0, None
        while unchanged < STALE_RENEWALS:
            began = time.monotonic()
            self._ended.wait(self.renew_seconds)
            now = read_lease(path)
            if now != content:
                break
            # A reading that the file system held up says nothing of the holder, which it may have held up too.
            unchanged = unchanged + 1 if time.monotonic() - began < 2 * self.renew_seconds else 0
        return now

    def _succeed(self, old: bytes) -> bool:
        """Put a lease of this process in place of one that is free; False if another process was faster."""
        following = self.path.with_name(f"{self.path.name}.next")
        if not self._create(following):
            # Another process takes it over at this moment, or died while it did.
            left = read_lease(following)
            if left is not None and not self._is_mine(left) and self._is_free(following, left):
                following.unlink(missing_ok=True)
            return False
        if read_lease(self.path) != old:
            following.unlink(missing_ok=True)
            return False
        try:
            os.replace(following, self.path)
        except FileNotFoundError:
            # Another process took it for a left one.
            return False
        content = read_lease(self.path)
        return content is not None and self._is_mine(content)

    def _create(self, path: Path) -> bool:
        """Create a lease of this process, whole at once; False if the file exists."""
        self._close()
        partial = path.with_name(f"{path.name}.{self._holder.token}")
        self._file = _write_new(partial, self._holder.encode())
        try:
            os.link(partial, path)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._create_unlinked(path)
        finally:
            partial.unlink(missing_ok=True)

    def _create_unlinked(self, path: Path) -> bool:
        try:
            created = _write_new(path, self._holder.encode())
        except FileExistsError:
            return False
        os.close(self._file)
        self._file = created
        return True

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _renew_for_ever(self) -> None:
        while not self._ended.wait(self.renew_seconds):
            self._renew()

    def _renew(self, *, released: bool = False) -> None:
        """Write the time into the file that this process made, which may have lost its name to another's."""
        self._holder = replace(self._holder, renewed=_now(), renewals=self._holder.renewals + 1, released=released)
        try:
            with self._writing:
                _write(self._file, self._holder.encode())
        except OSError as error:
            self._warn(f"{self.path} cannot be renewed: {error.strerror}")

    def _warn(self, message: str) -> None:
        """Log the first of all failures."""
        if not self._warned:
            logger.warning(message)
        self._warned = True


def _write_new(path: Path, content: bytes) -> int:
    """Write a file that does not exist yet, and return its open descriptor.

    Raises:
        FileExistsError: it exists.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        _write(descriptor, content)
    except OSError:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor


def _write(descriptor: int, content: bytes) -> None:
    os.pwrite(descriptor, content, 0)
    # Other hosts see what was flushed.
    os.fsync(descriptor)


@dataclass(frozen=True)
class LeaseView:
    """State of a lease as another process sees it by one look, see `look_at_lease`."""

    holder: Holder | None
    """None if there is no lease, or it cannot be read."""
    alive: bool | None
    """Whether the holder is running; None if it is of another machine, so that only a second look can tell."""
    content: bytes | None = None


def look_at_lease(path: Path, space: ProcessSpace | None = None) -> LeaseView:
    """Read a lease without taking part in it."""
    content = read_lease(path)
    if content is None:
        return LeaseView(None, False)
    holder = decode_holder(content)
    space = space or ProcessSpace.own()
    if holder is None:
        return LeaseView(None, None, content)
    if holder.is_gone(space):
        return LeaseView(holder, False, content)
    return LeaseView(holder, True if holder.is_in(space) else None, content)
