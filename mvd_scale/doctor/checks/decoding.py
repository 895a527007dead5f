"""Decoding of a small video by DALI, compared with PyAV: `python -m mvd_scale.doctor.checks.decoding DEVICE`.

It runs in a process of its own, which a decoder or a full /dev/shm may kill. The check itself is that of the bring-up.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mvd_scale.doctor.findings import Finding, HostCheck

_SECONDS = 120.0
_NAME = "decoding"
_REMEDY = (
    "see `mvd-scale env` for DALI and NVDEC, and `python -m mvd_scale.doctor.checks.decoding cpu` for all that it says"
)


def decoding_checks(device: str) -> list[HostCheck]:
    """List the checks.

    Args:
        device: device of the ranks, `cuda` or `cpu`.
    """
    return [HostCheck("decoding", _NAME, lambda: decode(device), _SECONDS + 5, _REMEDY)]


def decode(device: str) -> Iterator[Finding]:
    """Decode a video in another process, and judge its frames."""
    command = [sys.executable, "-m", "mvd_scale.doctor.checks.decoding", device]
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        yield Finding(_NAME, "fail", f"the decoder does not end within {_SECONDS:g} s", _REMEDY)
        return
    if made.returncode:
        said = next(iter(reversed(made.stderr.strip().splitlines())), "it says nothing")
        how = f"signal {-made.returncode}" if made.returncode < 0 else f"code {made.returncode}"
        yield Finding(_NAME, "fail", f"the decoder ends by {how}: {said}", _REMEDY)
        return
    result = json.loads(made.stdout.splitlines()[-1])
    remedy = _REMEDY if result["outcome"] == "fail" else ""
    yield Finding(_NAME, result["outcome"], result["detail"], remedy, result["figures"])


def main() -> None:
    """Make the check, and print a line of JSON: outcome, detail, figures."""
    import torch

    from mvd_scale.performance.bringup.checks.decoding import KINDS, SMALL, same_frames
    from mvd_scale.performance.bringup.session import Check, CheckFailed, LeftOut

    device, figures = sys.argv[1], dict[str, float | str]()
    kind = KINDS[0] if device == "cuda" else SMALL[0]
    outcome, detail = "ok", f"{kind} on {'NVDEC' if device == 'cuda' else 'the CPU'}: frames equal those of PyAV"
    with tempfile.TemporaryDirectory(prefix="mvd-doctor-") as folder:
        try:
            same_frames(Check(figures), kind, torch.device(device), Path(folder))
        except LeftOut as reason:
            outcome, detail = "left out", str(reason)
        except CheckFailed as failure:
            outcome, detail = "fail", str(failure)
    print(json.dumps({"outcome": outcome, "detail": detail, "figures": figures}))


if __name__ == "__main__":
    main()
