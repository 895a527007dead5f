"""Meeting of the hosts of a job over the store of the launcher's rendezvous: it goes on without those that do not come.

The process group of a run waits for all ranks. The meeting waits for a set time, and knows who is there. All messages
are JSON; rank 0 leads.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, PrefixStore, Store  # type: ignore[attr-defined]

from mvd_scale.config.launcher import LaunchedRank
from mvd_scale.distributed import rendezvous
from mvd_scale.distributed.process_group import choose_device
from mvd_scale.distributed.rendezvous import choose_way, resolve_endpoint
from mvd_scale.doctor.findings import TimeLimit, within
from mvd_scale.errors import UserError
from mvd_scale.utils.machine import machine_id

_MARGIN = 10.0
"""Seconds that a rank waits for the leader beyond the leader's own wait for the slowest."""


_POLL, _SLOWEST_POLL = 0.02, 0.25
_BEAT, _SILENT = 2.0, 30.0
"""Seconds between two signs of life of a host, and those after which one without them is not waited for."""


class NoAnswer(Exception):
    """A rank, or the store, that does not answer in time."""


@dataclass(frozen=True)
class Seat:
    """A rank at the meeting."""

    rank: int
    local_rank: int

    host: str
    """Identifier of its host: the launcher's number, or else name and boot id."""

    name: str
    """Name that its host calls itself."""

    device: str
    """`cuda` or `cpu`."""

    label: str = ""
    """Name of the host in findings, unique in the job."""


class Meeting:
    """Meeting of the ranks of a job, as one of them sees it.

    Args:
        store: store that all ranks reach.
        seat: this rank.
    """

    def __init__(self, store: Store, seat: Seat) -> None:
        self._store = store
        self.seat = seat
        self.seats: list[Seat] = []
        """All ranks that came, in their order; empty until `assemble`."""
        self._present: list[int] = []
        """Ranks of the hosts that were ready for all phases so far; of meaning on rank 0."""
        self._beats: dict[int, tuple[int, float]] = {}
        """Last sign of life of each host, and when it was seen; of meaning on rank 0."""
        self.put(f"rank/{seat.rank}", asdict(seat))

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.seat.rank == 0

    @property
    def hosts(self) -> list[Seat]:
        """First rank of every host that came, in the order of ranks."""
        return [seat for seat in self.seats if seat.local_rank == 0]

    @property
    def device(self) -> str:
        """Device of collective operations: `cuda` if all ranks have a GPU, else `cpu`."""
        return "cuda" if all(seat.device == "cuda" for seat in self.seats) else "cpu"

    def put(self, key: str, value: Any) -> None:
        """Publish a value under a name.

        Raises:
            NoAnswer: the store does not answer.
        """
        text = json.dumps(value)
        _answered(lambda: self._store.set(key, text), _SILENT)

    def get(self, key: str, seconds: float) -> Any:
        """Wait for a value, and return it.

        Raises:
            NoAnswer: it does not come in time, or the store does not answer.
        """
        seconds = max(seconds, 0.001)
        try:
            within(seconds + _MARGIN, lambda: self._store.wait([key], timedelta(seconds=seconds)))
        except (DistError, TimeLimit) as error:
            raise NoAnswer(f"no answer within {seconds:.0f} s ({key})") from error
        return json.loads(_answered(lambda: self._store.get(key), _SILENT))

    def poll(self, key: str, seconds: float) -> Any:
        """Wait for a value as `get` does, but ask again and again: so a store that is gone is noticed.

        Raises:
            NoAnswer: it does not come in time, or the store does not answer.
        """
        until, pause = time.monotonic() + seconds, _POLL
        while not self.has(key):
            if time.monotonic() > until:
                raise NoAnswer(f"no answer within {seconds:.0f} s ({key})")
            time.sleep(pause)
            pause = min(2 * pause, _SLOWEST_POLL)
        return self.get(key, _MARGIN)

    def has(self, key: str) -> bool:
        """Whether a value was published.

        Raises:
            NoAnswer: the store does not answer.
        """
        return bool(_answered(lambda: self._store.check([key]), _SILENT))

    def branch(self, name: str) -> Store:
        """Return the same store with names of its own, for a process group."""
        return PrefixStore(name, self._store)

    def assemble(self, world_size: int, seconds: float, names: Sequence[str] = ()) -> None:
        """Wait for the ranks of the job, and learn who came.

        Args:
            world_size: number of ranks that are expected.
            seconds: longest time that rank 0 waits for the others, and that they wait for rank 0.
            names: names of the hosts in the order of the launcher; otherwise what hosts call themselves.

        Raises:
            NoAnswer: rank 0 does not answer, or it did not wait for this rank.
        """
        if self.leads:
            until = time.monotonic() + seconds
            came = [Seat(**value) for _, value in self._collect((f"rank/{n}" for n in range(world_size)), until)]
            self.put("roster", [asdict(seat) for seat in labelled(came, names)])
        # Not `get`, which holds the connection: signs of life go over it meanwhile.
        self.poll("rank/0", seconds)
        # Rank 0 may have come after this rank, and waits from then on.
        seats = [Seat(**value) for value in self.poll("roster", seconds + _MARGIN)]
        mine = [seat for seat in seats if seat.rank == self.seat.rank]
        if not mine:
            raise NoAnswer("rank 0 did not wait for this rank any longer")
        self.seats, self.seat = seats, mine[0]
        self._present = [host.rank for host in self.hosts]

    def begin(self, phase: str, seconds: float, order: Any = None) -> Any:
        """Begin a phase together with the other hosts. One that is not ready in time is not waited for again.

        Args:
            phase: name of the phase, unique in the job.
            seconds: longest time that a host may need until it is ready.
            order: what rank 0 tells the others; of no meaning on them.

        Returns:
            ranks of the hosts that take part, and the order of rank 0.

        Raises:
            NoAnswer: rank 0 does not answer, or did not wait for this host.
        """
        self.put(f"phase/{self.seat.rank}", phase)
        self.put(f"{phase}/ready/{self.seat.rank}", True)
        if self.leads:
            keys = {f"{phase}/ready/{rank}": rank for rank in self._present}
            until = time.monotonic() + seconds
            self._present = [keys[key] for key, _ in self._collect(keys, until, lambda key: self._silent(keys[key]))]
            self.put(f"{phase}/begin", [self._present, order])
        ready, order = self.poll(f"{phase}/begin", seconds + _MARGIN)
        if self.seat.rank not in ready:
            raise NoAnswer(f"rank 0 did not wait for this host any longer, before {phase}")
        return ready, order

    def phase_of(self, rank: int) -> str:
        """Name of the phase that a host was ready for last; empty if for none."""
        return next((phase for _, phase in self._collect([f"phase/{rank}"], time.monotonic())), "")

    def live(self) -> None:
        """Send signs of life from now on, by a thread."""
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        with suppress(NoAnswer):
            for number in itertools.count():
                self.put(f"beat/{self.seat.rank}", number)
                time.sleep(_BEAT)

    def _silent(self, rank: int) -> bool:
        """Whether a host has not sent a sign of life for `_SILENT` seconds, while rank 0 waited for it."""
        number, now = self.get(f"beat/{rank}", _MARGIN) if self.has(f"beat/{rank}") else -1, time.monotonic()
        if self._beats.get(rank, (None, now))[0] != number:
            self._beats[rank] = number, now
        return now - self._beats[rank][1] > _SILENT

    def _collect(
        self, keys: Iterable[str], until: float, give_up: Callable[[str], bool] = lambda key: False
    ) -> Iterator[tuple[str, Any]]:
        """Yield the values that are published until a time, with their names."""
        for key in keys:
            # Not `get`, whose wait logs a warning of torch where a value does not come.
            while not (there := self.has(key)) and time.monotonic() < until and not give_up(key):
                time.sleep(_POLL)
            if there:
                yield key, self.get(key, _MARGIN)


def _answered(ask: Callable[[], Any], seconds: float) -> Any:
    """Ask the store. Over a link that is cut torch would wait until the kernel gives up, which takes many minutes.

    Raises:
        NoAnswer: it does not answer in time, or is gone.
    """
    try:
        return within(seconds, ask)
    except (DistError, TimeLimit) as error:
        raise NoAnswer(f"the store of rank 0 does not answer: {next(iter(str(error).splitlines()), '')}") from error


def labelled(seats: list[Seat], names: Sequence[str]) -> list[Seat]:
    """Give each host a label that no other host has: the name in the hostfile, or its own name and a number."""
    order = list(dict.fromkeys(seat.host for seat in seats))
    own = {seat.host: seat.name for seat in seats}
    known = {host: names[int(host)] for host in order if host.isdecimal() and int(host) < len(names)}
    often = Counter(own.values())
    labels = {
        host: known.get(host) or (own[host] if often[own[host]] == 1 else f"{own[host]}#{place}")
        for place, host in enumerate(order)
    }
    return [Seat(**{**asdict(seat), "label": labels[seat.host]}) for seat in seats]


def own_seat(rank: LaunchedRank) -> Seat:
    """Describe this rank."""
    host = " ".join(machine_id()) if rank.host is None else rank.host
    return Seat(rank.rank, rank.local_rank, host, socket.gethostname(), choose_device("auto").type)


def open_store(rank: LaunchedRank, seconds: float) -> Store:
    """Open the store where the launcher lets ranks meet, and choose the interface for gloo, both as a run does.

    Raises:
        NoAnswer: it cannot be reached or served, or no interface leads there.
    """
    timeout = timedelta(seconds=seconds)
    several = rank.world_size > 1 if rank.hosts is None else rank.hosts > 1
    try:
        endpoint = resolve_endpoint(rank.address, rank.port, timeout)
        choose_way(endpoint, os.environ, several_hosts=several, device=choose_device("auto"))
        if rank.rank or rank.store_of_agent:
            # A client of the store would print a trace of torch's own code.
            await_server(rank.address, rank.port, seconds)
        store = rendezvous.open_store(endpoint, rank.rank, rank.world_size, timeout, wait_for_all=False)
    except (UserError, DistError) as error:
        raise NoAnswer(next(iter(str(error).splitlines()), "")) from error
    return PrefixStore(f"mvd_scale/doctor/{rank.attempt}", store)


def await_server(address: str, port: int, seconds: float) -> None:
    """Wait until a TCP connection to an address can be opened.

    Raises:
        NoAnswer: it cannot in that time; the message has the reason.
    """
    until = time.monotonic() + seconds
    while reason := diagnose(address, port, max(until - time.monotonic(), 1.0)):
        if time.monotonic() > until:
            raise NoAnswer(reason)
        time.sleep(_POLL)


def diagnose(address: str, port: int, seconds: float) -> str:
    """Reason why a TCP connection to an address cannot be opened; empty if it can."""
    try:
        with socket.create_connection((address, port), timeout=seconds):
            return ""
    except socket.gaierror as error:
        return f"the name {address} is not known here ({error.strerror})"
    except TimeoutError:
        return f"no answer from {address}:{port}: a firewall drops it, or there is no way to that network"
    except ConnectionRefusedError:
        return f"nothing listens at {address}:{port}: rank 0 did not start there, or has ended"
    except OSError as error:
        return f"{address}:{port} cannot be reached: {error.strerror}"
