"""Imports run one way: a package imports from the layers below its own, and no modules form a circle."""

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
    {"evaluation", "targets"},
    {"visualization"},
    {"training"},
    {"detection", "performance", "pipelines"},
    {"cli"},
)
"""Packages and modules of `mvd_scale`, from the lowest layer up. Those of one layer do not import each other."""

LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

LAZY = {"mvd_scale": {"mvd_scale.evaluation.predict"}}
"""Imports that a module makes only when one of its attributes is asked for."""

MOST_FILES = 16
"""Modules of a package without packages of its own."""


def modules() -> dict[str, Path]:
    """All modules of the repository by dotted name."""
    found = {}
    for root in (ROOT, ROOT / "kernels"):
        for package in ("mvd_scale", "mvd_kernels"):
            for path in (root / package).rglob("*.py"):
                found[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(module: str) -> Iterator[str]:
    """Modules of the repository that a module imports, at its top or inside of a function."""
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
        if (here := module.split(".")[1:2]) and (there := imported.split(".")[1:2])
        if here != there and here[0] in LAYER and there[0] in LAYER and LAYER[there[0]] >= LAYER[here[0]]
    ]
    assert not upward, "\n".join(upward)


def test_kernels_import_nothing_of_the_program() -> None:
    assert not [
        (module, imported)
        for module, below in EDGES.items()
        for imported in below
        if module.startswith("mvd_kernels") and imported.startswith("mvd_scale")
    ]


def test_no_modules_form_a_circle() -> None:
    # A package's `__init__` that gathers its modules' names is imported together with each of them by Python itself.
    edges = {module: {other for other in below if other != module} for module, below in EDGES.items()}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_packages_stay_small_or_have_packages_of_their_own() -> None:
    full = []
    for module, path in MODULES.items():
        folder = path.parent
        if (
            path.name == "__init__.py"
            and not list(folder.glob("*/__init__.py"))
            and len(list(folder.glob("*.py"))) > MOST_FILES
        ):
            full.append(module)
    assert not full
