"""Stage (b): every kernel against its reference, and its speed against the device's limits. Needs torch and Triton."""

from __future__ import annotations

from functools import cached_property, partial
from importlib import import_module

import torch

from mvd_kernels.bench.case import BenchmarkCase
from mvd_kernels.bench.limits import copy_bandwidth, product_flops
from mvd_kernels.bench.timing import milliseconds
from mvd_kernels.verification.cases import CASES, Case
from mvd_kernels.verification.errors import TOLERANCE, measure_errors
from mvd_scale.performance.bringup.session import Check, LeftOut, Session

TIMED = ("tube_rows", "add_layer_norm", "masked_distance", "decoder_input", "tube_targets", "attention")
"""Operators whose speed is measured, in their order of value."""


def run(session: Session) -> None:
    """Make the checks of the stage: errors in fp16 and bf16, then speeds, then errors in fp32."""
    device = torch.device(session.device)
    limits = Limits(device)
    session.check("limits of the device", limits.record, seconds=5)
    half = [torch.float32] if session.small else [torch.float16, torch.bfloat16]
    _check_errors(session, device, half)
    for operator in TIMED[:1] if session.small else TIMED:
        cases = import_module(f"mvd_kernels.bench.{operator}").cases(device)
        for case in cases:
            for way in case.implementations:
                name = f"{operator}, {case.shape}, {way}"
                session.check(name, partial(speed, case=case, way=way, limits=limits), seconds=2)
    if not session.small:
        _check_errors(session, device, [torch.float32])


def _check_errors(session: Session, device: torch.device, dtypes: list[torch.dtype]) -> None:
    # Cases of the models' sizes take seconds on a CPU.
    cases = [case for case in CASES if case.title == "odd"] if session.small else CASES
    for dtype in dtypes:
        for case in cases:
            name = f"{case}, {str(dtype).removeprefix('torch.')}"
            session.check(name, partial(errors, case=case, dtype=dtype, device=device), seconds=3)


class Limits:
    """Limits of the device, measured when they are first asked for.

    Args:
        device: device to measure.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second that a copy reads and writes."""
        return copy_bandwidth(self.device)

    @cached_property
    def flops(self) -> dict[torch.dtype, float]:
        """FLOP/s of matrix products by dtype, the one of training first."""
        dtypes = (torch.bfloat16, torch.float16) if self.device.type == "cuda" else (torch.float32,)
        return {dtype: product_flops(self.device, dtype) for dtype in dtypes}

    def record(self, check: Check) -> None:
        """Record the limits as figures."""
        check.figure("copy, GB/s", self.bandwidth / 1e9)
        for dtype, flops in self.flops.items():
            check.figure(f"products in {str(dtype).removeprefix('torch.')}, TFLOP/s", flops / 1e12)


def errors(check: Check, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Compare an operator with its reference in float32 on the CPU."""
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise LeftOut(f"{torch.cuda.get_device_name(device)} has no bf16")
    found = measure_errors(case, dtype, device)
    for name, error in found.items():
        check.figure(f"error of {name}", error)
    check.expect(max(found.values()) < TOLERANCE[dtype], f"errors stay below {TOLERANCE[dtype]:g}")


def speed(check: Check, case: BenchmarkCase, way: str, limits: Limits) -> None:
    """Time the forward pass of an operator, and compare it with the limit that bounds it."""
    _, median, _ = milliseconds(case.implementations[way], limits.device)
    check.figure("ms", median)
    if case.flops:
        check.figure("TFLOP/s", case.flops / median / 1e9)
        check.figure("share of matrix products", case.flops / median * 1000 / max(limits.flops.values()))
    else:
        moved = (case.read + case.written) / median * 1000
        check.figure("GB/s", moved / 1e9)
        check.figure("share of copy", moved / limits.bandwidth)
