"""Commands `recipes`, `schema` and `env`: information about recipes, their keys, and this machine."""

from __future__ import annotations

import click


@click.command()
def recipes() -> None:
    """List the names of the recipes in the package, with a short description of each."""
    from mvd_scale.config import list_recipes

    names = list_recipes()
    width = max(map(len, names))
    for name, head in names.items():
        click.echo(f"{name:{width}}  {head}")


@click.command()
@click.argument("kind", type=click.Choice(["pretrain", "finetune", "detect", "pipeline", "scale"]), default="pretrain")
def schema(kind: str) -> None:
    """Print all keys of recipes of a KIND, or of pipelines, with type, default and description, as JSON Schema."""
    import json

    from mvd_scale.config import DetectionRecipe, FinetuneRecipe, Recipe
    from mvd_scale.config.pipeline import Pipeline
    from mvd_scale.config.reproduction import Scale
    from mvd_scale.config.section import Section

    kinds: dict[str, type[Section]] = {
        "pretrain": Recipe, "finetune": FinetuneRecipe, "detect": DetectionRecipe, "pipeline": Pipeline, "scale": Scale,
    }  # fmt: skip
    click.echo(json.dumps(kinds[kind].model_json_schema(), indent=2))


@click.command()
def env() -> None:
    """Show which capabilities this machine has, and for each missing one the reason and how to get it."""
    from mvd_scale.utils.env_report import collect_capabilities, format_capabilities

    click.echo(format_capabilities(collect_capabilities()))
