"""Tests of the wheel: installed alone, it lists its recipes and reads its DeepSpeed files from any folder."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

LOOK = """
import json, sys
sys.path.insert(0, sys.argv[1])
# The import path of the editable installation is removed: the package must come from the wheel.
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]
from importlib import metadata, resources
import mvd_kernels, mvd_scale
from mvd_scale.config import list_recipes
(distribution,) = metadata.distributions(name="mvd-scale", path=[sys.argv[1]])
print(json.dumps({
    "files": [mvd_scale.__file__, mvd_kernels.__file__],
    "recipes": sorted(list_recipes()),
    "deepspeed": {
        entry.name: json.loads(entry.read_text())
        for entry in resources.files("mvd_scale.ds_configs").iterdir() if entry.name.endswith(".json")
    },
    "pages": sorted(
        entry.name for entry in resources.files("mvd_scale.visualization").iterdir() if entry.name.endswith(".html")
    ),
    "scripts": {script.name: script.value for script in distribution.entry_points},
    "version": [distribution.version, mvd_scale.__version__],
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that holds only the contents of the wheel."""
    folder = tmp_path_factory.mktemp("packaging")
    source, wheels, target = folder / "source", folder / "wheels", folder / "target"
    # The wheel is built from a copy, so that the build leaves no files in the checkout.
    source.mkdir()
    for name in ("mvd_scale", "kernels", "ds_configs", "pyproject.toml", "README.md", "LICENSE"):
        run("cp", "-r", REPOSITORY / name, source, cwd=folder)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source, cwd=folder)
    (wheel,) = wheels.iterdir()
    run(*pip, "install", "--no-deps", "--target", target, wheel, cwd=folder)
    return target


@pytest.mark.slow
def test_wheel_carries_every_module_and_its_data(installed: Path) -> None:
    def files(root: Path) -> set[str]:
        patterns = ("*.py", "*.cpp", "*.yaml", "*.html")
        return {str(file.relative_to(root)) for pattern in patterns for file in root.rglob(pattern)}

    carried = files(installed / "mvd_scale")
    assert carried == files(REPOSITORY / "mvd_scale") | {"ds_configs/__init__.py"}
    assert {"reproduction/tables/table1.yaml", "reproduction/scales/full.yaml"} <= carried
    assert files(installed / "mvd_kernels") == files(REPOSITORY / "kernels" / "mvd_kernels")


@pytest.mark.slow
def test_wheel_works_from_any_folder(installed: Path, tmp_path: Path) -> None:
    seen = json.loads(run(sys.executable, "-c", LOOK, installed, cwd=tmp_path))
    assert all(Path(file).is_relative_to(installed) for file in seen["files"])
    recipes = REPOSITORY / "mvd_scale" / "recipes"
    assert seen["recipes"] == sorted(str(file.relative_to(recipes).with_suffix("")) for file in recipes.rglob("*.yaml"))
    assert seen["recipes"]
    assert seen["deepspeed"] == {
        file.name: json.loads(file.read_text()) for file in (REPOSITORY / "ds_configs").glob("*.json")
    }
    assert seen["pages"] == ["page.html", "report.html", "runs.html"]
    assert seen["scripts"] == {"mvd-scale": "mvd_scale.cli:main"}
    assert len(set(seen["version"])) == 1


def test_the_guide_names_the_lower_bounds_of_the_package() -> None:
    """CONTRIBUTING.md gives the reason of some lower bounds: they are those of pyproject.toml."""
    table = re.findall(r"^\| ([a-z0-9-]+)[^|]* \| ([0-9.]+) \| ", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.M)
    assert len(table) > 5
    bounds = set(re.findall(r'"([A-Za-z0-9-]+)>=([0-9.]+)', (REPOSITORY / "pyproject.toml").read_text()))
    assert set(table) <= bounds


DISTRIBUTIONS = {
    "decord": "decord2",
    "nvidia": "nvidia-dali-cuda130",
    "skimage": "scikit-image",
    "spdl": "spdl-io",
    "yaml": "pyyaml",
}
"""Distributions of imported packages, where their names differ."""

UNDECLARED = {"markupsafe", "PIL", "triton"} | {"apex", "flash_attn_interface", "torchao"}
"""Packages that come with jinja2, matplotlib and torch, and those that users build or choose themselves."""


def imported_packages() -> set[str]:
    """Names of all packages of others that ours import."""
    found = set()
    for root in (REPOSITORY / "mvd_scale", REPOSITORY / "kernels" / "mvd_kernels"):
        for path in root.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add(str(node.module).partition(".")[0])
    return found - sys.stdlib_module_names - {"mvd_scale", "mvd_kernels"}


def test_every_import_is_declared_and_mypy_skips_those_that_may_be_missing() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    project = settings["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^A-Za-z0-9-]", requirement)[0] for requirement in requirements}

    needed = names(project["dependencies"])
    extras = {extra: names(requirements) for extra, requirements in project["optional-dependencies"].items()}
    imported = {name: DISTRIBUTIONS.get(name, name).replace("_", "-") for name in imported_packages() - UNDECLARED}
    assert set(imported.values()) <= needed.union(*extras.values())
    assert {imported[name] for name in ("decord", "spdl", "torchcodec", "torchvision")} <= extras["bench"]
    overrides = settings["tool"]["mypy"]["overrides"]
    skipped = {name.partition(".")[0] for override in overrides for name in override["module"]}
    present = needed | extras["dev"] | extras["samples"]  # by docs/guides/installation.md
    assert {name for name, distribution in imported.items() if distribution not in present} <= skipped
