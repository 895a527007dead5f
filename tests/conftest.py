"""Configuration of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from mvd_scale.utils.scheduling import leave_real_time
from tests.fork_server import ForkServer

# The same examples in every run: a failure must come from the change that is tested.
settings.register_profile("same examples", derandomize=True, deadline=None)
settings.load_profile("same examples")


@pytest.fixture(autouse=True)
def ordinary_priority() -> Iterator[None]:
    """A test that encodes AV1 leaves no real-time priority to those after it, which would starve the others."""
    yield
    leave_real_time()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Runs commands of the package in processes that need not import it."""
    server = ForkServer()
    yield server
    server.close()
