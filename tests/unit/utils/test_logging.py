"""Set-up of logging ends with the test that makes it: later ones see the messages of the package."""

from __future__ import annotations

import logging

import pytest

from mvd_scale.utils.logging import configure_logging

pytestmark = pytest.mark.filterwarnings("ignore:.* leaves logging changed")


@pytest.mark.parametrize("time", ["first", "second"])
def test_messages_are_seen_after_a_test_that_sets_logging_up(time: str, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("mvd_scale").warning("heard")
    assert caplog.messages == ["heard"]
    configure_logging()
    logging.disable()
