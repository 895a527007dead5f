"""`python -m mvd_scale.performance.bringup`: the command line of the bring-up. Needs the standard library only."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mvd_scale.performance.bringup.runner import Runner, Settings
from mvd_scale.performance.bringup.stages import STAGES, budgets, choose_stages


def parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    listed = "; ".join(f"{stage.letter}: {stage.title.lower()}" for stage in STAGES)
    made = argparse.ArgumentParser("gpu_bringup.sh", description=f"Check a machine with a GPU in stages. {listed}.")
    made.add_argument("--out", type=Path, default=Path("gpu_bringup"), metavar="FOLDER", help="folder of the results")
    made.add_argument("--stages", metavar="LETTERS", help="stages to run, such as abc (default: all)")
    minutes = sum(budgets(STAGES, None)) / 60
    made.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help=f"time for the chosen stages (default: {minutes:.0f} for all of them)",
    )
    made.add_argument("--wheels", type=Path, metavar="FOLDER", help="folder of wheels to install for this run only")
    made.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run with small sizes (default: cuda)"
    )
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Run the stages and return the exit code: 0 without faults, 1 with, 2 for wrong arguments."""
    options = parser().parse_args(words)
    try:
        stages = choose_stages(options.stages)
    except ValueError as error:
        parser().error(str(error))
    if options.minutes is not None and options.minutes <= 0:
        parser().error(f"--minutes {options.minutes:g}: expected a number above 0")
    with tempfile.TemporaryDirectory(prefix="mvd_wheels_") as site:
        paths = [] if options.wheels is None else [install(options.wheels, Path(site))]
        results = Runner(stages, Settings(options.out, options.device, options.minutes, tuple(paths))).run()
    print(f"{results.faults} faults; results: {options.out / 'bringup.md'}")
    return 1 if results.faults else 0


def install(wheels: Path, site: Path) -> str:
    """Install all wheels of a folder into the folder `site`, without their requirements, and return its path."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        parser().error(f"--wheels {wheels}: expected a folder with files *.whl")
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-index", "--no-deps"]
    if subprocess.run([*pip, "--no-compile", "--no-cache-dir", "--target", str(site), *files], check=False).returncode:
        parser().error(
            f"--wheels {wheels}: pip cannot install them: expected one wheel of each package, for this Python"
        )
    return str(site)


if __name__ == "__main__":
    sys.exit(main())
