"""Each operator passes all its arguments to its Triton kernel on a GPU, and to its reference elsewhere."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

import mvd_kernels
from mvd_kernels import dispatch
from mvd_kernels.dispatch import uses_triton

PIXELS, TOKENS = torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int64)
VALUES, AFFINE = torch.zeros(1, 2, 4), torch.zeros(4)
TUBE = {"tubelet": 2, "patch": 4}

CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "tube_rows": ((PIXELS, TOKENS), {**TUBE, "mean": (0, 0, 0), "std": (1, 1, 1), "dtype": torch.float16}),
    "tube_targets": ((PIXELS, TOKENS), {**TUBE, "normalize": "patch"}),
    "masked_distance": ((VALUES, VALUES, TOKENS), {"distance": "l1", "norm": True}),
    "add_layer_norm": ((VALUES, VALUES, AFFINE, AFFINE, 0.5), {}),
    "decoder_input": ((VALUES, AFFINE.view(1, 1, 4), VALUES[0], TOKENS, TOKENS), {}),
}


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("operator", CALLS)
def test_an_operator_hands_on_all_arguments(operator: str, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    module = import_module(f"mvd_kernels.{operator}")
    asked: list[torch.Tensor] = []

    def answer(tensor: torch.Tensor) -> bool:
        asked.append(tensor)
        return on_gpu

    def reached(room: str) -> Any:
        return lambda *arguments, **keywords: (room, arguments, keywords)

    monkeypatch.setattr(module, "uses_triton", answer)
    monkeypatch.setattr(module, "reference", reached("reference"))
    monkeypatch.setattr(import_module(f"mvd_kernels.triton_ops.{operator}"), operator, reached("triton_ops"))
    arguments, keywords = CALLS[operator]
    room, passed, named = getattr(mvd_kernels, operator)(*arguments, **keywords)
    assert room == ("triton_ops" if on_gpu else "reference")
    assert passed == arguments
    assert named == keywords
    assert asked[0] is arguments[0]


def test_a_cpu_takes_the_twin() -> None:
    assert not uses_triton(torch.zeros(1))


@pytest.mark.parametrize(("capability", "result"), [((8, 0), 2), ((7, 5), 1)])
def test_a_compiled_program_dispatches_as_any_other(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], result: int
) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    torch.compiler.reset()  # another GPU is another process
    monkeypatch.setattr(dispatch, "triton_refusal", lambda: "")

    def chosen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1 if dispatch._runs_triton(torch.device("cuda", 0)) else tensor

    assert torch.compile(chosen, backend="eager", fullgraph=True)(torch.ones(1)).item() == result


def test_a_gpu_without_a_compiler_takes_the_reference_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "triton_refusal", lambda: "no C compiler: install gcc")
    dispatch._warn_once.cache_clear()
    with caplog.at_level("WARNING"):
        assert [dispatch._runs_triton(torch.device("cuda", index)) for index in (0, 1)] == [False, False]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "plain torch" in record.message
    assert record.message.endswith("no C compiler: install gcc")


@pytest.mark.gpu
def test_a_gpu_takes_the_kernel() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    assert uses_triton(torch.zeros(1, device="cuda"))
