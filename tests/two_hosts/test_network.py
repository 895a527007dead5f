"""Two hosts on one machine: they see each other by name, and nobody else; their cable can be cut; nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mvd_scale.distributed.free_port import free_port
from tests.two_hosts.network import Host, connected_hosts
from tests.two_hosts.slow_cable import SlowCable

_ECHO = """
import socket
with socket.create_server(("", 5000)) as server:
    connection, _ = server.accept()
    while data := connection.recv(99):
        connection.sendall(data)
"""

_CLIENT = """
import socket, sys, time
peer = socket.create_connection(("node-1", 5000))
peer.settimeout(1)
print(socket.gethostname(), *peer.getsockname(), flush=True)
for line in sys.stdin:
    started = time.monotonic()
    peer.sendall(b"x")
    try:
        peer.recv(1)
        print(time.monotonic() - started, flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


class Talk:
    """Connection of node-2 to node-1, over which it asks and waits for the answer for a second."""

    def __init__(self, hosts: tuple[Host, Host]) -> None:
        server, client = hosts
        server.start(sys.executable, "-c", _ECHO)
        while 5000 not in server.listening_ports():
            time.sleep(0.02)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._client = client.start(sys.executable, "-c", _CLIENT, **pipes)
        assert self._client.stdout
        self.name, self.address, _ = self._client.stdout.readline().split()

    def ask(self) -> str:
        assert self._client.stdin
        assert self._client.stdout
        self._client.stdin.write("\n")
        self._client.stdin.flush()
        return self._client.stdout.readline().strip()


def test_hosts_reach_each_other_by_name(hosts: tuple[Host, Host]) -> None:
    talk = Talk(hosts)
    assert (talk.name, talk.address) == ("node-2", hosts[1].address)
    assert talk.ask() != "TimeoutError"


def test_hosts_reach_nobody_else(hosts: tuple[Host, Host]) -> None:
    assert hosts[0].run("ip", "-brief", "route").split()[0] == "10.77.0.0/24"
    assert hosts[0].run("ip", "route", "show", "default") == ""
    # The same port of the runner and of the other host is another one.
    port = free_port()
    held = hosts[0].start(sys.executable, "-c", f"import socket; s = socket.create_server(('', {port})); input()",
                          stdin=subprocess.PIPE)  # fmt: skip
    while port not in hosts[0].listening_ports():
        assert held.poll() is None
    assert hosts[1].listening_ports() == set()
    assert free_port(port) == port


@pytest.mark.parametrize("way", ["unplugged", "one way", "the other way"])
def test_a_cut_cable_carries_nothing_and_says_nothing(hosts: tuple[Host, Host], way: str) -> None:
    talk = Talk(hosts)
    one, other = hosts
    cut, mend = {
        "unplugged": (one.link_down, one.link_up),
        "one way": (one.stop_sending, one.go_on_sending),
        "the other way": (other.stop_sending, other.go_on_sending),
    }[way]
    cut()
    assert talk.ask() == "TimeoutError"
    mend()
    # The kernel sends again what was lost, later and later.
    assert any(talk.ask() != "TimeoutError" for _ in range(8))


def test_a_slow_cable_delays_both_ways_and_loses_frames(tmp_path: Path) -> None:
    with connected_hosts(tmp_path, SlowCable(0.05, loss=0)) as hosts:
        talk = Talk(hosts)
        assert float(talk.ask()) >= 0.1
    with connected_hosts(tmp_path, SlowCable(0.0, loss=1)) as hosts, pytest.raises(subprocess.CalledProcessError):
        hosts[0].run(sys.executable, "-c", "import socket; socket.create_connection(('node-2', 5000), 0.5)",
                     stderr=subprocess.DEVNULL)  # fmt: skip


def test_nothing_is_left_after_a_failure(tmp_path: Path) -> None:
    made: list[Host] = []
    orphans: list[psutil.Process] = []

    def fail() -> None:
        with connected_hosts(tmp_path) as hosts:
            made.extend(hosts)
            # In a session of its own, and without a parent that waits for it.
            hosts[1].run("sh", "-c", "setsid sleep 1000 >/dev/null & exit 0")
            orphans.extend(hosts[1].processes())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(orphans) == 1
    # Nobody may have taken its exit code yet.
    assert not orphans[0].is_running() or orphans[0].status() == psutil.STATUS_ZOMBIE
    assert not any(Path("/run/netns", host.namespace).exists() for host in made)
    assert f"mvd{os.getpid()}" not in subprocess.check_output(["ip", "-brief", "link"], text=True)


def test_without_root_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(pytest.skip.Exception, match="need root"), connected_hosts(tmp_path):
        pass
