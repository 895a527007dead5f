"""Cases of files as people have them: folders of small inputs with their right answers.

`MVD_CASES_DIR` names the folder that holds them. Its README describes the forms, which are keys of `case.json`. A test
runs every case of its form, and knows none by name.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(os.environ.get("MVD_CASES_DIR") or Path(__file__).resolve().parents[3] / "shared" / "cases")


def cases(form: str) -> list[Any]:
    """Parameters (folder, content of `case.json`) of all cases of a form; one that is skipped if there are none."""
    read = (
        (file.parent, json.loads(file.read_text(encoding="utf-8")))
        for file in sorted(FOLDER.resolve().glob("*/case.json"))
    )
    found = [pytest.param(folder, case, id=folder.name) for folder, case in read if form in case]
    reason = f"no cases with {form} in {FOLDER}; set MVD_CASES_DIR"
    return found or [pytest.param(None, None, id="absent", marks=pytest.mark.skip(reason=reason))]
