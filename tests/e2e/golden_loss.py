"""The golden loss: 20 steps of a tiny distillation whose losses and gradient norms are kept, to the last bit.

    python -m tests.e2e.golden_loss            # write the curve of this kind of machine into tests/e2e/golden/

Write it anew only after a change that is meant to change the arithmetic, and say in the commit how far it moved: the
command prints that. Weights and clips come from seeds. One thread, plain attention and the most portable kernels of
torch, oneDNN and MKL: what is left to differ between machines is part of a curve's kind.

Instruction sets do not belong to it: an EPYC and a Xeon with AVX-512 give the stored curves to the last bit also when
the C library, MKL and numpy are told to do without it (GLIBC_TUNABLES, MKL_ENABLE_INSTRUCTIONS,
NPY_DISABLE_CPU_FEATURES). The vendor does, as MKL chooses code by it: an emulated Intel CPU without AVX-512 (qemu's
Haswell) differs by 1.2e-7, although the real Xeon's curve equals the EPYC's. A machine without a curve is compared with
the nearest one within a tolerance, and the test warns of it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

STEPS = 20
FOLDER = Path(__file__).with_name("golden")
ROOT = Path(__file__).parents[2]

PINNED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "DS_ACCELERATOR": "cpu",
}
"""Read by the libraries when they are loaded, so the steps run in a process of their own."""

VIDEO = {"width": 64, "depth": 2, "heads": 2, "frames": 4, "input_size": 32, "patch_size": 8, "positions": "sinusoid"}
IMAGE = {**VIDEO, "frames": 1, "tubelet": 1, "positions": "sincos2d", "class_token": True}
DECODER = {"width": 32, "depth": 2, "heads": 2}
RECIPE: dict[str, Any] = {
    "run": {"folder": "unused"},
    "device": "cpu",
    "model": {**VIDEO, "drop_path": 0.1},
    "data": {"mask": {"ratio": 0.5}},
    "targets": {
        "image": {"kind": "image_teacher", "model": IMAGE, "norm": True, "decoder": DECODER},
        "video": {"kind": "video_teacher", "model": VIDEO, "decoder": DECODER},
    },
    "training": {
        "epochs": STEPS,
        "global_batch": 8,
        "micro_batch": 4,
        "base_lr": 0.1,
        "warmup_epochs": 4,
        "clip_grad": 1.0,
        "deepspeed": "zero2",
    },
}

Curve = dict[str, list[float]]


def kind() -> dict[str, str]:
    """Properties that two machines must have in common to give the same bits."""
    return {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "vendor": _vendor(),
        "deepspeed": metadata.version("deepspeed"),
        "libc": " ".join(platform.libc_ver()),
    }


def stored_curves() -> list[tuple[dict[str, str], Curve]]:
    """Kinds and curves that are kept."""
    files = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    return [(file["kind"], file["curve"]) for file in files]


def nearest(here: dict[str, str], stored: list[tuple[dict[str, str], Curve]]) -> tuple[dict[str, str], Curve]:
    """The curve whose kind shares most with this one; among equals the one that shares what stands first."""
    return max(stored, key=lambda pair: _shared(here, pair[0]))


def run() -> Curve:
    """The curve of this program on this machine."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.e2e.golden_loss", "--steps"],
        cwd=ROOT, env={**os.environ, **PINNED}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(result.stdout.splitlines()[-1])


def largest_change(old: Curve, new: Curve) -> tuple[float, str]:
    """The largest relative difference of two curves, and where it first comes up."""
    changes = [
        (abs(after - before) / abs(before), f"{name} at step {step}: {before!r} was stored, {after!r} came")
        for name in old
        for step, (before, after) in enumerate(zip(old[name], new[name], strict=True), start=1)
    ]
    return max(changes, key=lambda change: change[0])


def _shared(here: dict[str, str], there: dict[str, str]) -> tuple[int, list[bool]]:
    same = [there[key] == value for key, value in here.items()]
    return sum(same), same


def _vendor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^vendor_id\s*:\s*(\S+)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return found[1] if found else "unknown"


def _steps() -> Curve:
    from mvd_scale.config import Recipe
    from mvd_scale.data.batch import ClipBatch
    from mvd_scale.distributed.process_group import destroy_distributed, init_distributed
    from mvd_scale.models import Student
    from mvd_scale.performance.batches import BatchLoader
    from mvd_scale.targets import build_targets
    from mvd_scale.targets.build import init_teacher
    from mvd_scale.training.capabilities import make_placement
    from mvd_scale.training.distillation import StudentParts, distillation_models
    from mvd_scale.training.teachers.prefetch import TeacherPrefetcher
    from mvd_scale.training.trainer import Trainer

    def micro_batch(number: int) -> ClipBatch:
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (micro, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
        cells = torch.stack([torch.randperm(16, generator=generator) for _ in range(micro)])
        visible, masked = (torch.cat([half, half + 16], 1).sort(1).values for half in (cells[:, :8], cells[:, 8:]))
        return ClipBatch(pixels, visible, masked, torch.zeros(micro), torch.zeros(micro))

    recipe = Recipe.model_validate(RECIPE)
    ranks = init_distributed("cpu", timeout_minutes=1)
    torch.set_num_threads(1)
    micro, accumulation = recipe.micro_batch_and_accumulation(ranks.world_size)
    torch.manual_seed(recipe.seed)
    targets = build_targets(recipe, lambda name: init_teacher(recipe, name))
    student = Student.from_recipe(recipe, targets)
    parts = StudentParts(student, targets, recipe, make_placement(recipe, targets, ranks))
    models = distillation_models([parts], ranks, steps_per_epoch=1)
    # The same two micro batches again and again, so that the loss falls.
    clips = (micro_batch(turn) for _ in range(STEPS) for turn in range(accumulation))
    trainer = Trainer(models, TeacherPrefetcher(BatchLoader(clips)), recipe, ranks)
    curve: Curve = {name: [] for name in ("loss", *targets, "gradient norm")}
    for _ in range(STEPS):
        last = trainer.train_step()[-1]
        norm = models[0].engine.get_global_grad_norm()
        for name, value in {**last.losses, "gradient norm": norm}.items():
            curve[name.removeprefix("loss/")].append(float(value))
    destroy_distributed()
    return curve


def _write() -> None:
    here, curve = kind(), run()
    name = re.sub(r"[^\w.+-]", "_", "-".join(here.values()))
    path = FOLDER / f"{name}.json"
    if path.is_file():
        change, where = largest_change(json.loads(path.read_text())["curve"], curve)
        print(f"largest relative change {change:.1e}" + (f", {where}" if change else ""))
    FOLDER.mkdir(exist_ok=True)
    path.write_text(json.dumps({"kind": here, "curve": curve}, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--steps"]:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            print(json.dumps(_steps()))
    else:
        _write()
