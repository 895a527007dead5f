"""Commands that train, and the pictures of a run."""

from __future__ import annotations

from pathlib import Path

import click

from mvd_scale.cli.options import WITH_OVERRIDES, overrides_argument


@click.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", required=True, help="A name of `mvd-scale recipes`, or the path of a YAML file.")
@overrides_argument
def pretrain(recipe: str, overrides: tuple[str, ...]) -> None:
    """Train what a recipe says; resume when its run folder holds checkpoints.

    OVERRIDES are dotted keys of the recipe: --training.epochs 3 --data.source videos/
    """
    from mvd_scale.config import load_recipe
    from mvd_scale.training.pretrain import pretrain as run
    from mvd_scale.training.resilience import exit_when_stopped

    with exit_when_stopped():
        run(load_recipe(recipe, list(overrides)))


@click.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", required=True, help="A name of `mvd-scale recipes`, or the path of a YAML file.")
@overrides_argument
def finetune(recipe: str, overrides: tuple[str, ...]) -> None:
    """Teach a pre-trained encoder to name classes; resume when its run folder holds checkpoints.

    OVERRIDES are dotted keys of the recipe: --training.initial_encoder runs/mine/encoder.safetensors
    """
    from mvd_scale.config import load_finetuning
    from mvd_scale.training.finetune import finetune as run
    from mvd_scale.training.resilience import exit_when_stopped

    with exit_when_stopped():
        run(load_finetuning(recipe, list(overrides)))


@click.command()
@click.argument("source")
@click.option("--encoder", type=click.Path(path_type=Path), required=True, help="Pre-trained weights.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Recipe to write (.yaml).")
@click.option("--validation", help="Labelled videos to test after every epoch.")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path("runs/mine"), show_default=True, help="Of the run."
)
def propose(source: str, encoder: Path, out: Path, validation: str | None, folder: Path) -> None:
    """Write a recipe that fine-tunes an encoder on the labelled videos of SOURCE, after their number and length.

    SOURCE is a folder with a folder for each class, a csv of paths and labels, or whatever `data index` takes.
    """
    import tempfile

    from mvd_scale.checkpoints import read_checkpoint
    from mvd_scale.config.data import DataConfig
    from mvd_scale.data.index import open_source
    from mvd_scale.training.proposal import propose as settings
    from mvd_scale.training.run_folder import write_whole

    model = read_checkpoint(encoder).model
    with tempfile.TemporaryDirectory() as scratch:
        manifest = open_source(DataConfig(source=source), Path(scratch))
    proposal = settings(manifest, model, source=source, encoder=encoder, validation=validation, folder=folder)
    command = f"launch/single_node.sh finetune --recipe {out}"
    write_whole(out, proposal.to_yaml(command))
    click.echo(f"{out}: {proposal.title}\nStart it: {command}")


@click.command(context_settings=WITH_OVERRIDES)
@click.argument("file")
@overrides_argument
def pipeline(file: str, overrides: tuple[str, ...]) -> None:
    """Run the stages of a pipeline FILE in order: what is done is skipped, what was cut off goes on.

    FILE is a YAML file, or the name of one that comes with it: quickstart, synthetic, mvd_b. OVERRIDES are its dotted
    keys: --folder runs/mine --stages.student.recipe.training.max_steps 100
    """
    from mvd_scale.config.pipeline import load_pipeline
    from mvd_scale.pipeline import run_pipeline

    run_pipeline(load_pipeline(file, list(overrides)))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/quickstart"), show_default=True)
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True, help="Processes of every stage.")
@click.option("--steps", type=click.IntRange(min=1), help="Stop every stage after so many steps.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of every stage that trains.")
def quickstart(out: Path, ranks: int, steps: int | None, seed: int) -> None:
    """Train two teachers on real clips, distil a student from both, fine-tune it and compare it with one from scratch.

    The same as `mvd-scale pipeline quickstart`. With another seed choose another folder, too.
    """
    from mvd_scale.config.pipeline import TrainStage, load_pipeline
    from mvd_scale.pipeline import run_pipeline

    overrides = ["--folder", str(out), "--ranks", str(ranks)]
    trained = [name for name, stage in load_pipeline("quickstart").stages.items() if isinstance(stage, TrainStage)]
    overrides += [f"--stages.{name}.recipe.seed={seed}" for name in trained]
    if steps is not None:
        overrides += [f"--stages.{name}.recipe.training.max_steps={steps}" for name in trained]
    run_pipeline(load_pipeline("quickstart", overrides))
    click.echo(
        "Next: your own videos, with any recipe of `mvd-scale recipes`:\n"
        "  mvd-scale pretrain --recipe quickstart/video_teacher --run.folder runs/mine --data.source VIDEOS/"
    )


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--clips", type=click.IntRange(min=1), default=4, show_default=True, help="Clips to show.")
def draw(run: Path, clips: int) -> None:
    """Draw what a finished RUN predicts beside what is true: RUN/predictions.png."""
    from mvd_scale.evaluation.picture import draw_run

    click.echo(draw_run(run, clips=clips))
