"""Lists as people have them: the right rows, or one message that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mvd_scale.data.manifest import Manifest
from tests.fork_server import ForkServer

from .collect import cases


@pytest.mark.parametrize(("folder", "case"), cases("lists"))
def test_a_list_is_read_or_named(
    folder: Path, case: dict[str, Any], fork_server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for number, listed in enumerate(case["lists"]):
        out = tmp_path / f"{number}.parquet"
        code, printed = fork_server.run("mvd_scale", "data", "index", *listed["arguments"], "--out", out)
        assert "Traceback" not in printed, printed
        if code == 2 and "error" in listed:
            assert printed.count("mvd-scale: ") == 1, printed
            missing = [word for word in listed["error"] if word not in printed]
            assert not missing, printed
            continue
        assert code == 0, printed
        rows = listed.get("rows", listed.get("rows_or_error"))
        assert rows is not None or "labels" in listed, f"expected an error, got:\n{printed}"
        manifest = Manifest.load(out)
        if rows is not None:
            assert files_and_classes(manifest, folder) == [tuple(row) for row in rows], printed
        if "labels" in listed:
            assert manifest.label.tolist() == listed["labels"], printed
        assert set(manifest.left_out) == {None}, printed


def files_and_classes(manifest: Manifest, folder: Path) -> list[tuple[str, Any]]:
    """Path of each video from the case's folder, and its class by name or, where classes have none, by number."""
    labels: list[int] = manifest.label.tolist()
    classes = [manifest.classes[label] if manifest.classes and label >= 0 else label for label in labels]
    return [(str(Path(path).relative_to(folder)), known) for path, known in zip(manifest.path, classes, strict=True)]
