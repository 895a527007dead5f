"""Tests of hostfiles: each is read as DeepSpeed reads it, or named with its line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from mvd_scale.distributed.hostfile import check_node_rank, read_hostfile
from mvd_scale.errors import UserError


def test_what_is_read_is_what_deepspeed_reads(tmp_path: Path) -> None:
    file = tmp_path / "hostfile"
    file.write_bytes(b"# hosts\r\n\r\nnode-1   slots=8 # 1st\r\nme@10.0.0.2\tslots=4 max_slots=8\r\nfe80::1 slots=2")
    hosts = {"node-1": 8, "me@10.0.0.2": 4, "fe80::1": 2}
    assert read_hostfile(str(file)) == hosts == dict(fetch_hostfile(str(file)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a slots=2\nb\n", r"hostfile:2: 'b' is malformed, it has no slots: expected `HOST slots=N`"),
        ("a slots=x\n", r"hostfile:1: 'a slots=x' is malformed, slots is 'x'"),
        ("a slots = 2\n", r"hostfile:1: .* malformed, slots is '2'"),
        ("a slots=2.5\n", r"hostfile:1: .* malformed, slots is '2.5'"),
        ("a slots=-2\n", r"hostfile:1: .* malformed, slots is '-2'"),
        ("a:8\n", r"hostfile:1: 'a:8' is malformed, it has no slots"),
        ("a b slots=2\n", r"hostfile:1: 'a b slots=2' is malformed"),
        ("\ufeffa slots=2\n", r"hostfile:1: .* byte order mark"),
        ("a slots=2\n\na slots=2\n", r"hostfile:3: the host a is in line 1 already"),
        ("node slots=2\nNode slots=2\n", r"hostfile:2: the host Node is in line 1 already"),
        ("node-[1-4] slots=2\n", r"hostfile:1: 'node-\[1-4\]' is no name or address of a host"),
        ("a,b slots=2\n", r"hostfile:1: 'a,b' is no name or address of a host"),
        ("$HOST slots=2\n", r"hostfile:1: .* is no name or address of a host"),
        ("-a slots=2\n", r"hostfile:1: .* is no name or address of a host"),
        ("[fe80::1]:22 slots=2\n", r"hostfile:1: .* is no name or address of a host"),
        ("a slots=2\u2028b slots=2\n", r"hostfile:1: .* is malformed"),
        ("a slots=0\n", r"hostfile:1: slots=0 of the host a, expected 1 to"),
        ("a slots=99999\n", r"hostfile:1: slots=99999 of the host a"),
        ("# none\n\n", r"hostfile lists no hosts"),
        ("", r"hostfile lists no hosts"),
        (b"\xff\xfea\0", r"hostfile cannot be read: it is not text in UTF-8"),
        (None, r"hostfile cannot be read: No such file"),
    ],
)
def test_a_malformed_one_is_named_with_its_line(tmp_path: Path, text: str | bytes | None, said: str) -> None:
    file = tmp_path / "hostfile"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said):
        read_hostfile(str(file))


@pytest.mark.parametrize("rank", ["2", "-1", "first"])
def test_a_node_rank_that_no_host_has(rank: str) -> None:
    check_node_rank("hostfile", 2, "1")
    with pytest.raises(UserError, match=f"NODE_RANK is {rank}, but the hostfile hostfile has 2 hosts: expected 0 to 1"):
        check_node_rank("hostfile", 2, rank)


def test_the_command_says_nothing_or_one_line(tmp_path: Path) -> None:
    file = tmp_path / "hostfile"
    for text, code in (("a slots=2\n", 0), ("a slots=0\n", 2)):
        file.write_text(text)
        command = [sys.executable, "-m", "mvd_scale.distributed.hostfile", str(file)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (ended.returncode, len(ended.stderr.splitlines()), ended.stdout) == (code, code // 2, "")
