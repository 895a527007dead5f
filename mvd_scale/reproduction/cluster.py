"""Launch files of a table for a cluster with Slurm: one job for each stage, after those from which it is made."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from mvd_scale.config import load_any_recipe
from mvd_scale.config.pipeline import BaseStage, IndexStage, Pipeline, TrainStage, references
from mvd_scale.config.reproduction import Scale
from mvd_scale.errors import UserError
from mvd_scale.performance.planning.hardware import GIB
from mvd_scale.performance.planning.plan import Cluster, Plan, make_plan
from mvd_scale.pipelines.runner import recipe_file, runs_on_ranks, stage_arguments, stage_output, write_recipe
from mvd_scale.reproduction.records import Record, StageConfigs, code_version, is_finished
from mvd_scale.utils.io import write_atomic

SCRIPT = "submit.sh"

_LONGEST_HOURS = 24
"""Time limit of a job in hours. Longer trainings are requeued at the limit and go on from their checkpoint."""

_MARGIN = 1.25
"""Factor on the planned hours, for the time limit of a job."""

_HEAD = """\
#!/usr/bin/env bash
# {title}: the jobs that are missing, by launch/slurm.sbatch, each after those from which it is made.
#
#   cd REPOSITORY && bash {script}
#
# {hours}
# Once they have ended, `mvd-scale reproduce` with the same words prints the results beside the paper's.
set -euo pipefail

[[ -f launch/slurm.sbatch ]] || {{
    echo "error: no launch/slurm.sbatch here: start this script in the folder of the repository" >&2
    exit 2
}}
# Options of sbatch for all jobs, such as SBATCH_OPTIONS="--partition=gpu --account=video".
read -ra options <<<"${{SBATCH_OPTIONS:-}}"

submit() {{
    sbatch --parsable "${{options[@]}}" "$@"
}}
"""


@dataclass(frozen=True)
class PlannedStage:
    """A stage that is missing, and what it needs."""

    name: str
    plan: Plan | None
    """Plan of a training; None for other stages."""

    @property
    def gpu_hours(self) -> float:
        """Hours of one GPU that the plan predicts."""
        return 0.0 if self.plan is None else self.plan.run_hours * self.plan.cluster.gpus

    def to_text(self) -> str:
        """Predicted hours and memory."""
        if self.plan is None:
            return "not planned"
        cluster, used = self.plan.cluster, self.plan.memory.peak / GIB
        return (
            f"{self.plan.run_hours:.1f} hours on {cluster.gpus} {cluster.gpu.name}, {used:.1f} of "
            f"{self.plan.memory_usable / GIB:.1f} GiB of each"
        )


def write_launch_files(title: str, scale: Scale, pipeline: Pipeline, cluster: Cluster) -> list[PlannedStage]:
    """Write `submit.sh` and the recipes of all stages that are missing, into the folder of the pipeline.

    Args:
        title: title of the table.
        scale: scale with the numbers of videos.
        pipeline: pipeline of the table, in an absolute folder.
        cluster: GPUs of each job.

    Returns:
        the stages that are missing.

    Raises:
        UserError: a finished stage has another configuration now, or a training does not fit on the GPUs.
    """
    configs = StageConfigs(pipeline)
    configs.check_unchanged()
    pipeline.folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in pipeline.stages if not is_finished(pipeline, name)]
    planned = [_plan(scale, pipeline, name, cluster) for name in missing]
    commit = code_version()
    for name in missing:
        # A stage that has begun keeps the commit by which it began; one that waits will run by the commit of now.
        if not (pipeline.place(name).exists() and Record.load(pipeline, name)):
            configs.record(name, None, commit)
    total = sum(stage.gpu_hours for stage in planned)
    hours = f"Planned: {total:,.0f} hours of one {cluster.gpu.name}, tests and indexing not counted."
    script = pipeline.folder / SCRIPT
    head = _HEAD.format(title=title, script=shlex.quote(str(script)), hours=hours)
    lines = [line for stage in planned for line in _job(pipeline, stage, missing, cluster)]
    write_atomic(script, "\n".join([head, *lines]) + "\n")
    return planned


def _plan(scale: Scale, pipeline: Pipeline, name: str, cluster: Cluster) -> PlannedStage:
    if not isinstance(pipeline.stages[name], TrainStage):
        return PlannedStage(name, None)
    write_recipe(pipeline, name)
    file = recipe_file(pipeline, name)
    source = load_any_recipe(file).data.source
    counts = [count for data, count in scale.videos.items() if source and Path(source).parent.name == data]
    try:
        plan = make_plan(str(file), [], replace(cluster, videos=counts[0] if counts else cluster.videos))
    except UserError as error:
        raise UserError(f"stage {name} cannot run on {cluster.gpus} {cluster.gpu.name}: {error}") from error
    return PlannedStage(name, plan)


def _job(pipeline: Pipeline, planned: PlannedStage, missing: list[str], cluster: Cluster) -> Iterator[str]:
    """Lines that start a stage."""
    name, stage = planned.name, pipeline.stages[planned.name]
    yield f"# {stage.title or name}"
    if isinstance(stage, IndexStage):
        output = shlex.quote(str(stage_output(pipeline, name)))
        words = shlex.join(_index_words(pipeline, name))
        yield f"[[ -f {output} ]] || python -m mvd_scale data index {words} --out {output}\n"
        return
    assert runs_on_ranks(stage)
    yield f"# plan: {planned.to_text()}"
    after = [
        other
        for other in dict.fromkeys(references(stage))
        if other in missing and runs_on_ranks(pipeline.stages[other])
    ]
    options = [
        f"--job-name={name}",
        f"--nodes={cluster.gpus // cluster.per_node}",
        f"--gpus-per-node={cluster.per_node}",
        f"--time={_limit(planned)}",
        f"--output={pipeline.folder / f'{name}-%j.log'}",
    ]
    words = shlex.join(options)
    if after:
        words += f' --dependency="afterok:{":".join(f"${{{_variable(other)}}}" for other in after)}"'
    arguments = shlex.join(stage_arguments(pipeline, name))
    yield f"{_variable(name)}=$(submit {words} launch/slurm.sbatch {arguments})\n"


def _index_words(pipeline: Pipeline, name: str) -> list[str]:
    """Sources and options of `mvd-scale data index`, whose options have the names of the fields of the stage."""
    values = pipeline.resolved(name)
    options = [
        word
        for option, value in values.items()
        if option not in {"kind", "sources", *BaseStage.model_fields} and value is not None
        for word in (f"--{option}", str(value))
    ]
    return [*values["sources"], *options]


def _variable(name: str) -> str:
    return f"job_{name}"


def _limit(planned: PlannedStage) -> str:
    hours = _LONGEST_HOURS if planned.plan is None else min(ceil(_MARGIN * planned.plan.run_hours), _LONGEST_HOURS)
    return f"{max(hours, 1)}:00:00"
