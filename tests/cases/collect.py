"""Cases of files and lists as people have them: a folder each, with its inputs and `case.json`, the right answers.

The cases are read from the folder that `MVD_CASES_DIR` names. The tests know forms of cases, the keys of `case.json`,
and no case by its name.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("MVD_CASES_DIR") or Path(__file__).resolve().parents[3] / "shared" / "cases")


def cases(form: str) -> list[pytest.param]:  # type: ignore[valid-type]
    """Parameters `(folder, case)` for every case of a form; one that is skipped if there is none."""
    found = []
    for file in sorted(FOLDER.glob("*/case.json")):
        case = json.loads(file.read_text(encoding="utf-8"))
        if form in case:
            found.append(pytest.param(file.parent, case, id=file.parent.name))
    absent = pytest.mark.skip(reason=f"no cases of the form {form!r} in {FOLDER}; set MVD_CASES_DIR")
    return found or [pytest.param(None, None, marks=absent, id="absent")]
