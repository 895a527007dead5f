"""Several students in a recipe: what they may have of their own, and the recipe of each alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mvd_scale.config import MaskConfig, Recipe, load_recipe
from mvd_scale.errors import UserError
from mvd_scale.performance.planning.parallelism import with_training

SMALL = "{model: {size: S}, targets: {image: {decoder: &d {width: 384, heads: 6}}, video: {decoder: *d}}}"


def family(students: str, *words: str) -> Recipe:
    return load_recipe("distill/b_from_b", ["--students", students, *words])


def test_a_student_is_the_recipe_with_its_own_keys() -> None:
    made = family(f"{{s: {SMALL}, b: {{training: {{base_lr: 1e-3, clip_grad: null}}}}}}", "--training.clip_grad", "2")
    small, base = made.students["s"], made.students["b"]
    assert (small.model.width, small.model.drop_path, base.model.width) == (384, 0.1, 768)
    assert (small.targets["image"].decoder.width, small.targets["image"].decoder.depth) == (384, 2)
    assert (small.training.base_lr, small.training.clip_grad) == (1.5e-4, 2)
    assert (base.training.base_lr, base.training.clip_grad) == (1e-3, None)


def test_alone_it_has_the_identity_of_a_recipe_of_its_own() -> None:
    made = family(f"{{s: {SMALL}, b: {{}}}}")
    assert made.alone("s").identity() == load_recipe("distill/s_from_b").identity()
    assert made.alone("b").identity() == load_recipe("distill/b_from_b").identity()
    assert made.alone("s").run.folder == Path("runs/mvd_b_from_b/students/s")
    assert list(made.each_student()) == ["s", "b"]
    single = load_recipe("distill/b_from_b")
    assert single.each_student() == {"": single}


def test_the_resolved_recipe_says_everything() -> None:
    made = family(f"{{s: {SMALL}, b: {{}}}}")
    again = Recipe.model_validate(yaml.safe_load(made.to_yaml()))
    assert again == made
    assert again.identity() == made.identity()
    assert made.identity()["students.s.model.width"] == 384
    # A target that is left out, a shape and a null stay what they are.
    own = "{model: {width: 64, depth: 2, heads: 2}, targets: {image: null}, training: {clip_grad: null}}"
    other = family(f"{{t: {own}}}", "--training.clip_grad", "1", "--targets.video.decoder.depth", "3")
    assert Recipe.model_validate(yaml.safe_load(other.to_yaml())) == other
    # What no student takes from the recipe is no part of the run.
    assert "model.width" not in made.identity()


def test_an_override_of_the_resolved_recipe_reaches_students_that_name_no_value(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(family("{s: {training: {base_lr: 5e-4}}, b: {}}").to_yaml())
    made = load_recipe(str(file), ["--training.base_lr", "1e-3", "--training.max_steps", "7"])
    assert {name: one.training.base_lr for name, one in made.students.items()} == {"s": 5e-4, "b": 1e-3}
    assert {one.training.max_steps for one in made.students.values()} == {7}


def test_identity_leaves_out_of_a_student_what_it_leaves_out_of_a_recipe() -> None:
    words = ("--training.deepspeed", "zero2", "--training.micro_batch", "4", "--targets.image.checkpoint", "other.pth")
    assert family("{b: {}}", *words).identity() == family("{b: {}}").identity()
    assert family("{b: {training: {base_lr: 1e-3}}}").identity() != family("{b: {}}").identity()


def test_a_shape_and_a_size_replace_each_other() -> None:
    shape = "{width: 64, depth: 2, heads: 2}"
    assert family(f"{{t: {{model: {shape}}}}}").students["t"].model.size is None
    shallow = family("{t: {model: {depth: 6}}}").students["t"].model
    assert (shallow.size, shallow.width, shallow.depth, shallow.heads) == (None, 768, 6, 12)
    tiny = {**yaml.safe_load(family("{t: {}}").to_yaml()), "students": {"s": {"model": {"size": "S"}}}}
    tiny["model"] |= {"size": None, **yaml.safe_load(shape)}
    assert Recipe.model_validate(tiny).students["s"].model.depth == 12


def test_a_mask_of_its_own_is_that_of_the_student_alone() -> None:
    made = family("{s: {data: {mask: {ratio: 0.75}}}, b: {}}", "--data.mask.decode_ratio", "0.5")
    assert made.own_masks == {"s": MaskConfig(ratio=0.75, decode_ratio=0.5)}
    assert made.shared_tokens == made.tokens == 1568
    assert family("{s: {}, b: {}}").own_masks == {}
    assert family("{s: {}, b: {}}").shared_tokens is None
    alone = load_recipe("distill/b_from_b", ["--data.mask.ratio", "0.75", "--data.mask.decode_ratio", "0.5"])
    assert made.alone("s").identity() == alone.identity()
    assert made.alone("s").visible_tokens == 392
    assert made.identity() != family("{s: {}, b: {}}", "--data.mask.decode_ratio", "0.5").identity()
    again = load_yaml(made)
    assert again == made
    # What a student does not name follows the recipe.
    assert made.model_dump()["students"]["b"]["data"]["mask"]["decode_ratio"] == 0.5
    assert yaml.safe_load(made.to_yaml())["students"]["b"]["data"] == {}


def load_yaml(made: Recipe) -> Recipe:
    return Recipe.model_validate(yaml.safe_load(made.to_yaml()))


def test_masks_that_would_change_the_augmentation_are_refused() -> None:
    jitter = ("--data.augment.color_jitter", "{}")
    assert family("{s: {data: {mask: {ratio: 0.5}}}}", *jitter).own_masks
    assert family("{s: {data: {mask: {kind: random}}}}").own_masks
    for mask in ("{kind: random}", "{decode_ratio: 0.5}"):
        with pytest.raises(UserError, match=r"students\.s\.data\.mask is of another kind than data\.mask"):
            family(f"{{s: {{data: {{mask: {mask}}}}}}}", *jitter)


def test_a_null_student_and_a_null_target_are_left_out() -> None:
    made = load_recipe("distill/sb_from_b", ["--students.s", "null", "--students.b.targets.image", "null"])
    assert list(made.students) == ["b"]
    assert list(made.students["b"].targets) == ["video"]


REFUSED = {
    "{s: {model: {frames: 8}}}": r"students\.s\.model\.frames is 8, but all students of a recipe share",
    "{s: {model: {patch_size: 32}}}": r"students\.s\.model\.patch_size is 32",
    "{s: {training: {epochs: 3}}}": r"students\.s\.training\.epochs is 3",
    "{s: {training: {global_batch: 64}}}": r"students\.s\.training\.global_batch is 64",
    "{s: {training: {precision: bf16}}}": r"students\.s\.training\.precision is 'bf16'",
    "{s: {targets: {image: {norm: true}}}}": r"students\.s\.targets\.image\.norm is True",
    "{s: {targets: {image: {checkpoint: a.pth}}}}": r"students\.s\.targets\.image\.checkpoint is PosixPath\('a\.pth'\)",
    "{s: {data: {stride: 2}}}": r"students\.s\.data\.stride: unknown key",
    "{s: {data: {mask: null}}}": r"students\.s: targets\.image\.tokens is masked, but without data\.mask",
    "{s: {model: {sizes: S}}}": r"students\.s\.model\.sizes: unknown key",
    "{s: {targets: {image: {decoders: 3}}}}": r"students\.s\.targets\.image\.decoders: unknown key",
    "{s: {training: {min_lr: 1}}}": r"students\.s: training\.min_lr 1 must not exceed training\.base_lr",
    "{s: {targets: {image: {decoder: {width: 3}}}}}": r"students\.s: targets\.image\.decoder: width 3 is not",
    "{s: {targets: {image: null, video: null}}}": "a student needs at least one target",
    "{s: {targets: {more: {kind: pixels, decoder: {width: 384, depth: 1, heads: 6}}}}}": "more is no target of the rec",
    "{1s: {}}": r"students\.1s: the name of a student must consist of letters",
    "{s: 3}": r"students\.s: Input should be",
}


@pytest.mark.parametrize("students", REFUSED)
def test_a_key_that_is_unknown_or_contradicts_the_recipe_is_refused(students: str) -> None:
    with pytest.raises(UserError, match=REFUSED[students]):
        family(students)


def test_a_changed_recipe_changes_its_students() -> None:
    values: dict[str, Any] = {"micro_batch": 2}
    assert with_training(family("{b: {}}"), **values).alone("b").training.micro_batch == 2
