"""Sizes of the plain ViTs of Tables 3 and 4, computed from the models that fine-tuning recipes build, and published.

Counted are multiply-accumulates of matrix products for one view: patch embedding, linear layers, both products of the
attention (scores, and scores with values) and the classification head. Norms, GELU, softmax and biases are not counted.
Parameters are those of the whole classifier; fixed position tables are none.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from mvd_scale.config import load_finetune_recipe
from mvd_scale.performance.planning.workload import build_workload

Size = Literal["S", "B", "L", "H"]
SIZES: tuple[Size, ...] = get_args(Size)

COUNTED = (
    "GMACs are billions of multiply-accumulates for one view: patch embedding, linear layers, both products of the\n"
    "attention, and the head; not norms, GELU and softmax. Parameters are those of the classifier, without its fixed\n"
    "position table. Differences are relative to the paper, whose figures are rounded to whole numbers.\n"
    "The package does not build the other models of these tables; ST-MAE's ViTs have a class token."
)


@dataclass(frozen=True)
class PublishedModel:
    """Row, or rows with equal figures, of Table 3 (Kinetics-400) or Table 4 (Something-Something V2)."""

    table: Literal[3, 4]
    size: Size
    methods: tuple[str, ...]
    """Methods whose rows have these figures."""

    gmacs: int
    """Column "GFLOPs" of the paper, for one view, in 1e9 multiply-accumulates."""

    mparams: int
    """Column "Param" of the paper, in millions."""

    @property
    def recipe(self) -> str:
        """Name of the recipe that fine-tunes this model."""
        return f"finetune/{self.size.lower()}_{'k400' if self.table == 3 else 'ssv2'}"


_ALL = ("VideoMAE", "OmniMAE", "MVD")

PUBLISHED = (
    PublishedModel(3, "S", ("VideoMAE", "MVD"), 57, 22),
    PublishedModel(3, "B", _ALL, 180, 87),
    PublishedModel(3, "L", _ALL, 597, 305),
    PublishedModel(3, "H", _ALL, 1192, 633),
    PublishedModel(4, "S", ("VideoMAE", "MVD"), 57, 22),
    PublishedModel(4, "B", _ALL, 180, 87),
    PublishedModel(4, "L", _ALL, 597, 305),
    PublishedModel(4, "H", ("OmniMAE", "MVD"), 1192, 633),
)


@dataclass(frozen=True)
class ComputedModel:
    """Figures of a published model, computed from the code."""

    published: PublishedModel
    macs: int
    """Multiply-accumulates of one view."""

    parameters: int
    classes: int
    views: int
    """Views of the test, clips times crops."""

    clip: str
    """Shape of a view, frames x height x width."""

    @property
    def macs_difference(self) -> float:
        """Computed minus published multiply-accumulates, in percent of the published ones."""
        return 100 * (self.macs / (1e9 * self.published.gmacs) - 1)

    @property
    def parameters_difference(self) -> float:
        """Computed minus published parameters, in percent of the published ones."""
        return 100 * (self.parameters / (1e6 * self.published.mparams) - 1)


def compute_models(sizes: Collection[Size] = SIZES) -> list[ComputedModel]:
    """Compute the models of Tables 3 and 4 that have one of some sizes; nothing is allocated."""
    return [_compute(published) for published in PUBLISHED if published.size in sizes]


def _compute(published: PublishedModel) -> ComputedModel:
    recipe = load_finetune_recipe(published.recipe)
    workload, model = build_workload(recipe), recipe.model
    assert recipe.classifier.classes is not None
    return ComputedModel(
        published,
        # The planner counts FLOPs, two for each multiply-accumulate.
        macs=round(sum(part.forward for part in workload.trained)) // 2,
        parameters=workload.parameters,
        classes=recipe.classifier.classes,
        views=recipe.test.clips * recipe.test.crops,
        clip=f"{model.frames} x {model.input_size} x {model.input_size}",
    )


def to_json(models: list[ComputedModel]) -> str:
    """Format as one JSON object: a list of models, and what is counted."""
    rows = [
        {
            "table": model.published.table,
            "model": f"ViT-{model.published.size}",
            "methods": model.published.methods,
            "recipe": model.published.recipe,
            "classes": model.classes,
            "views": model.views,
            "macs": model.macs,
            "published_gmacs": model.published.gmacs,
            "macs_difference_percent": round(model.macs_difference, 4),
            "parameters": model.parameters,
            "published_million_parameters": model.published.mparams,
            "parameters_difference_percent": round(model.parameters_difference, 4),
        }
        for model in models
    ]
    return json.dumps({"models": rows, "counted": " ".join(COUNTED.split())}, indent=2)


def to_text(models: list[ComputedModel]) -> str:
    """Format as one table of text for each table of the paper, followed by what is counted."""
    return "\n".join([*_lines(models, 3, "Kinetics-400"), *_lines(models, 4, "Something-Something V2"), COUNTED])


def _lines(models: list[ComputedModel], table: int, videos: str) -> Iterator[str]:
    rows = [model for model in models if model.published.table == table]
    yield f"Table {table}, {videos}: {rows[0].views} views of {rows[0].clip}, {rows[0].classes} classes"
    yield f"  {'':35}{'GMACs of a view':^27}{'M parameters':^26}".rstrip()
    head = ("computed", "paper", "difference")
    yield f"  {'model':<7}{'rows of':<28}{_cells(*head)}{_cells(*head)}"
    for model in rows:
        published = model.published
        macs = (f"{model.macs / 1e9:.2f}", f"{published.gmacs}", f"{model.macs_difference:+.2f} %")
        parameters = (f"{model.parameters / 1e6:.2f}", f"{published.mparams}", f"{model.parameters_difference:+.2f} %")
        yield f"  ViT-{published.size:<3}{', '.join(published.methods):<28}{_cells(*macs)}{_cells(*parameters)}"
    yield ""


def _cells(computed: str, paper: str, difference: str) -> str:
    return f"{computed:>9}{paper:>6}{difference:>12}"
