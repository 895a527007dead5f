"""Fixtures of the self-test of a machine with a GPU: the GPU, the reason to skip, the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mvd_scale.performance.bringup.checks.rank_group import RankGroup
from mvd_scale.performance.bringup.checks.zero_ranks import jobs_of
from mvd_scale.performance.bringup.session import Check

from .report import SelfTestReport

Figure = Callable[[str, object], None]
Seen = list[dict[str, Any]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", type=Path, metavar="FILE", help="write what the GPU self-test found as Markdown")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--gpu-report", default=None)
    if path is not None:
        config.pluginmanager.register(SelfTestReport(path), "gpu-report")


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    """The first GPU. Nothing in this folder runs without one."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda", 0)


@pytest.fixture
def figure(record_property: Figure) -> Figure:
    """Tell the report a number of this check: `figure("clips/s", 12.3)`."""
    return record_property


def launch(device: str, ranks: int, out: Path) -> Seen:
    """Run the jobs of `zero_ranks` on every rank and return the results of all ranks."""
    out.mkdir()
    jobs = jobs_of(device)
    with RankGroup(device, ranks, out, jobs) as group:
        seen = {job: group.wait_for(job) for job in jobs}
    return [{job: results[rank] for job, results in seen.items()} for rank in range(ranks)]


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return launch("cuda", 1, tmp_path_factory.mktemp("one") / "out")


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: this needs two")
    return launch("cuda", 2, tmp_path_factory.mktemp("two") / "out")


@pytest.fixture(scope="session")
def most(request: pytest.FixtureRequest) -> Seen:
    """On two GPUs where there are two."""
    return request.getfixturevalue("two" if torch.cuda.device_count() > 1 else "one")


@pytest.fixture
def check(record_property: Figure) -> Iterator[Check]:
    """A check of the bring-up, whose figures go to the report."""
    made = Check({})
    yield made
    for name, value in made.figures.items():
        record_property(name, value)
