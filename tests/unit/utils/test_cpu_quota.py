"""Limits of CPU time by control groups, as Linux tells of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvd_scale.utils.cpu_quota import cpu_quota

V1 = """12:memory:/docker/ab
4:cpu,cpuacct:/docker/ab
0::/docker/ab
"""


def system(root: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Files of /proc and /sys/fs/cgroup, written below a folder."""
    root.joinpath("cgroup").write_text(membership)
    for name, text in files.items():
        file = root / "mounts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root / "cgroup", root / "mounts"


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        pytest.param("0::/\n", {"cpu.max": "400000 100000\n"}, 4, id="v2, a container"),
        pytest.param("0::/\n", {"cpu.max": "max 100000\n"}, None, id="v2, no limit"),
        pytest.param("0::/\n", {}, None, id="v2, the root of a machine"),
        pytest.param(
            "0::/a/b/c\n",
            {"a/b/c/cpu.max": "max 100000\n", "a/b/cpu.max": "1500000 100000\n", "a/cpu.max": "3200000 100000\n"},
            15,
            id="v2, the least of those around it",
        ),
        pytest.param("0::/../pod\n", {"cpu.max": "50000 100000\n"}, 0.5, id="v2, a name of outside"),
        pytest.param(
            V1,
            {"cpu/docker/ab/cpu.cfs_quota_us": "250000\n", "cpu/docker/ab/cpu.cfs_period_us": "100000\n"},
            2.5,
            id="v1, on the machine",
        ),
        pytest.param(
            V1,
            {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            4,
            id="v1, in the container",
        ),
        pytest.param(
            V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None, id="v1, no limit"
        ),
        pytest.param("1:name=systemd:/\n", {"cpu.max": "400000 100000\n"}, None, id="no group of the CPU"),
    ],
)
def test_the_limit_of_the_group(membership: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert cpu_quota(*system(tmp_path, membership, files)) == quota


def test_a_system_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "missing", tmp_path) is None
