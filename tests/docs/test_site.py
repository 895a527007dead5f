"""The site is built without a warning, the README is one page, and what the pages name is there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from mvd_scale import __version__
from mvd_scale.config import DetectionRecipe, FinetuneRecipe, Recipe
from mvd_scale.config.pipeline import Pipeline

from .pages import REPOSITORY, inline_code, pages

SCHEMAS: tuple[type[BaseModel], ...] = (Recipe, FinetuneRecipe, DetectionRecipe, Pipeline)

FILE_SUFFIXES = ("parquet", "html", "json", "jsonl", "csv", "yaml", "safetensors", "py", "sh", "txt", "pt2", "onnx")
"""Ends of names that look like keys and are files."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("mkdocs") is None or find_spec("material") is None:
        pytest.skip("the site needs MkDocs: pip install 'mvd-scale[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(
        [*command, "-f", str(REPOSITORY / "docs/mkdocs/mkdocs.yml")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


@pytest.mark.slow
def test_no_link_is_dead_and_the_reference_is_whole(site: Path) -> None:
    keys = (site / "reference/pretrain.html").read_text()
    for key in ("training.base_lr", "data.mask.ratio", "targets.NAME.distance", "data.crop.scales", "seed"):
        assert f"<code>{key}</code>" in keys, f"{key} is missing in the reference"
    commands = (site / "reference/commands.html").read_text()
    for words in ("mvd-scale pretrain", "mvd-scale data index", "mvd-scale bench compare"):
        assert words in commands
    assert "--tolerance" in commands
    assert "distill/h_from_h" in (site / "reference/recipes.html").read_text()


@pytest.mark.slow
def test_the_site_is_read_offline(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"?(https?://[^\s\">]+)", page.read_text())
        assert not loaded, f"{page.name} loads {loaded[0]}"


def test_the_readme_is_one_page() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


def test_the_picture_is_small() -> None:
    assert (REPOSITORY / "docs/assets/quickstart.png").stat().st_size < 150_000


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "ds_configs/README.md"])
def test_links_of_pages_outside_the_site(page: str) -> None:
    text = (REPOSITORY / page).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http://", "https://")):
            assert (REPOSITORY / page).parent.joinpath(target).exists(), f"{page}: {target} is not there"


@pytest.mark.parametrize("page", ["README.md", "docs/guides/installation.md"])
def test_every_extra_is_explained(page: str) -> None:
    project = (REPOSITORY / "pyproject.toml").read_text()
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[project")[0]
    extras = re.findall(r"^(\w+) = \[", section, flags=re.MULTILINE)
    assert "dev" in extras
    for extra in extras:
        assert f"| `{extra}` |" in (REPOSITORY / page).read_text(), f"{page} does not explain the extra {extra}"


def test_the_citation_names_this_version() -> None:
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == __version__


@pytest.mark.parametrize("page", [page for page in pages() if page != "CHANGELOG.md"])
def test_keys_that_a_page_names_exist(page: str) -> None:
    definitions = [schema.model_json_schema() for schema in SCHEMAS]
    sections = {name for definition in definitions for name in definition["properties"]}
    for code in inline_code(page):
        found = re.match(r"(?:--)?((\w+)(?:\.\w+)+)(?=$|[: =])", code)
        if not found or found[2] not in sections or found[1].rpartition(".")[2] in FILE_SUFFIXES:
            continue
        names = found[1].split(".")
        assert any(has_key(definition, definition, names) for definition in definitions), f"{page}: no key {found[1]}"


def has_key(schema: dict[str, Any], part: dict[str, Any], names: list[str]) -> bool:
    """Whether a part of a JSON schema has a dotted key, in any of its kinds."""
    if not names:
        return True
    if "$ref" in part:
        return has_key(schema, schema["$defs"][part["$ref"].rpartition("/")[2]], names)
    choices = [*part.get("anyOf", ()), *part.get("oneOf", ()), *part.get("allOf", ())]
    if any(has_key(schema, choice, names) for choice in choices):
        return True
    if isinstance(part.get("additionalProperties"), dict):
        return has_key(schema, part["additionalProperties"], names[1:])
    inner = part.get("properties", {}).get(names[0])
    return inner is not None and has_key(schema, inner, names[1:])


def test_the_picture_of_json_is_read() -> None:
    """A key that is not there is found: the test above can fail."""
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    assert has_key(schema, schema, ["training", "base_lr"])
    assert has_key(schema, schema, ["targets", "image", "distance"])
    assert not has_key(schema, schema, ["training", "base_rate"])


@pytest.mark.parametrize("page", [page for page in pages() if page != "CHANGELOG.md"])
def test_files_that_a_page_names_exist(page: str) -> None:
    roots = {folder.name: REPOSITORY for folder in REPOSITORY.iterdir() if folder.is_dir()}
    if page == "docs/architecture.md":
        # It names the rooms of the two packages without their own folders.
        for package in (REPOSITORY / "mvd_scale", REPOSITORY / "kernels/mvd_kernels"):
            roots |= {folder.name: package for folder in package.iterdir() if folder.is_dir()}
    for code in inline_code(page):
        found = re.fullmatch(r"([\w.]+)/[\w./-]*", code.removeprefix("./"))
        if found and found[1] in roots and "NAME" not in code and not code.startswith("build/"):
            assert (roots[found[1]] / code.removeprefix("./")).exists(), f"{page} names {code}, which is not there"
