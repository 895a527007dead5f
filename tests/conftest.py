"""Configuration of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.fork_server import ForkServer

# The same examples in every run: a failure must come from the change that is tested.
settings.register_profile("same examples", derandomize=True, deadline=None)
settings.load_profile("same examples")


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Runs commands of the package in processes that need not import it."""
    server = ForkServer()
    yield server
    server.close()
