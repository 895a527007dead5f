"""Stage (c): compiled blocks, stochastic depth, CUDA graphs, prefetch stream and precisions. Needs torch and Triton.

Legend: B clips, N tokens, K output tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mvd_kernels import tube_rows
from mvd_kernels.bench.limits import product_flops
from mvd_kernels.bench.timing import milliseconds
from mvd_kernels.tubes import IMAGENET_MEAN, IMAGENET_STD
from mvd_scale.errors import UserError
from mvd_scale.models.blocks import Blocks, set_gradient_checkpointing
from mvd_scale.models.layers.drop_path import DropPath
from mvd_scale.models.quantization import quantize_linear_layers
from mvd_scale.performance.bringup.checks import streams
from mvd_scale.performance.bringup.checks.comparisons import Call, gradient_errors, graph_errors, relative
from mvd_scale.performance.bringup.session import Check, LeftOut, Session
from mvd_scale.training.compile import compile_blocks
from mvd_scale.training.teachers.cuda_graph import CudaGraphTeacher

if TYPE_CHECKING:
    from mvd_scale.config.training import Checkpointing

SIDE, FRAMES, PATCH, TUBELET = 64, 4, 16, 2
CLIPS, TOKENS = 4, 32
SMALL = {"width": 128, "depth": 3, "heads": 2}
BASE = {"width": 768, "depth": 12, "heads": 12}

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative error of outputs and gradients of compiled blocks, by dtype."""

_COMPILED = 15.0
"""Expected seconds of a check that compiles."""

_LIMIT = 90.0
"""Seconds after which it counts as hung; the first compilation on a machine loads much from its disk."""


class Transformer(nn.Module):
    """Patch embedding and blocks: an encoder without positions, which needs no recipe."""

    def __init__(self, width: int, depth: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * TUBELET * PATCH**2, width)
        self.blocks = Blocks(width, depth, heads, drop_path=drop_path)

    def forward(self, pixels: Tensor, output_tokens: Tensor | None = None) -> Tensor:
        """Encode clips uint8 (B, T, H, W, 3): (B, N, D), or (B, K, D) with `output_tokens` int64 (B, K)."""
        rows = tube_rows(
            pixels, None, tubelet=TUBELET, patch=PATCH, mean=IMAGENET_MEAN, std=IMAGENET_STD,
            dtype=self.embed.weight.dtype,
        )  # fmt: skip
        encoded: Tensor = self.blocks(self.embed(rows), output_tokens)
        return encoded


def run(session: Session) -> None:
    """Make the checks of the stage."""
    device = torch.device(session.device)

    def compiles(name: str, work: Callable[[Check], None]) -> None:
        session.check(name, work, _COMPILED, _LIMIT)

    for dtype in (torch.float32,) if session.small else (torch.bfloat16, torch.float16, torch.float32):
        compiles(f"compiled blocks, {_name(dtype)}", partial(compiled, device=device, dtype=dtype))
    session.check("CUDA graph, float16", partial(graph, device=device, compiles=False), 5)
    compiles("CUDA graph of compiled blocks, float16", partial(graph, device=device, compiles=True))
    late = partial(stream, device=device, teach=streams.late, sleep=0)
    session.check("prefetch stream, late teacher", late, 3)
    busy = partial(stream, device=device, teach=streams.early, sleep=streams.LONG)
    session.check("prefetch stream, busy student", busy, 3)
    session.check("prefetch stream beside the student", partial(beside, device=device), 5)
    session.check("stochastic depth", partial(drops, device=device, compiles=False), 3)
    compiles("stochastic depth, compiled", partial(drops, device=device, compiles=True))
    compiles("fp8 linear layers", partial(eight_bit, device=device))
    recomputed: tuple[Checkpointing, ...] = ("block", "attention")
    for checkpointing in recomputed:
        work = partial(compiled, device=device, dtype=torch.float32, checkpointing=checkpointing)
        compiles(f"compiled blocks, float32, {checkpointing} recomputed", work)
    for precision in ("fp16", "bf16", "fp8"):
        compiles(f"ViT-B teacher, {precision}", partial(base_speed, device=device, precision=precision))


def compiled(check: Check, device: torch.device, dtype: torch.dtype, checkpointing: Checkpointing = "none") -> None:
    """Compare outputs and gradients of compiled blocks with those of the same blocks uncompiled."""
    torch.manual_seed(0)
    plain = Transformer(**SMALL).to(device, dtype)
    fast = copy.deepcopy(plain)
    set_gradient_checkpointing(fast, checkpointing)
    compile_blocks(fast)
    pixels = _clips(0, device).pixels
    errors = gradient_errors(fast, plain, lambda model: {"features": model(pixels)})
    for name, error in errors.items():
        check.figure(f"error of {name}", error)
    check.expect(max(errors.values()) < TOLERANCE[dtype], f"errors stay below {TOLERANCE[dtype]:g}")


def graph(check: Check, device: torch.device, compiles: bool) -> None:
    """Compare a CUDA graph of a frozen transformer in fp16 with the transformer."""
    _needs_gpu(device)
    torch.manual_seed(0)
    teacher = Transformer(**SMALL).to(device, torch.float16).eval().requires_grad_(False)
    ours = copy.deepcopy(teacher)
    if compiles:
        compile_blocks(ours)
    errors = graph_errors(teacher, ours, [_clips(seed, device) for seed in range(4)])
    for name, error in errors.items():
        check.figure(name, error)
    changed = errors.pop("change by the move")
    check.expect(max(errors.values()) < TOLERANCE[torch.float16], "the graph gives the features of the transformer")
    check.expect(changed > TOLERANCE[torch.float16], "the graph reads the weights as they are")


def stream(check: Check, device: torch.device, teach: Callable[..., object], sleep: int) -> None:
    """Check that the student reads what the prefetch stream wrote for it."""
    _needs_gpu(device)
    read = streams.read_by_student(device, teach, sleep)  # type: ignore[arg-type]
    check.expect(read == streams.EXPECTED, f"batch k is full of k: {read}")


def beside(check: Check, device: torch.device) -> None:
    """Check that both streams work at the same time, and that the host waits for neither."""
    _needs_gpu(device)
    share, ahead = streams.overlap(device)
    check.figure("share of the time of one after the other", share)
    check.expect(ahead, "the host runs ahead of the GPU")
    check.expect(share < 0.7, "teachers work beside the student")


def drops(check: Check, device: torch.device, compiles: bool) -> None:
    """Check that stochastic depth drops whole clips at its rate, scales the others, and treats gradients alike."""
    rate, clips = 0.25, 4096
    layer = DropPath(rate).train()
    call = torch.compile(layer, dynamic=False) if compiles else layer
    torch.manual_seed(0)
    updates = torch.ones(clips, 2, 8, device=device, requires_grad=True)
    results = call(updates)
    results.sum().backward()
    assert updates.grad is not None
    factors = results.detach()[:, 0, 0]
    kept = float((factors > 0).float().mean())
    check.figure("share of clips kept", kept)
    allowed = (factors == 0) | ((factors - 1 / (1 - rate)).abs() < 1e-5)
    check.expect(bool(allowed.all()), "an update is dropped, or divided by the share that is kept")
    check.expect(bool((results == factors[:, None, None]).all()), "a clip is dropped as a whole")
    check.expect(bool(torch.equal(updates.grad, results)), "gradients are scaled like the updates")
    # Five standard deviations.
    check.expect(abs(kept - 1 + rate) < 5 * (rate * (1 - rate) / clips) ** 0.5, f"{1 - rate:.0%} of the clips are kept")


def eight_bit(check: Check, device: torch.device) -> None:
    """Compare features of a transformer with fp8 linear layers with those in float32."""
    torch.manual_seed(0)
    whole = Transformer(**SMALL).eval().requires_grad_(False)
    quantized = _quantized(copy.deepcopy(whole), device)
    call, reference = _clips(0, device), whole.to(device)
    with torch.no_grad():
        features = quantized(call.pixels, output_tokens=call.output_tokens).float()
        expected = reference(call.pixels, output_tokens=call.output_tokens)
    cosine = float(torch.nn.functional.cosine_similarity(features, expected, dim=-1).mean())
    check.figure("mean cosine", cosine)
    check.figure("relative error", relative(features, expected))
    check.expect(cosine > 0.999, "features keep their direction")


def base_speed(check: Check, device: torch.device, precision: str) -> None:
    """Time a frozen ViT-B in one precision on clips of 16 x 224 x 224, compiled and as a CUDA graph."""
    _needs_gpu(device)
    clips, dtype = 16, torch.float16 if precision == "fp16" else torch.bfloat16
    with device:
        teacher: nn.Module = Transformer(**BASE).eval().requires_grad_(False)
    teacher = _quantized(teacher.cpu(), device) if precision == "fp8" else teacher.to(dtype)
    compile_blocks(teacher)
    graphed = CudaGraphTeacher(teacher)
    pixels = torch.randint(0, 256, (clips, 16, 224, 224, 3), dtype=torch.uint8, device=device)
    features = graphed(pixels)
    check.expect(bool(torch.isfinite(features).all()), "features are finite")
    _, median, _ = milliseconds(lambda: graphed(pixels), device)
    tokens, width, depth = features.shape[1], BASE["width"], BASE["depth"]
    flops = clips * depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
    check.figure("ms/clip", median / clips)
    check.figure("TFLOP/s", flops / median / 1e9)
    check.figure("share of 16-bit products", flops / median * 1000 / product_flops(device, dtype))


def _quantized(model: nn.Module, device: torch.device) -> nn.Module:
    try:
        return quantize_linear_layers(model, "fp8", device).requires_grad_(False)
    except UserError as error:
        raise LeftOut(str(error)) from error


def _clips(seed: int, device: torch.device) -> Call:
    """Make pixels, and draw half of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (CLIPS, FRAMES, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.stack([torch.randperm(TOKENS, generator=generator)[: TOKENS // 2] for _ in range(CLIPS)])
    return Call(pixels.to(device), tokens.sort(1).values.to(device))


def _needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise LeftOut("needs a GPU")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
