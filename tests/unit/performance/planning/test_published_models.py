"""Sizes of the models of Tables 3 and 4: those of the modules, beside the paper's."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from mvd_scale.cli import cli
from mvd_scale.config import load_finetune_recipe
from mvd_scale.models import Classifier
from mvd_scale.performance.planning.published_models import PUBLISHED, SIZES, compute_models

MODELS = compute_models()


@pytest.mark.parametrize("number", range(len(PUBLISHED)))
def test_figures_are_those_of_the_paper_but_for_rounding_and_norms(number: int) -> None:
    model = MODELS[number]
    assert model.macs / 1e9 == pytest.approx(PUBLISHED[number].gmacs, rel=0.0025)
    assert model.parameters / 1e6 == pytest.approx(PUBLISHED[number].mparams, rel=0.0075)
    assert model.macs_difference == pytest.approx(100 * (model.macs / 1e9 / PUBLISHED[number].gmacs - 1))
    assert model.views == (15 if PUBLISHED[number].table == 3 else 6)


@pytest.mark.parametrize("size", SIZES)
def test_they_are_counted_by_torch_too(size: str) -> None:
    model = next(model for model in MODELS if model.published.size == size)
    recipe = load_finetune_recipe(model.published.recipe)
    with torch.device("meta"):
        classifier = Classifier(recipe.model, model.classes)
        clip = torch.empty(1, 16, 224, 224, 3, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter:
            classifier(clip)
    assert 2 * model.macs == counter.get_total_flops()
    assert model.parameters == sum(parameter.numel() for parameter in classifier.parameters())


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["tables", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_prints_both_tables_and_what_is_counted() -> None:
    text = run()
    assert "Table 3, Kinetics-400: 15 views of 16 x 224 x 224, 400 classes" in text
    assert "Table 4, Something-Something V2: 6 views of 16 x 224 x 224, 174 classes" in text
    row = next(line for line in text.splitlines() if line.split()[:1] == ["ViT-H"]).split()
    assert row[-8:] == ["1190.99", "1192", "-0.08", "%", "632.12", "633", "-0.14", "%"]
    assert "both products of the" in text


def test_json_of_one_size() -> None:
    values = json.loads(run("--size", "B", "--json"))
    assert [row["model"] for row in values["models"]] == ["ViT-B", "ViT-B"]
    assert values["models"][0]["macs"] == 180_344_893_440
    assert values["models"][0]["published_gmacs"] == 180
    assert "attention" in values["counted"]


def test_an_unknown_size_is_refused() -> None:
    result = CliRunner().invoke(cli, ["tables", "--size", "G"])
    assert result.exit_code == 2
    assert "is not one of" in result.output
    assert "'H'" in result.output
