"""YAML -> mapping, dotted overrides laid over it, and faults in words."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import ValidationError

from mvd_scale.errors import UserError


def read_mapping(raw: bytes, source: str, expected: str) -> dict[str, Any]:
    """The mapping that a YAML file holds; `source` names it in messages.

    Raises:
        UserError: it is no text, no YAML, or no mapping; `expected` says of what.
    """
    try:
        values = _unshared(yaml.safe_load(raw.decode()))
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not a text file: expected YAML with {expected}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a mapping with {expected}")
    return values


def parse_overrides(words: list[str]) -> list[tuple[list[str], Any]]:
    """Keys and values of command-line words such as `--training.epochs 3` or `--training.epochs=3`."""
    pairs = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"unexpected argument {word!r}: overrides look like `--training.epochs 3`")
        key, equals, value = word[2:].partition("=")
        if not equals:
            following = next(rest, None)
            if following is None:
                raise UserError(f"override --{key} has no value: write `--{key} VALUE`")
            value = following
        try:
            pairs.append((key.split("."), yaml.safe_load(value)))
        except yaml.YAMLError as error:
            raise UserError(f"override --{key}: {value!r} is not a YAML value: {error}") from error
    return pairs


def set_value(values: dict[str, Any], key: list[str], value: Any) -> None:
    """Lay a value over what stands at a key: a mapping merges into a mapping, anything else replaces."""
    *parents, last = key
    for depth, parent in enumerate(parents):
        child = values.get(parent)
        if child is None:
            child = values[parent] = {}
        elif not isinstance(child, dict):
            raise UserError(f"override --{'.'.join(key)}: {'.'.join(key[: depth + 1])} is {child!r}, not a section")
        values = child
    if isinstance(value, dict) and isinstance(values.get(last), dict):
        for name, inner in value.items():
            set_value(values[last], [str(name)], inner)
    else:
        values[last] = value


def _without_tags(parts: list[str]) -> list[str]:
    """A key as it is written: pydantic adds the kind of a target, crop or stage behind its name."""
    if len(parts) > 3 and (parts[0] in ("targets", "stages") or parts[:2] == ["data", "crop"]):
        del parts[2]
    return parts


def describe(error: ValidationError) -> str:
    """A line for every fault: its key and what was expected."""
    lines = []
    for fault in error.errors():
        key = ".".join(_without_tags([str(part) for part in fault["loc"]])) or "recipe"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "unknown key; see `mvd-scale schema` for all keys"
        elif fault["type"] == "missing":
            message = "missing"
        elif not isinstance(fault["input"], dict):
            message = f"{message}, got {fault['input']!r}"
        lines.append(f"  {key}: {message}")
    return "\n".join(lines)


def _unshared(value: Any) -> Any:
    """A copy in which what an anchor of YAML put in several places can be changed in one of them."""
    return {key: _unshared(inner) for key, inner in value.items()} if isinstance(value, dict) else value
