"""Configuration of all tests."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from typing import NamedTuple

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


@pytest.fixture(autouse=True)
def ordinary_signals() -> Iterator[None]:
    """A test leaves no signal ignored, such as the watchdog's of a run that ends: later tests' processes would inherit
    it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Logging(NamedTuple):
    """State on which it depends whether `caplog` sees a message of the package."""

    disabled_level: int
    root_level: int
    enabled: bool
    """Whether the package may log warnings, by all that `logging` looks at."""
    loggers: dict[str, tuple[int, bool, bool, list[logging.Handler]]]
    """Level, propagation, whether it is disabled, and handlers, by name."""

    @staticmethod
    def now() -> Logging:
        loggers = {name: logging.getLogger(name) for name in ("mvd_scale", "mvd_kernels")}
        states = {name: (one.level, one.propagate, one.disabled, one.handlers[:]) for name, one in loggers.items()}
        enabled = all(logger.isEnabledFor(logging.WARNING) for logger in loggers.values())
        return Logging(logging.root.manager.disable, logging.root.level, enabled, states)

    def restore(self) -> None:
        logging.disable(self.disabled_level)
        logging.root.setLevel(self.root_level)
        for name, (level, propagate, disabled, handlers) in self.loggers.items():
            logger = logging.getLogger(name)
            logger.setLevel(level)
            logger.propagate, logger.disabled, logger.handlers = propagate, disabled, handlers[:]


_LOGGING = Logging.now()


@pytest.fixture(autouse=True)
def ordinary_logging(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test sees the messages of the package, whatever an earlier one, or a fixture of its module, has set up.

    A level or `logging.disable` that is left keeps them from pytest's handler for the rest of the process, and so does
    `configure_logging` with releases of pytest that pass over loggers without propagation. So does DeepSpeed: it sets
    the level of all handlers of its logger, to which pytest 9.2 adds its own.
    """
    _LOGGING.restore()
    capture = request.config.pluginmanager.get_plugin("logging-plugin")
    if capture is not None:
        capture.caplog_handler.setLevel(logging.NOTSET)
        capture.report_handler.setLevel(logging.NOTSET)
    yield
    if (left := Logging.now()) != _LOGGING:
        warnings.warn(f"{request.node.nodeid} leaves logging changed: {left}", stacklevel=1)
        _LOGGING.restore()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Runs commands of the package in processes that need not import it."""
    server = ForkServer()
    yield server
    server.close()
