"""The process of one stage.

python -m mvd_scale.performance.bringup.worker ARGUMENTS    # JSON of `Arguments`
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from mvd_scale.performance.bringup.session import Arguments, LeftOut, Session


def main(words: Sequence[str]) -> None:
    """Make the checks of a stage."""
    values = json.loads(words[0])
    arguments = Arguments(**{**values, "needs": tuple(values["needs"]), "done": tuple(values["done"])})
    session = Session(arguments)
    try:
        refuse(arguments)
        try:
            stage = importlib.import_module(arguments.module)
        except ImportError as error:
            raise LeftOut(f"{arguments.module} cannot be imported: {error}") from error
        stage.run(session)
    except LeftOut as reason:
        session.tell("left out", reason=str(reason))
    session.tell("done")


def refuse(arguments: Arguments) -> None:
    """Check that the stage can run here.

    Raises:
        LeftOut: a package is missing, or there is no GPU.
    """
    if missing := [package for package in ("torch", "numpy", *arguments.needs) if not _installed(package)]:
        raise LeftOut(f"not installed: {', '.join(missing)}; docs/gpu_status.md says which wheels to carry")
    if arguments.needs_gpu and arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise LeftOut("torch finds no GPU; `--device cpu` makes a dry run")


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    # The parent of a dotted name is imported, which may be absent or broken.
    except ImportError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
