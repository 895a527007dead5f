"""Tests of recipes: loading, overrides, and messages that name key, value and expectation of each fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mvd_scale.config import Recipe, load_recipe
from mvd_scale.errors import UserError

TINY: dict[str, Any] = {
    "run": {"folder": "run"},
    "device": "cpu",
    "model": {"width": 32, "depth": 1, "heads": 2, "frames": 4, "input_size": 32},
    "data": {"mask": {"ratio": 0.5}},
    "targets": {"pixels": {"kind": "pixels", "decoder": {"width": 16, "depth": 1, "heads": 2}}},
    "training": {"epochs": 4, "global_batch": 8, "base_lr": 1e-3, "warmup_epochs": 1},
}

DENSE = "{kind: pixels, visible_weight: 0.5, decoder: {width: 16, depth: 1, heads: 2}}"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return file


def test_the_resolved_recipe_reads_back_to_itself(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny, ["--training.epochs", "7"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load_recipe(resolved) == recipe


def test_overrides_reach_any_depth_and_the_last_one_wins(tiny: Path) -> None:
    recipe = load_recipe(
        tiny,
        [
            "--training.epochs=5",
            "--training.epochs",
            "6",
            "--targets.pixels.decoder",
            "{width: 64}",
            "--data.crop.kind",
            "center",
        ],
    )
    assert recipe.training.epochs == 6
    assert recipe.targets["pixels"].decoder.width == 64
    assert recipe.targets["pixels"].decoder.depth == 1
    assert recipe.data.crop.kind == "center"


@pytest.mark.parametrize(
    ("override", "key", "expectation"),
    [
        (["--training.epoch", "3"], "training.epoch", "unknown key"),
        (["--trainin.epochs", "3"], "trainin", "unknown key"),
        (["--training.epochs", "many"], "training.epochs", "'many'"),
        (["--training.epochs", "0"], "training.epochs", "greater than 0"),
        (
            ["--training.gradient_checkpointing", "true"],
            "training.gradient_checkpointing",
            "'none', 'block' or 'attention'",
        ),
        (["--data.mask.ratio", "0.1"], "recipe", "leaves 8 of 8 tokens visible"),
        (["--data.mask.ratio", "1.5"], "data.mask.ratio", "less than 1"),
        (["--targets.pixels.decoder", "null"], "targets.pixels", "requires its width, depth and heads"),
        (
            ["--targets.pixels.tokens", "visible"],
            "targets.pixels",
            "but tokens is visible",
        ),
        (["--targets.pixels.head", "mlp"], "targets.pixels", "decoder has no effect with `head: mlp`"),
        (["--targets.pixels.hidden", "8"], "targets.pixels", "it is the hidden width of `head: mlp`"),
        (["--targets.pixels", "{head: mlp, decoder: null}"], "targets.pixels", "`tokens: visible` or `tokens: all`"),
        (["--targets.pixels", "{head: mlp, decoder: null, tokens: all}"], "recipe", "set data.mask to null"),
        (["--data.mask", "null"], "recipe", "the student sees all tokens"),
        (["--data.mask.decode_ratio", "0.4"], "data.mask.decode_ratio", "0.25, 0.5, 0.75 or 1"),
        (["--data.mask.decode_ratio", "0.5"], "recipe", "a tube mask over 2 slices"),
        (["--targets", "{pixels: null}"], "targets", "at least 1 item"),
        (["--training.precision", "fp16"], "recipe", "needs a GPU"),
        (["--training.compile", "often"], "training.compile", "'often'"),
        (["--teachers.compile", "true", "--teachers.sharding", "zero3"], "recipe", "`teachers.sharding: replicated`"),
        (["--teachers.compile", "true"], "recipe", "no target has a teacher"),
        (["--training.batch_decoders", "true"], "recipe", "no two targets have decoders of the same shape"),
        (
            ["--training.batch_decoders", "true", "--targets.dense", DENSE],
            "recipe",
            "decoders of the same shape that predict the same tokens",
        ),
        (["--training.warmup_epochs", "4"], "recipe", "must be less"),
        (["--training.min_lr", "1"], "recipe", "must not exceed training.base_lr"),
        (["--model.heads", "3"], "model", "width 32 is not a multiple of heads 3"),
        (["--model.size", "B"], "model", "width is 32, but size B has 768"),
        (["--model.input_size", "33"], "model", "not a multiple of patch_size 16"),
        (["--model.frames", "3"], "model", "not a multiple of tubelet 2"),
        (["--model.positions", "sincos2d"], "model", "do not encode time"),
        (["--targets.pixels.decoder.widht", "3"], "targets.pixels.decoder.widht", "unknown key"),
        (["--targets.pixels.decoder.width", "24"], "recipe", "multiple of 16, not 24"),
        (["--model.width", "24"], "model", "multiple of 16, not 24"),
        (["--data.crop", "{kind: corner, scales: [2.0]}"], "data.crop.scales.0", "less than or equal to 1"),
        (["--data.workers", "-1"], "data.workers", "greater than or equal to 0"),
        (["--training.betas", "[1.5, 2]"], "training.betas.0", "less than 1"),
        (["--targets.pixels.kind", "voxels"], "targets.pixels", "voxels"),
        (["--targets.pixels.decoder.heads", "3"], "recipe", "targets.pixels.decoder"),
        (["--training.base_lr", ".nan"], "training.base_lr", "finite"),
    ],
)
def test_a_fault_is_named(tiny: Path, override: list[str], key: str, expectation: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(tiny, override)
    assert f"  {key}" in str(error.value)
    assert expectation in str(error.value)


def test_all_faults_are_named_at_once(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)model\.depht.*training\.epoch"):
        load_recipe(tiny, ["--model.depht", "1", "--training.epoch", "3"])


@pytest.mark.parametrize("words", [["--training.epochs"], ["training.epochs", "3"], ["--", "3"]])
def test_an_argument_that_is_no_override_is_refused(tiny: Path, words: list[str]) -> None:
    with pytest.raises(UserError, match="--"):
        load_recipe(tiny, words)


def test_a_recipe_stands_on_its_base(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "longer.yaml").write_text("base: tiny.yaml\ntraining: {epochs: 9}\n")
    other = "{kind: pixels, decoder: {width: 32, depth: 1, heads: 2}}"
    (tmp_path / "other.yaml").write_text(f"base: longer.yaml\ntargets: {{pixels: null, raw: {other}}}\n")
    recipe = load_recipe(tmp_path / "other.yaml", ["--training.base_lr", "0.5"])
    assert (recipe.training.epochs, recipe.training.base_lr, recipe.training.global_batch) == (9, 0.5, 8)
    assert list(recipe.targets) == ["raw"]
    (tmp_path / "tiny.yaml").write_text("base: longer.yaml\n")
    with pytest.raises(UserError, match="cannot be its own base"):
        load_recipe(tmp_path / "longer.yaml")
    (tmp_path / "longer.yaml").write_text("base: nothing/here\n")
    with pytest.raises(UserError, match="no recipe 'nothing/here'"):
        load_recipe(tmp_path / "longer.yaml")


def test_an_anchor_is_no_shared_section() -> None:
    recipe = load_recipe("distill/b_from_b", ["--targets.image.decoder.depth", "5"])
    assert recipe.targets["image"].decoder is not None
    assert recipe.targets["video"].decoder is not None
    assert (recipe.targets["image"].decoder.depth, recipe.targets["video"].decoder.depth) == (5, 2)


def test_an_unknown_recipe_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quickstart/student"):
        load_recipe("quickstart/studnet")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(broken)


def test_the_global_batch_is_split_over_ranks() -> None:
    recipe = Recipe.model_validate(TINY)
    assert recipe.micro_batch_and_accumulation(1) == (8, 1)
    assert recipe.micro_batch_and_accumulation(4) == (2, 1)
    halved = Recipe.model_validate({**TINY, "training": {**TINY["training"], "micro_batch": 2}})
    assert halved.micro_batch_and_accumulation(2) == (2, 2)
    assert halved.micro_batch_and_accumulation(8) == (1, 1)
    # Expected: the largest divisor of a rank's share of the global batch, up to the recipe's micro batch.
    uneven = Recipe.model_validate({**TINY, "training": {**TINY["training"], "micro_batch": 3}})
    assert uneven.micro_batch_and_accumulation(2) == (2, 2)


def test_an_impossible_split_proposes_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Start 2 or 4 ranks, or set training\.global_batch to 6 or 9"):
        Recipe.model_validate(TINY).micro_batch_and_accumulation(3)
    with pytest.raises(UserError, match=r"Start 8 ranks, or set training\.global_batch to 9;"):
        Recipe.model_validate(TINY).micro_batch_and_accumulation(9)


@pytest.mark.parametrize(("kind", "ratio", "visible"), [("tube", 0.9, 160), ("random", 0.9, 157), ("tube", 0.75, 392)])
def test_visible_tokens_of_a_published_clip(kind: str, ratio: float, visible: int) -> None:
    values = {**TINY, "model": {"size": "S"}, "data": {"mask": {"kind": kind, "ratio": ratio}}}
    assert Recipe.model_validate(values).visible_tokens == visible


def test_what_may_change_between_a_start_and_its_resumption() -> None:
    recipe = Recipe.model_validate(TINY)
    moved = recipe.model_copy(update={"logging": recipe.logging.model_copy(update={"every_steps": 3})})
    assert moved.identity() == recipe.identity()

    def with_training(**values: object) -> Recipe:
        return recipe.model_copy(update={"training": recipe.training.model_copy(update=values)})

    other = {"deepspeed": "zero3", "gradient_checkpointing": "block", "compile": True, "batch_decoders": True}
    for key, value in (*other.items(), ("micro_batch", 1), ("max_steps", 1), ("precision", "bf16")):
        assert with_training(**{key: value}).identity() == recipe.identity(), key
    assert with_training(epochs=9).identity() != recipe.identity()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--data.mixture", "{a: {source: x}}", "--data.source", "y"], "not both"),
        (["--data.mixture", "{a b: {source: x}}"], "letters, digits and underscores"),
        (["--data.mixture", "{a: {source: x, stride: 2}}", "--data.sampling", "segments"], "has no effect"),
        (["--data.mixture", "{a: {source: x, stride: 2}}", "--data.sampling", "whole_segments"], "has no effect"),
        (["--data.mixture", "{a: {source: x, weight: 0}}"], "data.mixture.a.weight"),
        (["--data.augment", "{jitter: {}}"], "data.augment.jitter: unknown key"),
    ],
)
def test_contradictions_of_data(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe("distill/b_from_b", override)


def test_a_micro_batch_holds_whole_sets_of_copies():
    recipe = load_recipe("distill/b_from_b", ["--data.copies", "3", "--training.micro_batch", "null"])
    with pytest.raises(
        UserError,
        match=r"in whole sets of 3 copies\. No number of ranks divides it: set .* to 960 or 1056",
    ):
        recipe.micro_batch_and_accumulation(32)
    recipe = load_recipe("distill/b_from_b", ["--data.copies", "2", "--training.micro_batch", "16"])
    assert recipe.micro_batch_and_accumulation(32) == (16, 2)
    recipe = load_recipe("distill/b_from_b", ["--data.copies", "2", "--training.micro_batch", "1"])
    with pytest.raises(UserError, match=r"micro_batch 1 is less than data\.copies 2"):
        recipe.micro_batch_and_accumulation(32)


def test_where_videos_lie_and_who_reads_them_is_not_what_makes_a_run():
    first = load_recipe("distill/b_from_b", ["--data.mixture", "{a: {source: x, weight: 2}}"])
    second = load_recipe(
        "distill/b_from_b", ["--data.mixture", "{a: {source: y, weight: 2}}", "--data.read_timeout", "5"]
    )
    third = load_recipe("distill/b_from_b", ["--data.mixture", "{a: {source: y, weight: 3}}"])
    assert first.identity() == second.identity() != third.identity()


def test_where_videos_are_decoded_may_change_on_a_resume_and_must_exist() -> None:
    recipe = Recipe.model_validate(TINY)
    on_host = recipe.model_copy(update={"data": recipe.data.model_copy(update={"decoder": "host"})})
    assert on_host.identity() == recipe.identity()
    with pytest.raises(ValueError, match=r"data\.decoder nvdec needs a GPU, but device is cpu: use auto"):
        Recipe.model_validate({**TINY, "device": "cpu", "data": {"decoder": "nvdec"}})
