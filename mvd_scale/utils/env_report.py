"""Capabilities of this machine, each with the reason if it is off.

Nothing in this module raises an exception because a package or a device is missing or broken.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import logging
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from mvd_scale.utils import nvdec
from mvd_scale.utils.cpu_quota import cpu_quota

_GUIDE = "docs/guides/installation.md"


@dataclass(frozen=True)
class Capability:
    """Capability: a device, a package or a feature that is on or off."""

    name: str
    on: bool
    detail: str = ""
    """Version, size or kind of the device or package, if it exists."""
    reason: str = ""
    """Reason why the capability is off or limited, and how to get it."""


def collect_capabilities() -> list[Capability]:
    """Check all capabilities once. This takes a few seconds, mainly to import torch, DALI and DeepSpeed."""
    return [
        Capability("Python", True, platform.python_version()),
        _processor(),
        _shared_memory(),
        *_torch(),
        *_deepspeed(),
        _flash_attention(),
        _apex(),
        *_dali(),
        *_pyav(),
        _triton(),
        torch_compile("cuda"),
        torch_compile("cpu"),
        _torchvision(),
        _compiler(),
        _native(),
    ]


def format_capabilities(capabilities: list[Capability]) -> str:
    """Format capabilities as plain text, one per line: name, on or off, detail, reason."""
    width = max(len(capability.name) for capability in capabilities)
    lines = []
    for capability in capabilities:
        text = "; ".join(part for part in (capability.detail, capability.reason) if part)
        lines.append(f"{capability.name:{width}}  {'on ' if capability.on else 'off'}  {text}".rstrip())
    return "\n".join(lines)


def _load(module: str, install: str) -> tuple[Any, str]:
    """Import a module: returns the module and an empty reason, or None and the reason why it cannot be imported."""
    try:
        with _silence():
            return importlib.import_module(module), ""
    except ModuleNotFoundError as error:
        # `error.name` is the module or a parent of it; otherwise the module exists, and a dependency of it is missing.
        if f"{module}.".startswith(f"{error.name}."):
            return None, f"not installed: {install}"
        return None, f"broken: {_first_line(error)}"
    # A damaged package may raise any exception while it loads: ImportError, OSError of a shared library, RuntimeError
    except Exception as error:
        return None, f"broken: {_first_line(error)}"


def _first_line(said: BaseException | str) -> str:
    return next(iter(str(said).splitlines()), "" if isinstance(said, str) else type(said).__name__)


@contextlib.contextmanager
def _silence() -> Iterator[io.StringIO]:
    """Suppress logs, warnings and output of imported packages; yields a buffer with their output."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield said
    finally:
        logging.disable(before)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> Capability:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    psutil, reason = _load("psutil", "pip install psutil")
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB memory" if psutil else f"memory unknown ({reason})"
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1
    quota = cpu_quota()
    limit = f" (the container may use the time of {quota:g})" if quota else ""
    return Capability("CPU", True, f"{cores} cores{limit}, {memory}, {nodes} NUMA node{'s' if nodes > 1 else ''}")


def _shared_memory() -> Capability:
    name, folder = "/dev/shm", Path("/dev/shm")
    if not folder.is_dir():
        return Capability(name, False, reason="data workers need it: set data.workers to 0")
    status = os.statvfs(folder)
    size, free = (blocks * status.f_frsize / 2**30 for blocks in (status.f_blocks, status.f_bavail))
    small = "little for data workers: start the container with --shm-size=16g or --ipc=host" if size < 1 else ""
    return Capability(name, True, f"{size:.2f} GiB, {free:.2f} GiB free", small)


def _torch() -> list[Capability]:
    torch, reason = _load("torch", "pip install torch")
    if not torch:
        return [Capability("torch", False, reason=reason)]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    rows = [Capability("torch", True, f"{torch.__version__} ({build} build)")]

    if not torch.cuda.is_available():
        why = "torch finds no NVIDIA GPU or driver" if torch.version.cuda else "this torch is built for the CPU only"
        rows.append(Capability("GPU", False, reason=why))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        detail = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        rows.append(Capability(f"GPU {index}", True, detail))

    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_nccl_available():
        rows.append(Capability("NCCL", False, reason="this torch is built without it"))
    elif not torch.cuda.is_available():
        rows.append(Capability("NCCL", False, _nccl_version(torch), "needs a GPU"))
    else:
        rows.append(Capability("NCCL", True, _nccl_version(torch)))
    gloo = distributed.is_available() and distributed.is_gloo_available()
    rows.append(Capability("gloo", gloo, reason="" if gloo else "this torch is built without it"))

    rows.extend(_precisions(torch))
    return rows


def _nccl_version(torch: Any) -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))


def _precisions(torch: Any) -> list[Capability]:
    if not torch.cuda.is_available():
        return [
            Capability("bf16", True, "CPU"),
            Capability("fp16", False, reason="needs a GPU: CPUs compute it slowly or not at all; use bf16 or fp32"),
        ]
    name = torch.cuda.get_device_name()
    # Emulated bf16 does not count: only that of the device's tensor cores.
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return [
        Capability("bf16", bf16, name if bf16 else "", "" if bf16 else f"{name} lacks it (compute capability 8.0)"),
        Capability("fp16", True, name),
    ]


def _deepspeed() -> list[Capability]:
    deepspeed, reason = _load("deepspeed", "pip install deepspeed")
    if not deepspeed:
        return [Capability("DeepSpeed", False, reason=reason)]
    accelerator = deepspeed.accelerator.get_accelerator().device_name()
    rows = [Capability("DeepSpeed", True, f"{deepspeed.__version__}, accelerator {accelerator}")]
    ops, reason = _load("deepspeed.ops.op_builder.all_ops", "pip install deepspeed")
    if not ops:
        return [*rows, Capability("DeepSpeed ops", False, reason=reason)]
    compiler = _compiler()
    for name, builder in sorted(ops.ALL_OPS.items()):
        # DeepSpeed registers this builder for every op that the accelerator does not support.
        if type(builder).__name__ != "NotImplementedBuilder":
            rows.append(_deepspeed_op(name, builder, compiler))
    return rows


def _deepspeed_op(name: str, builder: Any, compiler: Capability) -> Capability:
    row = f"DeepSpeed {name.removeprefix('deepspeed_')}"
    try:
        with _silence() as spoken:
            compatible = builder.is_compatible(verbose=True)
    # Some builders run compilers and parse their output: they may raise any exception.
    except Exception as error:
        return Capability(row, False, reason=f"cannot be checked: {_first_line(error)}")
    if not compatible:
        # The first warning names what is missing; later ones only suggest remedies.
        warning = re.sub(r"\x1b\[\d+m|\[WARNING\]", "", _first_line(spoken.getvalue())).strip()
        return Capability(row, False, reason=warning or "not compatible with this machine")
    if not compiler.on:
        return Capability(row, False, reason=compiler.reason)
    return Capability(row, True, "compiled at its first use")


_FLASH_ATTENTION = {
    "flash-attn-4": ("flash_attn.cute.interface", "flash-attn-4"),
    "flash-attn-3": ("flash_attn_interface", "flash-attn-3"),
    "flash-attn-2": ("flash_attn.flash_attn_interface", "flash-attn"),
}
"""Module and package of the releases of flash-attn: newest first, the order of preference of `mvd_kernels`."""


def _flash_attention() -> Capability:
    install = "pip install 'mvd-scale[flash]' --no-build-isolation (needs a GPU and nvcc)"
    broken: list[str] = []
    for release, (module, package) in _FLASH_ATTENTION.items():
        found, reason = _load(module, install)
        if found:
            on_gpu = _on_gpu("flash-attn", f"{release}, {_version(package)}")
            return replace(on_gpu, reason="; ".join([*broken, *filter(None, [on_gpu.reason])]))
        if not reason.startswith("not installed"):
            broken.append(f"{release} is {reason}")
    return Capability("flash-attn", False, reason="; ".join(broken) or reason)


def _apex() -> Capability:
    module, reason = _load(
        "apex",
        f"build it from its source, see {_GUIDE}; the package `apex` of pip is another project",
    )
    if not module:
        return Capability("apex", False, reason=reason)
    layer_norm, reason = _load("apex.normalization", f"build apex from its source, see {_GUIDE}")
    if not layer_norm:
        return Capability("apex", False, reason=reason)
    kernels, reason = _load("fused_layer_norm_cuda", f"build apex with its CUDA extensions, see {_GUIDE}")
    return _on_gpu("apex", _version("apex")) if kernels else Capability("apex", False, reason=reason)


def _on_gpu(name: str, detail: str) -> Capability:
    torch, reason = _load("torch", "pip install torch")
    if torch and torch.cuda.is_available():
        return Capability(name, True, detail)
    return Capability(name, False, detail, reason or "needs a GPU")


def _dali() -> list[Capability]:
    builds = [name for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120") if _version(name)]
    if len(builds) > 1:
        reason = f"{' and '.join(builds)} overwrite each other's files: uninstall one of them, see {_GUIDE}"
        return [Capability("DALI", False, reason=reason)]
    dali, reason = _load("nvidia.dali", "pip install nvidia-dali-cuda130 (Linux only)")
    if not dali:
        return [Capability("DALI", False, reason=reason)]
    return [
        Capability("DALI", True, f"{dali.__version__} ({', '.join(builds)})"),
        Capability("DALI decode, CPU", True, "VP8, MJPEG"),
        _nvdec(),
    ]


def _nvdec() -> Capability:
    name = "DALI decode, NVDEC"
    try:
        ctypes.CDLL(nvdec.LIBRARY)
    except OSError as error:
        return Capability(name, False, reason=f"needs a GPU and its driver's video library ({_first_line(error)})")
    torch, reason = _load("torch", "pip install torch")
    if not torch or not torch.cuda.is_available():
        return Capability(name, False, reason=reason or "needs a GPU")
    found = nvdec.query_nvdec(torch.device("cuda", torch.cuda.current_device()))
    kinds = [kind for kind in found.formats if (kind.chroma, kind.depth) == ("4:2:0", 8)]
    sizes = ", ".join(f"{kind.codec} up to {kind.max_width}x{kind.max_height}" for kind in kinds)
    return Capability(name, not found.missing, f"8-bit 4:2:0: {sizes}" if sizes else "", found.missing)


def _pyav() -> list[Capability]:
    av, reason = _load("av", "pip install av")
    if not av:
        return [Capability("PyAV", False, reason=reason)]
    codecs = {"h264": "H.264", "hevc": "HEVC", "vp9": "VP9", "av1": "AV1"}
    there = [name for codec, name in codecs.items() if codec in av.codecs_available]
    missing = [name for codec, name in codecs.items() if codec not in av.codecs_available]
    reason = f"this build lacks {', '.join(missing)}" if missing else ""
    return [Capability("PyAV", True, f"{av.__version__}, decodes {', '.join(there)}", reason)]


def _triton() -> Capability:
    triton, reason = _load("triton", "pip install triton (comes with torch on Linux)")
    if not triton:
        return Capability("Triton", False, reason=reason)
    on_gpu = _on_gpu("Triton", triton.__version__)
    if not on_gpu.on:
        return replace(on_gpu, reason="needs a GPU; interpreter only")
    compiler, reason = _load("mvd_kernels.triton_compiler", "pip install mvd-scale")
    with _silence():
        reason = compiler.triton_refusal() if compiler else reason
    return Capability("Triton", not reason, triton.__version__, reason)


def torch_compile(kind: str) -> Capability:
    """Whether torch.compile can compile for a kind of device, `cuda` or `cpu`."""
    if kind == "cpu":
        return _torch_compile_cpu()
    triton, name = _triton(), "torch.compile, GPU"
    if not triton.on:
        return Capability(name, False, reason=f"Triton is off: {triton.reason}")
    return Capability(name, True, "Triton")


def _torch_compile_cpu() -> Capability:
    name = "torch.compile, CPU"
    builder, reason = _load("torch._inductor.cpp_builder", "pip install torch")
    if not builder:
        return Capability(name, False, reason=reason)
    try:
        return Capability(name, True, builder.get_cpp_compiler())
    # It raises an exception type of its own, and runs the compiler that it finds, which may fail in any way.
    except Exception:
        return Capability(name, False, reason="torch finds no C++ compiler: install g++, or set CXX to its path")


def _torchvision() -> Capability:
    torchvision, reason = _load("torchvision", "pip install 'mvd-scale[detection]'")
    if not torchvision:
        return Capability("torchvision", False, reason=reason)
    return Capability("torchvision", True, f"{torchvision.__version__}, for action detection")


def _compiler() -> Capability:
    compiler, ninja = shutil.which("c++"), shutil.which("ninja")
    if not compiler:
        reason = "no C++ compiler (c++) on PATH: install g++, which compiles DeepSpeed's ops"
        return Capability("C++ and ninja", False, reason=reason)
    if not ninja:
        reason = "no ninja on PATH: pip install ninja, and activate the environment of the package"
        return Capability("C++ and ninja", False, reason=reason)
    return Capability("C++ and ninja", True, f"{compiler}, {ninja}")


def _native() -> Capability:
    name = "operators in C++"
    attention, reason = _load("mvd_kernels.native.attention", "pip install mvd-scale")
    if not attention:
        return Capability(name, False, reason=reason)
    compiler = shutil.which("c++")
    if not compiler:
        return Capability(name, False, reason="no C++ compiler (c++) on PATH: install g++")
    refused = attention.refusal_of_instructions()
    there = "8-bit activations" if refused else "8-bit activations, attention in bf16"
    reason = f"attention {refused}" if refused else ""
    return Capability(name, True, f"{there}; compiled by {compiler} at their first use", reason)
