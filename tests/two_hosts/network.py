"""Two hosts on one machine: network namespaces joined by a cable, each with its own name, addresses and ports.

Nothing that runs on a host reaches another network than the cable. Faults of the cable are those of the kernel: an
interface that is down, or one that drops what it should send. A slow cable, which few kernels imitate, is a thread that
passes the frames on, see `slow_cable`.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.leftovers import TCP_TABLES, find_processes, listening_ports, wait_until_gone
from tests.two_hosts.slow_cable import SlowCable, tap_device

TOOLS = ("hostname", "ip", "mount", "sh", "tc", "unshare")

_NAMESPACES = Path("/run/netns")

# A process of a host has the host's name, and finds the names of all hosts.
_ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'

_numbers = itertools.count()


class Host:
    """Host of the network. Commands run on it by `run` and `start`.

    Args:
        name: name of the host, also of its line in /etc/hosts.
        namespace: name of its network namespace.
        address: its address on the cable.
        names: file that takes the place of /etc/hosts.
    """

    interface = "eth0"
    """Interface of the cable."""

    def __init__(self, name: str, namespace: str, address: str, names: Path) -> None:
        self.name = name
        self.namespace = namespace
        self.address = address
        self.names = names

    def start(self, *command: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start a command in a session of its own; options are those of `subprocess.Popen`."""
        return subprocess.Popen(self._entered(command), start_new_session=True, text=True, **_DEFAULTS | options)

    def run(self, *command: str | Path, **options: Any) -> str:
        """Run a command and return what it printed; a failure raises `CalledProcessError`."""
        return subprocess.check_output(self._entered(command), text=True, **{"timeout": 60} | _DEFAULTS | options)

    def link_down(self) -> None:
        """Unplug the cable at this host."""
        _run("ip", "-n", self.namespace, "link", "set", self.interface, "down")

    def link_up(self) -> None:
        """Plug the cable in again."""
        _run("ip", "-n", self.namespace, "link", "set", self.interface, "up")

    def stop_sending(self) -> None:
        """Cut the way from this host to the other: what it sends is lost, what it is sent arrives."""
        _run("tc", "-n", self.namespace, "qdisc", "add", "dev", self.interface, "root", "blackhole")

    def go_on_sending(self) -> None:
        """Mend the way from this host to the other."""
        _run("tc", "-n", self.namespace, "qdisc", "delete", "dev", self.interface, "root")

    def processes(self) -> list[psutil.Process]:
        """All living processes of the host, those whose parents have ended as well."""
        inode = (_NAMESPACES / self.namespace).stat().st_ino
        return find_processes(lambda pid: os.stat(f"/proc/{pid}/ns/net").st_ino == inode)

    def kill_all(self) -> None:
        """End every process at once, as a loss of power does: none sees another one end."""
        while processes := self.processes():
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for process in processes:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(number)
            # Not waited for by psutil, which would take the exit codes of those that a test has started.
            time.sleep(0.05)

    def listening_ports(self) -> set[int]:
        """TCP ports that are held by a listening process of the host."""
        return listening_ports(self.run("cat", *TCP_TABLES))

    def _entered(self, command: Sequence[str | Path]) -> list[str]:
        inside = ["sh", "-c", _ENTER, "sh", self.name, self.names, *command]
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", *map(str, inside)]


# A test runner in the background ignores SIGINT, and its children would too.
_DEFAULTS: Mapping[str, Any] = {
    "stdin": subprocess.DEVNULL,
    "preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
}


@contextmanager
def connected_hosts(scratch: Path, slow: SlowCable | None = None) -> Iterator[tuple[Host, Host]]:
    """Two hosts, `node-1` and `node-2`, which exist in the `with` block; then all their processes end.

    Args:
        scratch: folder for a file.
        slow: cable that delays and loses frames; a plain one if None.
    """
    skip_without_namespaces()
    number = f"{os.getpid()}-{next(_numbers)}"
    names = scratch / f"hosts-{number}"
    hosts = tuple(Host(f"node-{k}", f"mvd-{number}-{k}", f"10.77.0.{k}", names) for k in (1, 2))
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts))
    with ExitStack() as stack:
        for host in hosts:
            try:
                _run("ip", "netns", "add", host.namespace)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
            stack.callback(_run, "ip", "netns", "delete", host.namespace)
            stack.callback(host.kill_all)
        _plug_in(hosts, slow, stack)
        yield hosts[0], hosts[1]


def skip_without_namespaces() -> None:
    """Skip the test, with the reason, where no network namespaces can be made."""
    if os.name != "posix" or os.geteuid():
        pytest.skip("network namespaces need root")
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"network namespaces need {', '.join(missing)} (Debian and Ubuntu: apt install iproute2)")


def wait_until_empty(hosts: Sequence[Host], seconds: float) -> None:
    """Wait until no process is left on the hosts.

    Raises:
        AssertionError: some are left after these seconds.
    """
    for host in hosts:
        try:
            wait_until_gone(host.processes, seconds)
        except AssertionError as error:
            raise AssertionError(f"{host.name}: {error}") from None


def _plug_in(hosts: Sequence[Host], slow: SlowCable | None, stack: ExitStack) -> None:
    """Join the hosts by a cable, and give them their addresses."""
    ends = [f"mvd{os.getpid()}{side}" for side in "ab"]
    if slow is None:
        _run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    else:
        stack.enter_context(slow.between(*(stack.enter_context(tap_device(end)) for end in ends)))
    for host, end in zip(hosts, ends, strict=True):
        _run("ip", "link", "set", end, "netns", host.namespace, "name", host.interface)
        _run("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
        _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        host.link_up()


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)
