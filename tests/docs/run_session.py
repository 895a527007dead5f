"""Run commands of mvd-scale and pieces of Python one after the other, and say how each ended.

    python -m tests.docs.run_session < steps.json > results.json

Each step is a fork of this process, which has imported torch and DeepSpeed, as that takes longer than most commands.
Nothing else is done here before a fork, so that no thread of a library is lost in it.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import sys
import traceback
from glob import glob
from multiprocessing.connection import Connection
from typing import Any

import deepspeed  # noqa: F401
import torch  # noqa: F401

from mvd_scale.cli import cli
from mvd_scale.utils.logging import configure_logging


def run(words: list[str]) -> None:
    """One command as a shell would start it, with `*` expanded."""
    expanded = [path for word in words for path in ((sorted(glob(word)) or [word]) if "*" in word else [word])]
    sys.argv = ["mvd-scale", *expanded]
    cli.main(args=expanded, prog_name="mvd-scale", standalone_mode=False)


def answer(step: dict[str, Any], sender: Connection) -> None:
    """Run a step and send what it printed, and what went wrong; nothing if all went well."""
    said, fault = io.StringIO(), ""
    with contextlib.redirect_stdout(said):
        try:
            if step["kind"] == "python":
                exec(compile(step["text"], "block", "exec"), {})
            else:
                run(step["words"])
        except BaseException:
            fault = traceback.format_exc()
    sender.send({"fault": fault, "output": said.getvalue()})


def attempt(step: dict[str, Any]) -> dict[str, str]:
    """How a step ended in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(step, sender))
    process.start()
    sender.close()
    try:
        ending: dict[str, str] = receiver.recv()
    except EOFError:
        ending = {"fault": "the process ended without an answer", "output": ""}
    process.join()
    return ending


def main() -> None:
    steps = json.load(sys.stdin)
    configure_logging()
    json.dump([attempt(step) for step in steps], sys.stdout)


if __name__ == "__main__":
    main()
