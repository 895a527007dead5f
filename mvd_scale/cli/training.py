"""Commands that train: `pretrain`, `finetune`, `propose`, `pipeline`, `quickstart`, `reproduce`; and `draw`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mvd_scale.cli.options import WITH_OVERRIDES, IntListType, overrides_argument, positions_option

if TYPE_CHECKING:
    from mvd_scale.config.model import Positions


@click.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", required=True, help="A name of `mvd-scale recipes`, or the path of a YAML file.")
@overrides_argument
def pretrain(recipe: str, overrides: tuple[str, ...]) -> None:
    """Pre-train or distil an encoder as a recipe specifies; resume if the run folder holds checkpoints.

    OVERRIDES are dotted keys of the recipe, such as --training.epochs 3 --data.source videos/
    """
    from mvd_scale.config import load_recipe
    from mvd_scale.training.preemption import exit_on_preemption
    from mvd_scale.training.pretrain import run_pretraining

    with exit_on_preemption():
        run_pretraining(load_recipe(recipe, list(overrides)))


@click.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", required=True, help="A name of `mvd-scale recipes`, or the path of a YAML file.")
@overrides_argument
def finetune(recipe: str, overrides: tuple[str, ...]) -> None:
    """Fine-tune a pre-trained encoder for classification; resume if the run folder holds checkpoints.

    OVERRIDES are dotted keys of the recipe, such as --training.initial_encoder runs/mine/encoder.safetensors
    """
    from mvd_scale.config import load_finetune_recipe
    from mvd_scale.training.finetuning.classification import run_classification
    from mvd_scale.training.preemption import exit_on_preemption

    with exit_on_preemption():
        run_classification(load_finetune_recipe(recipe, list(overrides)))


@click.command()
@click.argument("source")
@click.option("--encoder", type=click.Path(path_type=Path), required=True, help="Pre-trained weights of the encoder.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Recipe to write (.yaml).")
@click.option("--validation", help="Labelled videos that choose the best epoch: neither trained on nor tested.")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path("runs/mine"), show_default=True, help="Run folder."
)
@positions_option
def propose(
    source: str, encoder: Path, out: Path, validation: str | None, folder: Path, positions: Positions | None
) -> None:
    """Write a recipe that fine-tunes an encoder on the labelled videos of SOURCE, suited to their number and length.

    SOURCE is a folder with one sub-folder per class, a CSV file of paths and labels, or any other source that
    `data index` accepts.
    """
    import tempfile

    from mvd_scale.checkpoints import Hints, read_checkpoint
    from mvd_scale.config.data import DataConfig
    from mvd_scale.data.indexing.build import load_source
    from mvd_scale.training.finetuning.recipe_proposal import InitialEncoder, propose_recipe
    from mvd_scale.utils.io import write_atomic

    model = read_checkpoint(encoder, Hints(positions=positions)).model
    with tempfile.TemporaryDirectory() as scratch:
        manifest = load_source(DataConfig(source=source), Path(scratch))
    weights = InitialEncoder(encoder, positions)
    proposal = propose_recipe(manifest, model, source=source, weights=weights, validation=validation, folder=folder)
    command = f"launch/single_node.sh finetune --recipe {shlex.quote(str(out))}"
    write_atomic(out, proposal.to_yaml(command))
    click.echo(f"{out}: {proposal.title}\nStart it: {command}")


@click.command(context_settings=WITH_OVERRIDES)
@click.argument("file")
@overrides_argument
def pipeline(file: str, overrides: tuple[str, ...]) -> None:
    """Run the stages of a pipeline in order; finished stages are skipped, and an interrupted stage resumes.

    FILE is a YAML file, or the name of a pipeline in the package: quickstart, synthetic, mvd_b. OVERRIDES are dotted
    keys of the pipeline, such as --folder runs/mine --stages.student.recipe.training.max_steps 100
    """
    from mvd_scale.config.pipeline import load_pipeline
    from mvd_scale.pipelines.runner import run_pipeline

    run_pipeline(load_pipeline(file, list(overrides)))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/quickstart"), show_default=True,
    help="Folder of the pipeline.",
)  # fmt: skip
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True, help="Ranks of every stage.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps after which every stage stops.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of every stage that trains."
)
def quickstart(out: Path, ranks: int, steps: int | None, seed: int) -> None:
    """Train two teachers on real clips, distil a student from both, fine-tune it and compare it with one from scratch.

    This is `mvd-scale pipeline quickstart`. A run with another seed needs another folder.
    """
    from mvd_scale.config.pipeline import TrainStage, load_pipeline
    from mvd_scale.pipelines.runner import run_pipeline

    overrides = ["--folder", str(out), "--ranks", str(ranks)]
    trained = [name for name, stage in load_pipeline("quickstart").stages.items() if isinstance(stage, TrainStage)]
    overrides += [f"--stages.{name}.recipe.seed={seed}" for name in trained]
    if steps is not None:
        overrides += [f"--stages.{name}.recipe.training.max_steps={steps}" for name in trained]
    run_pipeline(load_pipeline("quickstart", overrides))
    click.echo(
        "Next: train on your own videos, with any recipe that `mvd-scale recipes` lists:\n"
        "  mvd-scale pretrain --recipe quickstart/video_teacher --run.folder runs/mine --data.source VIDEOS/"
    )


@click.command(context_settings=WITH_OVERRIDES)
@click.argument("table")
@click.option(
    "--scale", type=click.Choice(["full", "mini"]), default="mini", show_default=True,
    help="full: write launch files for a cluster; mini: run here, with tiny models and drawn videos.",
)  # fmt: skip
@click.option("--seeds", type=IntListType(), help="Seeds, such as 0,1,2; those of the scale if omitted.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder of all that is made; that of the scale if omitted."
)
@click.option(
    "--validation", is_flag=True, help="Judge on validation videos in place of the test's: to choose settings."
)
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Stages side by side at mini scale; one for each CPU if omitted."
)
@click.option("--gpu", default="H100", show_default=True, help="GPU model of the plan at full scale, as of `plan`.")
@click.option("--gpus", type=click.IntRange(min=1), default=32, show_default=True, help="GPUs of each job.")
@click.option("--per-node", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs per host.")
@overrides_argument
def reproduce(
    table: str,
    scale: Any,
    seeds: list[int] | None,
    output: Path | None,
    validation: bool,
    jobs: int | None,
    gpu: str,
    gpus: int,
    per_node: int,
    overrides: tuple[str, ...],
) -> None:
    """Reproduce a TABLE of the paper: table1, table2, table6, table7, table8, table9, or study, which has all of them.

    What is there already is not made again. OVERRIDES are dotted keys of the scale, such as --data.motion.train 20
    """
    from mvd_scale.performance.planning.plan import make_cluster
    from mvd_scale.performance.planning.video_decoding import VideoFormat
    from mvd_scale.reproduction.report import to_text
    from mvd_scale.reproduction.reproduce import reproduce as run

    cluster = make_cluster(
        gpu, gpus, per_node, attention=None, efficiency=None, video=VideoFormat(320, 250, 300, None), videos=240_000
    )
    made = run(
        table,
        scale,
        seeds=seeds,
        output=output,
        split="validation" if validation else "test",
        jobs=jobs,
        cluster=cluster,
        overrides=overrides,
    )
    for stage in made.planned:
        click.echo(f"{stage.name}: {stage.to_text()}")
    click.echo(to_text(made.results))
    click.echo(made.file)
    if made.script is not None:
        click.echo(f"Submit {len(made.planned)} stages, in the folder of the repository: bash {made.script}")
    for name, reason in made.failed.items():
        click.echo(f"{name}: {reason}", err=True)
    if made.failed:
        raise click.exceptions.Exit(1)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--clips", type=click.IntRange(min=1), default=4, show_default=True, help="Number of clips to show.")
def draw(run: Path, clips: int) -> None:
    """Draw predictions of a finished RUN beside the ground truth, into RUN/predictions.png."""
    from mvd_scale.visualization.predictions import draw_predictions

    click.echo(draw_predictions(run, clips=clips))
