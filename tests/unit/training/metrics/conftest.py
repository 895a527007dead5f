"""Values of a reading, and what was logged."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from mvd_scale.training.metrics.sink import Values


@pytest.fixture
def values() -> Values:
    return {
        "loss": 1.25,
        "loss/image": 0.5,
        "loss/video": 0.75,
        "lr": 1e-3,
        "weight_decay": 0.05,
        "grad_norm": float("inf"),
        "loss_scale": 1.0,
        "skipped_steps": 0.0,
        "clips_per_second": 2.0,
        "data_wait_share": 0.25,
        "seconds_per_step": 4.0,
        "memory_gib": 1.5,
        "clips_replaced": 3.0,
    }


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Messages of the package, which does not hand them on to pytest's handler."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("mvd_scale")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)
