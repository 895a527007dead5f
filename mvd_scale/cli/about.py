"""What there is: recipes, their keys, this machine."""

from __future__ import annotations

import click


@click.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    from mvd_scale.config import list_recipes

    names = list_recipes()
    width = max(map(len, names))
    for name, head in names.items():
        click.echo(f"{name:{width}}  {head}")


@click.command()
@click.argument("kind", type=click.Choice(["pretrain", "finetune", "detect", "pipeline"]), default="pretrain")
def schema(kind: str) -> None:
    """Print every key of a recipe, or of a pipeline, with its type, default and meaning, as JSON Schema."""
    import json

    from mvd_scale.config import DetectionRecipe, FinetuneRecipe, Recipe
    from mvd_scale.config.pipeline import Pipeline
    from mvd_scale.config.section import Section

    kinds: dict[str, type[Section]] = {
        "pretrain": Recipe, "finetune": FinetuneRecipe, "detect": DetectionRecipe, "pipeline": Pipeline,
    }  # fmt: skip
    click.echo(json.dumps(kinds[kind].model_json_schema(), indent=2))


@click.command()
def env() -> None:
    """Show what this machine can do, and why what is off is off."""
    from mvd_scale.capabilities import probe, table

    click.echo(table(probe()))
