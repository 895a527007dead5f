"""`mvd-scale reproduce`: a table is run here in miniature, or prepared for a cluster; its results are gathered."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mvd_scale.config.reproduction import ScaleName, load_scale, load_table
from mvd_scale.errors import UserError
from mvd_scale.performance.planning.plan import Cluster
from mvd_scale.reproduction.cluster import SCRIPT, PlannedStage, write_launch_files
from mvd_scale.reproduction.expand import Split, expand
from mvd_scale.reproduction.results import TableResults, gather
from mvd_scale.reproduction.runner import Failures, run_missing


@dataclass(frozen=True)
class Reproduction:
    """Results of a table as far as they are there."""

    results: TableResults

    file: Path
    """Written `results.json`."""

    failed: dict[str, str] = field(default_factory=dict)
    """Reason for each stage that failed or was left out, by name."""

    planned: tuple[PlannedStage, ...] = ()
    """Stages for a cluster that are missing."""

    script: Path | None = None
    """Script that submits them; None if none are missing."""


def reproduce(
    name: str,
    scale_name: ScaleName,
    *,
    seeds: Sequence[int] | None,
    output: Path | None,
    split: Split = "test",
    jobs: int | None = None,
    cluster: Cluster | None = None,
    overrides: Sequence[str] = (),
) -> Reproduction:
    """Run what is missing of a table, or write its launch files, and gather its results.

    Args:
        name: name of the table.
        scale_name: `mini` runs here, `full` writes launch files.
        seeds: seeds; those of the scale if None.
        output: folder; that of the scale if None.
        split: videos on which all are judged.
        jobs: stages side by side; one for each CPU if None. For `mini`.
        cluster: GPUs of each job, for `full`.
        overrides: dotted overrides of the scale.

    Raises:
        UserError: the table is unknown, a value is invalid, or a finished stage has another configuration now.
    """
    file, table = load_table(name, scale_name)
    told = [] if seeds is None else [f"--seeds={list(seeds)}"]
    scale = load_scale(scale_name, [*overrides, *told])
    if split == "validation" and scale_name == "full":
        raise UserError("--validation is for `--scale mini`, whose videos are drawn: leave it out")
    folder = (output or scale.output).absolute()
    expansion = expand(scale, table, scale.seeds, folder, split)
    head = {"table": name, "title": file.title, "note": file.note, "scale": scale_name}

    def results_so_far(failed: Failures) -> TableResults:
        return gather(head, scale, table, expansion, split=split, failed=failed)

    def write_results(failed: Failures) -> None:
        results_so_far(failed).write(folder)

    failed, planned = {}, []
    if scale_name == "mini":
        failed = run_missing(expansion.pipeline, jobs or len(os.sched_getaffinity(0)), write_results)
    else:
        assert cluster is not None
        planned = write_launch_files(file.title, scale, expansion.pipeline, cluster)
    results = results_so_far(failed)
    written = results.write(folder)
    return Reproduction(results, written, failed, tuple(planned), folder / SCRIPT if planned else None)
