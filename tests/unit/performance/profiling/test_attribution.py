"""Attribution of a step's time to parts, passes and kinds of work, on traces written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mvd_scale.performance.profiling.attribution import (
    COMMUNICATION,
    GRADIENTS,
    IDLE,
    OUTSIDE,
    Place,
    attribute,
    kind_of,
)
from mvd_scale.performance.profiling.trace import STEP, read_events

PARTS = {
    "student forward": Place("student forward", "forward", "rest"),
    "encoder": Place("encoder", "forward", "rest"),
    "decoder": Place("decoder", "forward", "rest"),
    "backward": GRADIENTS,
    "optimizer": Place("optimizer", "", "memory"),
}
NODE = "autograd::engine::evaluate_function: "


def event(cat: str, name: str, start: float, milliseconds: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    times = {"ts": 1e9 + 1000 * start, "dur": 1000 * milliseconds}
    return {"ph": "X", "cat": cat, "name": name, "tid": tid, **times, "args": args}


def note(name: str, start: float, milliseconds: float) -> dict[str, Any]:
    return event("user_annotation", name, start, milliseconds)


def op(name: str, start: float, milliseconds: float, number: int | None = None, tid: int = 1) -> dict[str, Any]:
    return event("cpu_op", name, start, milliseconds, tid, **({} if number is None else {"Sequence number": number}))


FORWARD = [
    note(STEP, 0, 100),
    note("student forward", 0, 40),
    note("encoder", 1, 19),
    op("aten::linear", 2, 8, 5),
    op("aten::addmm", 3, 6, 6),
    # The copy of the bias, which belongs to the product.
    op("aten::copy_", 4, 1),
    op("aten::scaled_dot_product_attention", 11, 5, 7),
    op("aten::transpose", 12, 1, 7),
    note("mvd_quantize", 17, 1),
    note("decoder", 21, 10),
    op("aten::gelu", 22, 4, 8),
    op("aten::smooth_l1_loss", 41, 2, 9),
]
BACKWARD = [
    note("backward", 50, 30),
    op(f"{NODE}SmoothL1LossBackward0", 51, 2, 9),
    op("aten::smooth_l1_loss_backward", 51.5, 1),
    op(f"{NODE}GeluBackward0", 54, 4, 8),
    op("aten::gelu_backward", 55, 3, 10),
    op(f"{NODE}AddmmBackward0", 60, 6, 6),
    op("aten::mm", 61, 4, 10),
    op(f"{NODE}torch::autograd::AccumulateGrad", 70, 5),
    op("aten::copy_", 71, 4),
]


def milliseconds(events: list[dict[str, Any]], elapsed: float) -> dict[tuple[str, str, str], float]:
    seconds = attribute(events, PARTS, elapsed / 1000)
    assert sum(seconds.values()) == pytest.approx(elapsed / 1000)
    return {
        (place.part, place.passes, place.kind): pytest.approx(1000 * spent)
        for place, spent in seconds.items()
        if abs(spent) > 1e-9
    }


def test_every_moment_belongs_to_the_innermost_event_and_all_add_up() -> None:
    optimizer = [note("optimizer", 85, 10), op("aten::_fused_adam_", 86, 8)]
    assert milliseconds([*FORWARD, *BACKWARD, *optimizer], elapsed=101) == {
        ("student forward", "forward", "rest"): 40 - 19 - 10,
        # The linear layer around its product, the product, and 8-bit levels for products.
        ("encoder", "forward", "products"): 2 + 6 + 1,
        # With all that attention calls.
        ("encoder", "forward", "attention"): 5,
        ("encoder", "forward", "rest"): 19 - 8 - 5 - 1,
        ("decoder", "forward", "memory"): 4,
        ("decoder", "forward", "rest"): 6,
        ("loss and rest", "forward", "memory"): 2,
        ("loss and rest", "forward", "rest"): 100 - 40 - 2 - 30 - 10 + 1,
        ("loss and rest", "backward", "memory"): 1,
        ("loss and rest", "backward", "rest"): 1,
        ("decoder", "backward", "memory"): 3,
        ("decoder", "backward", "rest"): 1,
        ("encoder", "backward", "products"): 4,
        ("encoder", "backward", "rest"): 2,
        ("gradients", "", "memory"): 30 - 2 - 4 - 6,
        ("optimizer", "", "memory"): 10,
    }


def test_of_operators_with_one_number_the_latest_made_the_node() -> None:
    """A teacher without gradients leaves the number to the loss after it."""
    events = [
        note(STEP, 0, 10),
        note("encoder", 0, 2),
        op("aten::gelu", 0, 1, 3),
        op("aten::mse_loss", 3, 1, 3),
        note("backward", 5, 5),
        op(f"{NODE}MseLossBackward0", 6, 2, 3),
    ]
    assert milliseconds(events, 10)[("loss and rest", "backward", "rest")] == 2


def test_a_kernel_belongs_to_the_place_that_launched_it_and_overlap_counts_once() -> None:
    def launch(start: float, number: int, tid: int = 1) -> dict[str, Any]:
        return event("cuda_runtime", "cudaLaunchKernel", start, 0.1, tid, correlation=number)

    def kernel(name: str, start: float, length: float, number: int) -> dict[str, Any]:
        return event("kernel", name, start, length, 7, correlation=number)

    # Autograd's thread of the GPU has its own operators, and the numbers of the main thread's.
    nodes = [{**one, "tid": 2} for one in BACKWARD if one["cat"] == "cpu_op"]
    events = [
        *FORWARD, BACKWARD[0], *nodes,
        launch(5, 1), launch(13, 2), launch(18.5, 3), launch(62, 4, tid=2), launch(72, 5, tid=2), launch(73, 6, tid=2),
        note("optimizer", 85, 10), launch(86, 7), launch(30.9, 8),
        kernel("nvjet_hsh_128", 20, 10, 1),
        kernel("pytorch_flash_fwd", 30, 4, 2),
        # Launched by no operator of torch.
        kernel("triton_layer_norm", 34, 2, 3),
        kernel("cutlass_80_gemm", 70, 10, 4),
        kernel("copy_kernel", 80, 2, 5),
        # Half beside a product, half alone.
        kernel("ncclDevKernel_AllReduce", 75, 12, 6),
        kernel("multi_tensor_adam", 90, 6, 7),
        # A second stream beside the first.
        kernel("vectorized_gelu", 28, 3, 8),
    ]  # fmt: skip
    assert milliseconds(events, elapsed=110) == {
        ("encoder", "forward", "products"): 10,
        ("encoder", "forward", "attention"): 4 - 1,
        ("encoder", "forward", "memory"): 2,
        ("decoder", "forward", "memory"): 1,
        ("encoder", "backward", "products"): 10,
        ("gradients", "", "memory"): 2,
        ("communication", "", "rest"): 5,
        ("optimizer", "", "memory"): 6,
        ("GPU idle", "", "rest"): 110 - 39,
    }
    assert {COMMUNICATION.part, IDLE.part} == {"communication", "GPU idle"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "products"),
        ("aten::addmm", "products"),
        ("aten::addmm_", "memory"),
        ("aten::mul", "memory"),
        ("onednn::qlinear_pointwise", "products"),
        ("mvd_attention_backward", "attention"),
        ("flash_attn::_flash_attn_forward", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::native_layer_norm", "memory"),
        ("AddmmBackward0", "rest"),
    ],
)
def test_operators_have_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_trace_of_torch_is_divided(tmp_path: Any) -> None:
    """The names and numbers are those of the installed torch."""
    encoder, decoder = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(STEP):
        with record_function("encoder"):
            encoded = torch.nn.functional.gelu(encoder(torch.ones(4, 8)))
        with record_function("decoder"):
            heads = decoder(encoded).view(1, 1, 4, 8)
            attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        loss = attended.square().mean()
        with record_function("backward"):
            loss.backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json.gz"))
    seconds = attribute(read_events(tmp_path / "trace.json.gz"), PARTS, 1.0)
    assert sum(seconds.values()) == pytest.approx(1)
    for part in ("encoder", "decoder"):
        for passes in ("forward", "backward"):
            assert seconds[Place(part, passes, "products")] > 0
    assert seconds[Place("encoder", "backward", "memory")] > 0
    assert seconds[Place("decoder", "backward", "attention")] > 0
    assert Place("encoder", "backward", "attention") not in seconds
    assert seconds[Place(OUTSIDE.part, "backward", "memory")] > 0
    assert seconds[GRADIENTS] > 0
