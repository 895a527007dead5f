"""Run commands of mvd-scale and pieces of Python one after the other in one process, and say how each ended.

    python -m tests.docs.run_session < steps.json > results.json

One process, since importing torch and DeepSpeed takes longer than most of the commands.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from glob import glob
from typing import Any

from mvd_scale.cli import cli
from mvd_scale.logs import configure


def run(words: list[str]) -> None:
    """One command as a shell would start it, with `*` expanded."""
    expanded = [path for word in words for path in ((sorted(glob(word)) or [word]) if "*" in word else [word])]
    sys.argv = ["mvd-scale", *expanded]
    cli.main(args=expanded, prog_name="mvd-scale", standalone_mode=False)


def attempt(step: dict[str, Any]) -> str:
    """What went wrong in a step; empty if nothing did."""
    environment = dict(os.environ)
    try:
        if step["kind"] == "python":
            exec(compile(step["text"], "block", "exec"), {})
        else:
            run(step["words"])
    except BaseException:
        return traceback.format_exc()
    finally:
        # A command that joined the ranks of a job alone leaves their variables behind.
        os.environ.clear()
        os.environ.update(environment)
    return ""


def main() -> None:
    steps = json.load(sys.stdin)
    configure()
    results = []
    for step in steps:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            fault = attempt(step)
        results.append({"fault": fault, "output": said.getvalue()})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
