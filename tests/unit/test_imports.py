"""Direction of imports: a package imports only from the layers below its own, and modules form no cycle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS = (
    {"errors"},
    {"config"},
    {"utils"},
    {"distributed"},
    {"models"},
    {"checkpoints", "data"},
    {"run_dir"},
    {"elastic", "evaluation", "targets"},
    {"visualization"},
    {"analysis", "training"},
    {"detection", "performance", "pipelines", "run_status"},
    {"doctor", "reproduction", "run_report"},
    {"cli"},
)
"""Packages and modules of `mvd_scale`, from the lowest layer up. Packages of one layer do not import each other."""

LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

LAZY = {"mvd_scale": {"mvd_scale.checkpoints.hub", "mvd_scale.evaluation.predict"}}
"""Imports that a module executes only at the first access to one of its attributes."""

MOST_FILES = 16
"""Largest number of modules in a package without sub-packages."""


def modules() -> dict[str, Path]:
    """Collect the paths of all modules of the repository by dotted name."""
    paths = {}
    for root in (ROOT, ROOT / "kernels"):
        for package in ("mvd_scale", "mvd_kernels"):
            for path in (root / package).rglob("*.py"):
                paths[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    return paths


MODULES = modules()


def imports(module: str) -> Iterator[str]:
    """Yield the modules of the repository that a module imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in MODULES:
                    yield name
                elif node.module in MODULES:
                    yield node.module


EDGES = {module: set(imports(module)) - LAZY.get(module, set()) for module in MODULES}


def test_every_package_has_a_layer() -> None:
    parts = {name.split(".")[1] for name in MODULES if name.startswith("mvd_scale.")}
    assert parts - {"__main__", "ds_configs"} == set(LAYER)


def test_imports_point_to_lower_layers() -> None:
    upward = [
        f"{module} imports {imported}"
        for module, below in EDGES.items()
        for imported in below
        if (importer := module.split(".")[1:2]) and (target := imported.split(".")[1:2])
        if importer != target and importer[0] in LAYER and target[0] in LAYER
        if LAYER[target[0]] >= LAYER[importer[0]]
    ]
    assert not upward, "\n".join(upward)


def test_kernels_do_not_import_mvd_scale() -> None:
    assert not [
        (module, imported)
        for module, below in EDGES.items()
        for imported in below
        if module.startswith("mvd_kernels") and imported.startswith("mvd_scale")
    ]


def test_modules_form_no_import_cycle() -> None:
    # Self-references are dropped: a package whose `__init__` re-exports names of its modules imports itself.
    edges = {module: {other for other in below if other != module} for module, below in EDGES.items()}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_large_packages_have_sub_packages() -> None:
    too_large = []
    for module, path in MODULES.items():
        folder = path.parent
        if (
            path.name == "__init__.py"
            and not list(folder.glob("*/__init__.py"))
            and len(list(folder.glob("*.py"))) > MOST_FILES
        ):
            too_large.append(module)
    assert not too_large
