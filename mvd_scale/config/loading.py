"""Loading of recipes: YAML file -> merge over its base recipe -> dotted overrides -> typed schema."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from mvd_scale.config.detection import DetectionRecipe
from mvd_scale.config.finetune import FinetuneRecipe
from mvd_scale.config.reading import format_validation_error, parse_overrides, parse_yaml_mapping, set_by_path
from mvd_scale.config.recipe import Recipe, RunRecipe
from mvd_scale.errors import UserError


def list_recipes() -> dict[str, str]:
    """Names of the shipped recipes, each with the first line of its header comment."""
    root = resources.files("mvd_scale") / "recipes"
    found = {}
    for folder in sorted(root.iterdir(), key=lambda entry: entry.name):
        if folder.is_dir():
            for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
                if file.name.endswith(".yaml"):
                    name = f"{folder.name}/{file.name.removesuffix('.yaml')}"
                    found[name] = file.read_text().splitlines()[0].lstrip("# ")
    return found


def load_recipe(name_or_path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a pre-training recipe by its shipped name or its path, and apply dotted overrides.

    Args:
        name_or_path: a name of `list_recipes`, or the path of a YAML file. The file is merged over the recipe that its
            `base:` names.
        overrides: command-line words such as `--training.epochs 3` or `--training.epochs=3`, with values in YAML; the
            last value of a key wins. A mapping is merged into the existing mapping, any other value replaces it.

    Raises:
        UserError: the recipe does not exist, is not valid YAML, or does not match the schema; the message names all
            faults.
    """
    return _load(Recipe, name_or_path, overrides)


def load_finetune_recipe(name_or_path: str | Path, overrides: list[str] | None = None) -> FinetuneRecipe:
    """Read a fine-tuning recipe; arguments and exceptions as `load_recipe`."""
    return _load(FinetuneRecipe, name_or_path, overrides)


def load_detection_recipe(name_or_path: str | Path, overrides: list[str] | None = None) -> DetectionRecipe:
    """Read a recipe of action detection; arguments and exceptions as `load_recipe`."""
    return _load(DetectionRecipe, name_or_path, overrides)


def load_any_recipe(name_or_path: str | Path) -> RunRecipe:
    """Read a recipe of any kind, without overrides; exceptions as `load_recipe`."""
    source, values = _read(name_or_path, ())
    return _validated(_kind_of(values), values, source)


def recipe_from_dict(values: dict[str, Any], source: str) -> Recipe:
    """Build a pre-training recipe from the mapping that a YAML file would hold; `source` names it in messages.

    Raises:
        UserError: as `load_recipe`.
    """
    return _of(Recipe, values, source)


def finetune_recipe_from_dict(values: dict[str, Any], source: str) -> FinetuneRecipe:
    """Build a fine-tuning recipe from a mapping; arguments and exceptions as `recipe_from_dict`."""
    return _of(FinetuneRecipe, values, source)


Kind = TypeVar("Kind", bound=RunRecipe)


def _of(kind: type[Kind], values: dict[str, Any], source: str) -> Kind:
    whole = _with_base(values, source, None, ())
    _check_kind(kind, whole, source)
    return _validated(kind, whole, source)


def _load(kind: type[Kind], name_or_path: str | Path, overrides: list[str] | None) -> Kind:
    source, values = _read(name_or_path, ())
    # The kind is that of the file: a key on the command line must not change it.
    _check_kind(kind, values, source)
    for key, value in parse_overrides(overrides or []):
        set_by_path(values, key, value)
    return _validated(kind, values, source)


_KINDS: dict[type[RunRecipe], tuple[str, str]] = {
    Recipe: ("pre-trains", "pretrain"),
    FinetuneRecipe: ("fine-tunes", "finetune"),
    DetectionRecipe: ("detects actions", "detect train"),
}
"""For each kind of recipe, the verb that says what it does, and the command that starts it."""


def _kind_of(values: dict[str, Any]) -> type[RunRecipe]:
    if "detector" in values:
        return DetectionRecipe
    return FinetuneRecipe if "classifier" in values else Recipe


def _check_kind(kind: type[RunRecipe], values: dict[str, Any], source: str) -> None:
    if _kind_of(values) is not kind:
        does, command = _KINDS[_kind_of(values)]
        raise UserError(f"the recipe {source} {does}: start it with `mvd-scale {command}`, or choose another recipe")


def _validated(kind: type[Kind], values: dict[str, Any], source: str) -> Kind:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"the recipe {source} is not valid:\n{format_validation_error(error)}") from error


def _read(name_or_path: str | Path, above: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    source, path = str(name_or_path), Path(name_or_path)
    if source in above:
        raise UserError(f"{' -> '.join([*above, source])}: a recipe cannot be its own base")
    expected = "sections such as `model:` and `training:`"
    if path.is_file():
        return source, _with_base(parse_yaml_mapping(path.read_bytes(), source, expected), source, path.parent, above)
    known = list_recipes()
    if source not in known:
        raise UserError(f"no recipe {source!r}: give the path of a YAML file or one of {', '.join(known)}")
    shipped = resources.files("mvd_scale") / "recipes" / f"{source}.yaml"
    return source, _with_base(parse_yaml_mapping(shipped.read_bytes(), source, expected), source, None, above)


def _with_base(values: dict[str, Any], source: str, folder: Path | None, above: tuple[str, ...]) -> dict[str, Any]:
    """Merge a recipe over the one that its `base:` names, which is merged over its own base first, and so on."""
    base = values.get("base")
    own = {key: value for key, value in values.items() if key != "base"}
    if base is None:
        return own
    if not isinstance(base, str):
        raise UserError(f"{source}: base is {base!r}, expected the name or path of a recipe")
    # A path relative to the file itself takes precedence over a shipped name, and over the working directory.
    beside = folder / base if folder is not None else None
    _, merged = _read(beside if beside is not None and beside.is_file() else base, (*above, source))
    for key, value in own.items():
        set_by_path(merged, [str(key)], value)
    return merged
