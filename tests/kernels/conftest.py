"""Fixtures that run kernels: in Triton's interpreter, and on a GPU if there is one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .evaluation import Call, evaluate

Evaluate = Callable[[Call], tuple[list[Tensor], list[Tensor]]]


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Evaluate]:
    """Evaluates calls in a process of Triton's interpreter; the variable that makes it one is set for it alone."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("evaluation.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def run(call: Call) -> tuple[list[Tensor], list[Tensor]]:
        assert process.stdin is not None
        assert process.stdout is not None
        pickle.dump(tuple(getattr(call, f.name) for f in fields(call)), process.stdin)
        process.stdin.flush()
        answer = pickle.load(process.stdout)
        assert not isinstance(answer, str), answer
        return answer

    yield run
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel(request: pytest.FixtureRequest) -> Evaluate:
    """Evaluates a call by its Triton kernels; results and gradients come back on the CPU."""
    if request.param == "interpreter":
        return request.getfixturevalue("interpreter")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")

    def run(call: Call) -> tuple[list[Tensor], list[Tensor]]:
        results, gradients = evaluate(call.to("cuda"), "triton_ops")
        return [tensor.cpu() for tensor in results], [tensor.cpu() for tensor in gradients]

    return run
