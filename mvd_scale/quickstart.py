"""The whole method on a laptop: two teachers, then a student distilled from both, on real clips."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mvd_scale.errors import UserError

logger = logging.getLogger("mvd_scale")

STAGES = {
    "image_teacher": "a masked-autoencoder image teacher (MAE)",
    "video_teacher": "a video teacher (VideoMAE)",
    "student": "a student, distilled from both (MVD)",
}


def run(out: Path, ranks: int, steps: int | None) -> None:
    """Train three stages under the `deepspeed` launcher, then draw and sum up; start it again to go on.

    Args:
        out: folder for the clips, the manifest and the three runs.
        ranks: processes of each stage.
        steps: optimizer steps after which each stage ends; all of the recipe's if None.

    Raises:
        UserError: the clips are missing, or a stage failed (its own message stands above).
    """
    from mvd_scale.data.index import build_manifest
    from mvd_scale.data.samples import make_samples
    from mvd_scale.evaluation.picture import draw_run

    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    logger.info("cutting real clips into %s", out / "clips")
    manifest = out / "clips.parquet"
    clips = make_samples(out / "clips")
    if not manifest.is_file():
        build_manifest(clips, None, workers=1).save(manifest)
    for number, (stage, title) in enumerate(STAGES.items(), start=1):
        logger.info("stage %d/%d: %s", number, len(STAGES), title)
        _launch(ranks, _stage_arguments(stage, out, manifest, steps))
    for stage in STAGES:
        picture = draw_run(out / stage)
    _sum_up(out, picture, ranks, time.monotonic() - started)


def _stage_arguments(stage: str, out: Path, manifest: Path, steps: int | None) -> list[str]:
    arguments = ["pretrain", "--recipe", f"quickstart/{stage}", "--run.folder", str(out / stage)]
    arguments += ["--data.source", str(manifest)]
    if steps is not None:
        arguments += ["--training.max_steps", str(steps)]
    if stage == "student":
        for target in ("image", "video"):
            teacher = out / f"{target}_teacher" / "encoder.safetensors"
            arguments += [f"--targets.{target}.checkpoint", str(teacher)]
    return arguments


def _launch(ranks: int, arguments: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile=", "--num_gpus", str(ranks)]
    launcher += ["--master_port", str(port), "--no_local_rank", "--quiet", "--module", "mvd_scale"]
    # In a session of its own, so that a Ctrl-C reaches it once and through here.
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen([*launcher, *arguments], env=env, start_new_session=True) as job:
        try:
            job.wait()
        except BaseException:
            _end_group(job)
            raise
    if job.returncode:
        raise UserError(
            f"`mvd-scale {' '.join(arguments)}` ended with exit code {job.returncode}; its own message stands above. "
            "Start the quickstart again to go on where it stopped"
        )


def _end_group(job: subprocess.Popen[bytes]) -> None:
    """Ask a launcher and its ranks to end, and wait until the ranks have saved and are gone."""
    os.killpg(job.pid, signal.SIGTERM)
    job.wait()
    with contextlib.suppress(ProcessLookupError):
        for _ in range(400):
            os.killpg(job.pid, 0)
            time.sleep(0.1)


def _sum_up(out: Path, picture: Path, ranks: int, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Quickstart: {ranks} ranks, {seconds / 60:.1f} minutes")
    for column in ("stage", "steps", "loss at start", "at end", "clips/s", "encoder"):
        table.add_column(column, overflow="fold")
    for stage in STAGES:
        summary = _summary(out / stage)
        first, last = summary["first"], summary["last"]
        losses = [f"{reading['loss']:.4f}" for reading in (first, last)]
        weights = str(out / stage / "encoder.safetensors")
        table.add_row(stage, str(summary["steps"]), *losses, f"{last['clips_per_second']:.1f}", weights)
    console = Console()
    console.print(table)
    console.print(f"Picture of frames, mask, targets and predictions: {picture}")
    console.print(f"Curves: tensorboard --logdir {out}")
    console.print(
        "Next: your own videos, with any recipe of `mvd-scale recipes`:\n"
        "  mvd-scale pretrain --recipe quickstart/video_teacher --run.folder runs/mine --data.source VIDEOS/"
    )


def _summary(run: Path) -> dict[str, Any]:
    import json

    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary
