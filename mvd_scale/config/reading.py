"""Reading of YAML mappings, dotted overrides, and validation errors as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from mvd_scale.errors import UserError


def parse_yaml_mapping(raw: bytes, source: str, expected: str) -> dict[str, Any]:
    """Parse a YAML file that holds a mapping.

    Args:
        raw: bytes of the file.
        source: name of the file in messages.
        expected: description of the expected keys in messages.

    Raises:
        UserError: the file is not text, is not valid YAML, or does not hold a mapping.
    """
    try:
        values = copy_mappings(yaml.safe_load(raw.decode()))
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not a text file: expected YAML with {expected}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a mapping with {expected}")
    return values


_MARKED = ("'", '"', "|", ">", "!", "&")
"""Characters with which YAML begins text that it is to read in its own way."""


def parse_overrides(words: list[str]) -> list[tuple[list[str], Any]]:
    """Parse command-line words such as `--training.epochs 3` or `--training.epochs=3` to keys and values.

    Raises:
        UserError: a word is not an override, has no value, or its value is not valid YAML.
    """
    pairs = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"unexpected argument {word!r}: expected overrides such as `--training.epochs 3`")
        key, equals, value = word[2:].partition("=")
        if not equals:
            following = next(rest, None)
            if following is None:
                raise UserError(f"override --{key} has no value: write `--{key} VALUE`")
            value = following
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"override --{key}: {value!r} is not a valid YAML value: {error}") from error
        # Text without quotes is what was typed: to YAML ` #` begins a comment, and a line break is a space.
        if isinstance(parsed, str) and value.lstrip()[:1] not in _MARKED:
            parsed = value.strip()
        pairs.append((key.split("."), parsed))
    return pairs


def set_by_path(values: dict[str, Any], key: list[str], value: Any) -> None:
    """Set the value at a dotted key: a mapping is merged into an existing mapping, any other value replaces it.

    Raises:
        UserError: a parent of the key is not a mapping.
    """
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
            set_by_path(values[last], [str(name)], inner)
    else:
        values[last] = value


def flatten_sections(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to values by dotted key; lists and empty sections stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten_sections(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _without_tags(parts: list[str]) -> list[str]:
    """Key as the user writes it, without the kind of a target, crop or stage that pydantic inserts after its name."""
    if len(parts) > 3 and (parts[0] in ("targets", "stages") or parts[:2] == ["data", "crop"]):
        del parts[2]
    elif len(parts) > 5 and parts[0] == "students" and parts[2] == "targets":
        del parts[4]
    return parts


def format_validation_error(error: ValidationError) -> str:
    """Format a validation error as text: one line per fault, with its key, what was expected, and what was given."""
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


def copy_mappings(value: Any) -> Any:
    """Copy nested mappings: YAML aliases share one object, and an override must change one place only."""
    return {key: copy_mappings(inner) for key, inner in value.items()} if isinstance(value, dict) else value
