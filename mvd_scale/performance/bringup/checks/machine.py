"""Stage (a): what is there. Needs torch and numpy."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from datetime import timedelta
from functools import partial
from importlib.util import find_spec

import torch

from mvd_scale.performance.bringup.session import Check, LeftOut, Session
from mvd_scale.utils.env_report import Capability, collect_capabilities, torch_compile
from mvd_scale.utils.nvdec import query_nvdec

LEAST_SHARED = 2**28
"""Least bytes of /dev/shm: DALI's workers hand their samples over in it, and a container has 64 MB if not told."""

_HOST_COPY = 2**28
"""Bytes of a timed copy from the host to the GPU."""


def run(session: Session) -> None:
    """Make the checks of the stage; without a GPU, those that need none."""
    device = session.device
    if device == "cuda" and not torch.cuda.is_available():
        session.check("GPU", no_gpu, seconds=1)
        device = "cpu"
    session.check("machine", lambda check: describe(check, device), seconds=5)
    session.check("shared memory", shared_memory, seconds=1)
    session.check("Triton compiles", lambda check: triton_compiles(check, device), seconds=10)
    session.check("torch.compile", lambda check: torch_compiles(check, device), seconds=20)
    session.check("collectives of one rank", lambda check: one_rank(check, device), seconds=10)
    session.check("copy from the host", lambda check: host_copy(check, device), seconds=3)
    session.check("NVDEC", lambda check: decoders(check, device), seconds=3)
    found: list[Capability] = []
    session.check("packages", lambda check: found.extend(collect_capabilities()), seconds=10, limit=60)
    for capability in found:
        session.check(f"{capability.name} of `mvd-scale env`", partial(show, capability=capability), seconds=0)


def no_gpu(check: Check) -> None:
    """Fail with the reason, as far as it can be told, why torch finds no GPU."""
    check.figure("torch", str(torch.__version__))
    check.figure("CUDA of torch", str(torch.version.cuda))
    check.figure("driver", driver_version())
    check.expect(torch.version.cuda is not None, "this torch is built for GPUs")
    check.expect(False, "torch finds a GPU")


def describe(check: Check, device: str) -> None:
    """Record GPU, driver, versions, CPUs."""
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        check.figure("GPUs", f"{torch.cuda.device_count()} x {gpu.name}")
        check.figure("memory, GiB", gpu.total_memory / 2**30)
        check.figure("capability", f"{gpu.major}.{gpu.minor}")
        check.figure("driver", driver_version())
    check.figure("Python", platform.python_version())
    check.figure("torch", str(torch.__version__))
    check.figure("CUDA", str(torch.version.cuda))
    check.figure("CPUs", len(os.sched_getaffinity(0)))


def driver_version() -> str:
    """Version of the NVIDIA driver, or the reason why it is not known."""
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return asked.stdout.strip() if asked.returncode == 0 else f"unknown (nvidia-smi: {asked.stderr.strip()})"


def shared_memory(check: Check) -> None:
    """Check the size of /dev/shm."""
    used = shutil.disk_usage("/dev/shm")
    check.figure("total, GiB", used.total / 2**30)
    check.figure("free, GiB", used.free / 2**30)
    check.expect(
        used.free >= LEAST_SHARED,
        f"/dev/shm has {used.free / 2**20:.0f} MiB free, and DALI's workers need {LEAST_SHARED / 2**20:.0f} or more: "
        "start the container with --shm-size 8g, or set data.workers to 0",
    )


def triton_compiles(check: Check, device: str) -> None:
    """Compile and run a kernel, which needs a C compiler and Python's headers besides Triton."""
    if device != "cuda":
        raise LeftOut("Triton's kernels need a GPU")
    if find_spec("triton") is None:
        raise LeftOut("triton is not installed")
    from mvd_kernels.reference.tube_targets import tube_targets as reference
    from mvd_kernels.triton_ops.tube_targets import tube_targets as kernel

    pixels = torch.randint(0, 256, (1, 2, 32, 32, 3), dtype=torch.uint8, device=device)
    tokens = torch.arange(4, device=device).unsqueeze(0)
    started = time.monotonic()
    targets = kernel(pixels, tokens, tubelet=2, patch=16, normalize="none")
    torch.cuda.synchronize()
    check.figure("first launch, s", time.monotonic() - started)
    torch.testing.assert_close(targets, reference(pixels, tokens, tubelet=2, patch=16, normalize="none"))


def torch_compiles(check: Check, device: str) -> None:
    """Compile a function with torch.compile."""
    if device != "cuda":
        raise LeftOut("the compiler for CPUs, which takes minutes, is not what is asked")
    if reason := torch_compile(device).reason:
        raise LeftOut(reason)
    values = torch.randn(64, 64, device=device)

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x @ x).sin() + 1

    started = time.monotonic()
    compiled = torch.compile(function)(values)
    check.figure("first call, s", time.monotonic() - started)
    torch.testing.assert_close(compiled, function(values), rtol=1e-2, atol=1e-2)


def one_rank(check: Check, device: str) -> None:
    """Reduce a tensor in a process group of this process alone, by NCCL on a GPU and gloo on a CPU."""
    backend = "nccl" if device == "cuda" else "gloo"
    check.figure("backend", backend)
    if device == "cuda":
        check.figure("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
        torch.cuda.set_device(0)
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=30))
    try:
        ones = torch.ones(1000, device=device)
        torch.distributed.all_reduce(ones)
        check.expect(float(ones.sum()) == 1000, "the sum over one rank is the rank's own value")
    finally:
        torch.distributed.destroy_process_group()


def host_copy(check: Check, device: str) -> None:
    """Time a copy of pinned memory to the GPU."""
    if device != "cuda":
        raise LeftOut("there is no GPU to copy to")
    host = torch.ones(_HOST_COPY, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(host, device=device)
    target.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    started = time.perf_counter()
    target.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    check.figure("GB/s", _HOST_COPY / (time.perf_counter() - started) / 1e9)


def decoders(check: Check, device: str) -> None:
    """Record what the GPU's video decoders take, as the driver says."""
    if device != "cuda":
        raise LeftOut("there is no GPU to decode")
    nvdec = query_nvdec(torch.device(device, 0))
    check.expect(not nvdec.missing, nvdec.missing)
    for kind in nvdec.formats:
        check.figure(f"{kind.codec} {kind.chroma}, {kind.depth} bits", f"{kind.max_width}x{kind.max_height}")


def show(check: Check, capability: Capability) -> None:
    """Record one row of `mvd-scale env`."""
    check.figure("detail", capability.detail)
    if not capability.on:
        raise LeftOut(capability.reason)
