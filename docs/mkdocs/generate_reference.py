"""MkDocs hook: the reference pages, written from the code while the site is built.

Keys of recipes come from the pydantic schema, commands from click, recipes from their heads. Pages of the repository
that belong to the site but lie outside `docs/` are taken in as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mvd_scale.cli import cli
from mvd_scale.config import DetectionRecipe, FinetuneRecipe, Recipe, list_recipes
from mvd_scale.config.pipeline import Pipeline
from mvd_scale.config.reproduction import Scale
from mvd_scale.config.students import StudentConfig

REPOSITORY = Path(__file__).resolve().parents[2]

INCLUDED = {
    "guides/deepspeed.md": "ds_configs/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages of the site by the files of the repository that they are."""

SCHEMAS: dict[str, tuple[type[BaseModel], str]] = {
    "pretrain": (Recipe, "`mvd-scale pretrain`, `plan`, `profile` and `bench step`"),
    "finetune": (FinetuneRecipe, "`mvd-scale finetune`"),
    "detect": (DetectionRecipe, "`mvd-scale detect train`"),
    "pipeline": (Pipeline, "`mvd-scale pipeline`"),
    "scale": (Scale, "`mvd-scale reproduce`"),
}
"""Schemas by the page that describes them, and the command that reads them."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those of `docs/`."""
    pages = {page: (REPOSITORY / source).read_text() for page, source in INCLUDED.items()}
    pages["reference/commands.md"] = commands_page()
    pages["reference/recipes.md"] = recipes_page()
    for name, (schema, command) in SCHEMAS.items():
        pages[f"reference/{name}.md"] = schema_page(name, schema, command)
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between the repository's own files at the pages that those files are in the site."""
    inside = page.file.src_uri
    here = REPOSITORY / INCLUDED[inside] if inside in INCLUDED else REPOSITORY / "docs" / inside
    pages = {(REPOSITORY / source).resolve(): target for target, source in INCLUDED.items()}

    def site_link(match: re.Match[str]) -> str:
        target = (here.parent / match[1]).resolve()
        name = pages.get(target) or (
            target.relative_to(REPOSITORY / "docs").as_posix() if target.is_relative_to(REPOSITORY / "docs") else None
        )
        if name is None:
            return match[0]
        return f"]({'../' * inside.count('/')}{name}{match[2] or ''})"

    return re.sub(r"\]\(([\w./-]+\.md)(#[\w-]+)?\)", site_link, markdown)


# --- keys of recipes ---


def schema_page(name: str, schema: type[BaseModel], command: str) -> str:
    """A page with every key of a kind of recipe: type, default and meaning."""
    lines = [
        f"# Keys of {f'a {name}' if name in ('pipeline', 'scale') else name}",
        "",
        f"Read by {command}. Generated from the schema, which `mvd-scale schema {name}` prints as JSON Schema. "
        f"Each key is set in YAML or on the command line by its dotted name.",
        "",
    ]
    for section, rows in sections(schema):
        lines += [f"## {section}", "", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def sections(schema: type[BaseModel]) -> Iterator[tuple[str, list[str]]]:
    """Headings of a schema and the rows of the table under each."""
    plain = []
    nested: list[tuple[str, FieldInfo]] = []
    for key, field in schema.model_fields.items():
        if models_of(field.annotation):
            nested.append((key, field))
        else:
            plain.append(row(key, field))
    if plain:
        yield "Top level", plain
    seen: set[str] = set()
    for key, field in nested:
        for heading, rows in _nested(key, field):
            # Kinds of one section share some of its parts, such as the decoder of targets.
            if heading not in seen:
                yield heading, rows
            seen.add(heading)


def _nested(prefix: str, field: FieldInfo) -> Iterator[tuple[str, list[str]]]:
    models = models_of(field.annotation)
    if is_mapping(field.annotation):
        prefix = f"{prefix}.NAME"
    for model in models:
        kind = model.model_fields.get("kind")
        heading = f"`{prefix}`"
        if len(models) > 1 and kind is not None:
            heading += f" of kind `{get_args(kind.annotation)[0]}`"
        rows = [f"| `{prefix}` | section{_or_null(field)} | {default(field)} | {cell(model.__doc__)} |"]
        deeper = []
        for key, inner in model.model_fields.items():
            if model is StudentConfig:
                # Its sections have the keys of the recipe's own, and their values.
                rows.append(f"| `{prefix}.{key}` | section | the recipe's | {cell(inner.description)} |")
            elif models_of(inner.annotation):
                deeper.append((f"{prefix}.{key}", inner))
            else:
                rows.append(row(f"{prefix}.{key}", inner))
        yield heading, rows
        for key, inner in deeper:
            yield from _nested(key, inner)


def _or_null(field: FieldInfo) -> str:
    return " or null" if type(None) in flatten(field.annotation) else ""


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a value may be, without repetition."""
    found = [part for part in flatten(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
    return list(dict.fromkeys(found))


def is_mapping(annotation: Any) -> bool:
    """Whether a value is a mapping of names to sections."""
    return any(get_origin(part) is dict for part in _members(annotation))


def flatten(annotation: Any) -> list[Any]:
    """The plain types that an annotation is made of."""
    found: list[Any] = []
    for part in _members(annotation):
        if get_origin(part) is dict:
            found += flatten(get_args(part)[1])
        else:
            found.append(part)
    return found


def _members(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def row(key: str, field: FieldInfo) -> str:
    """The line of a table for one key."""
    return f"| `{key}` | {type_text(field)} | {default(field)} | {cell(field.description)} |"


def type_text(field: FieldInfo) -> str:
    """A type in the words of a recipe's author, with its bounds."""
    words = [_type_word(part) for part in _members(field.annotation)]
    limits = [
        f"{sign} {getattr(rule, attribute):g}"
        for rule in field.metadata
        for attribute, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if getattr(rule, attribute, None) is not None
    ]
    text = " or ".join(dict.fromkeys(words))
    return f"{text}, {' and '.join(limits)}" if limits else text


def _type_word(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        inner = [_type_word(_members(part)[0]) for part in arguments if part is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in arguments else f"{len(inner)} x {inner[0]}"
    if origin is list:
        return f"list of {_type_word(arguments[0])}"
    if origin is dict:
        return "mapping"
    names = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "Path": "path"}
    return names.get(getattr(annotation, "__name__", ""), "value")


def default(field: FieldInfo) -> str:
    """A default as one writes it in YAML; `required` where there is none."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "as below"
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return f"`{words[value]}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(f'{item:.4g}' if isinstance(item, float) else str(item) for item in value)}]`"
    return f"`{value}`" if value != "" else "empty"


def cell(text: str | None) -> str:
    """A text that fits into one cell of a table."""
    return " ".join((text or "").split()).replace("|", "\\|")


# --- commands ---


def commands_page() -> str:
    """A page with every command, its arguments and its options."""
    lines = [
        "# Commands",
        "",
        "Generated from the program. `--help` of any command prints the same; `--debug`, anywhere on a line, adds the "
        "traceback of an error. Commands that end in `[OVERRIDES]...` take any key of the recipe by its dotted name.",
        "",
    ]
    for words, command in walk(["mvd-scale"], cli):
        lines += command_section(words, command)
    return "\n".join(lines)


def walk(words: list[str], command: click.Command) -> Iterator[tuple[list[str], click.Command]]:
    """All commands below one that do something themselves, with the words that call each."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from walk([*words, name], inner)
    else:
        yield words, command


def command_section(words: list[str], command: click.Command) -> list[str]:
    """Heading, usage, help and table of a command."""
    context = click.Context(command, info_name=" ".join(words))
    usage = " ".join([" ".join(words), *command.collect_usage_pieces(context)])
    lines = [f"## {' '.join(words)}", "", f"`{usage}`", "", *_paragraphs(command.help), ""]
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    if options:
        lines += ["| option | value | default | meaning |", "|---|---|---|---|"]
        lines += [_option_row(option, context) for option in options]
        lines.append("")
    return lines


def _paragraphs(text: str | None) -> list[str]:
    lines = [line.strip() for line in (text or "").splitlines()]
    # Options in code, as a dash may end a line; those in code already stand behind a backtick or within it.
    return [re.sub(r"(?<!\S)(--[\w.-]*\w)(?=[^`]*(?:`[^`]*`[^`]*)*$)", r"`\1`", line) for line in lines]


def _option_row(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    shown = option.get_default(context) if option.show_default else None
    standard = "required" if option.required else "" if shown is None else f"`{shown}`"
    return f"| {names} | {_option_value(option)} | {standard} | {cell(option.help)} |"


def _option_value(option: click.Option) -> str:
    if option.is_flag:
        return "flag"
    if isinstance(option.type, click.Choice):
        return ", ".join(f"`{choice}`" for choice in option.type.choices)
    if isinstance(option.type, (click.IntRange, click.FloatRange)):
        return f"{option.type.name.removesuffix(' range')}, {_limits(option.type)}"
    return option.metavar or option.type.name


def _limits(bounds: click.IntRange | click.FloatRange) -> str:
    texts = []
    if bounds.min is not None:
        texts.append(f"{'>' if bounds.min_open else '≥'} {bounds.min:g}")
    if bounds.max is not None:
        texts.append(f"{'<' if bounds.max_open else '≤'} {bounds.max:g}")
    return " and ".join(texts)


# --- recipes ---


def recipes_page() -> str:
    """A page with every recipe that comes with the package, by folder, from the head of its file."""
    lines = ["# Recipes", "", "Generated from the heads of the files. Each head also names the command.", ""]
    root = resources.files("mvd_scale") / "recipes"
    folder = ""
    for name in list_recipes():
        if name.split("/")[0] != folder:
            folder = name.split("/")[0]
            lines += ["", f"## {folder}", "", "| recipe | does | hardware | published |", "|---|---|---|---|"]
        head = read_head((root / f"{name}.yaml").read_text())
        cells = [cell(head.get(key, "")) for key in ("title", "hardware", "published")]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def read_head(text: str) -> dict[str, str]:
    """The fields of the comment that a recipe begins with."""
    fields: dict[str, str] = {"title": ""}
    current = "title"
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        body = line.lstrip("#")
        found = re.match(r" (command|test|hardware|time|published|note)\s+(.*)", body)
        if found:
            current, body = found[1], found[2]
        fields[current] = f"{fields.get(current, '')} {body.strip()}".strip()
    return fields
