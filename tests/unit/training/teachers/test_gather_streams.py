"""Gathers of a moving average's shards come after the writes of the step: they start on the stream that wrote."""

from __future__ import annotations

import json

from tests.fork_server import ForkServer


def test_a_moving_teacher_is_gathered_on_the_current_stream(fork_server: ForkServer) -> None:
    """DeepSpeed's own stream for gathers does not wait for the current one, which is right for weights that stay."""
    code, output = fork_server.run("tests.unit.training.teachers.gather_streams", ranks=1)
    assert code == 0, output[-3000:]
    assert json.loads(output.splitlines()[-1]) == {"stays": ["apart"], "moves": ["current"]}
