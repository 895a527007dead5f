"""Several students in one run are what each of them is alone, through a skipped step, a kill and a lost checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mvd_scale.checkpoints.native import save_weights
from mvd_scale.config import load_recipe
from mvd_scale.models import Encoder
from mvd_scale.utils.events import read_events
from mvd_scale.utils.io import read_metrics

from .conftest import Jobs

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS = 12

FAMILY = """
base: {base}
targets:
  video: {{kind: video_teacher, checkpoint: {teacher}, decoder: &decoder {{width: 32, depth: 1, heads: 2}}}}
  average: {{kind: momentum, momentum: 0.9, norm: true, decoder: *decoder}}
teachers: {{sharding: zero3}}
students:
  spoiled: {{model: {{width: 32, heads: 2}}, targets: {{average: null}}}}
  small:
    model: {{width: 32, heads: 2, drop_path: 0.1}}
    data: {{mask: {{ratio: 0.5}}}}
    targets: {{average: null, pixels: {{weight: 0.5}}}}
    training: {{base_lr: 5e-3, weight_decay: 0.1, clip_grad: 1.0, deepspeed: zero3}}
  wide:
    model: {{depth: 3}}
    targets: {{video: {{decoder: {{depth: 2}}, distance: l2}}}}
    training: {{deepspeed: zero1, gradient_checkpointing: block}}
"""


def numbers(run: Path) -> list[dict[str, float]]:
    """What the steps computed, by name, without times."""
    timed = ("clips_per_second", "seconds_per_step", "data_wait_share", "memory_gib")
    return [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(run / "metrics.jsonl")]


def test_each_is_what_it_is_alone(jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path) -> None:
    teacher, family, run = tmp_path / "teacher.safetensors", tmp_path / "family.yaml", tmp_path / "run"
    model = load_recipe(recipe).model
    save_weights(teacher, Encoder(model, final_norm=False).state_dict(), model)
    family.write_text(FAMILY.format(base=recipe, teacher=teacher))
    words = ["pretrain", "--recipe", family, "--data.source", clips, "--run.folder", run]
    words += ["--training.max_steps", str(STEPS)]

    fault = ("not_a_number_and_later_killed", "0", "2")
    code, output = jobs.fork_server.run("tests.e2e.faulty", *fault, *map(str, words), ranks=2, seconds=200)
    assert code != 0, output
    assert "are not finite in 'forward' of step 3 of students.spoiled; its" in output, output
    lost = run / "students" / "small" / "checkpoints" / "step_00000010"
    shutil.rmtree(lost, ignore_errors=True)
    ahead = run / "students" / "wide" / "checkpoints" / "step_00000010"
    if not ahead.is_dir():
        # The kill came before it was whole; any whole one will do, since it is only set aside.
        shutil.copytree(ahead.with_name("step_00000005"), ahead)
    code, output = jobs.run(*words, ranks=2)
    assert code == 0, output
    assert ahead.with_name("step_00000010.ahead").is_dir()
    for name in ("spoiled", "small", "wide"):
        assert f"resumed from {run / 'students' / name / 'checkpoints' / 'step_00000005'}" in output

    for name in ("small", "wide"):
        student, alone = run / "students" / name, tmp_path / name
        code, output = jobs.run("pretrain", "--recipe", student / "recipe.yaml", "--run.folder", alone, ranks=2)
        assert code == 0, output
        assert [row["step"] for row in numbers(student)] == list(range(1, STEPS + 1))
        assert numbers(student) == numbers(alone)
        files = sorted(file.name for file in alone.glob("*.safetensors"))
        assert files == sorted(file.name for file in student.glob("*.safetensors"))
        for file in files:
            ours, theirs = load_file(student / file), load_file(alone / file)
            assert all(ours[key].equal(theirs[key]) for key in theirs), file

    skipped = [event for event in read_events(run / "events.jsonl") if event["event"] == "skip"]
    assert [(event["step"], event["student"]) for event in skipped] == [(3, "spoiled")]
    together = read_metrics(run / "metrics.jsonl")[-1]
    assert together["students/wide/loss"] == numbers(run / "students" / "wide")[-1]["loss"]

    code, output = jobs.run("draw", run / "students" / "wide")
    assert code == 0, output
    code, output = jobs.run("export", run, "--to", "mvd", "--out", tmp_path / "all.pth")
    assert code == 2
    assert "is a run of 3 students: give the folder of one of them" in output
    code, output = jobs.run(*words, ranks=2)
    assert code == 0, output
    assert "is already finished" in output
