"""Trains a small student by each method of the paper, one after the other, and prints its losses.

    python tests/e2e/methods.py FOLDER VIDEOS IMAGE_TEACHER VIDEO_TEACHER STEPS [METHOD...]

The shapes are those of the quickstart. Each line: method, mean loss of the first and of the last tenth of the readings.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
from pathlib import Path
from statistics import mean

from mvd_scale.config import recipe_from_dict
from mvd_scale.training.pretrain import run_pretraining
from mvd_scale.utils.io import read_metrics

DECODER = {"width": 96, "depth": 2, "heads": 3}
BOTH_LINEAR = {name: {"head": "linear", "tokens": "visible", "decoder": None} for name in ("image", "video")}
METHODS: dict[str, dict] = {
    "co-teaching": {},
    "image teacher": {"targets": {"video": None}},
    "video teacher": {"targets": {"image": None}},
    "co-teaching + pixels": {"targets": {"pixels": {"kind": "pixels", "decoder": DECODER}}},
    "momentum teacher": {
        "targets": {
            "image": None,
            "video": None,
            "average": {"kind": "momentum", "momentum": 0.99, "norm": True, "decoder": DECODER},
        }
    },
    "per-token distillation": {
        "data": {"mask": None},
        "targets": {"image": None, "video": {"head": "mlp", "tokens": "all", "decoder": None}},
    },
    "alignment, visible tokens": {"targets": BOTH_LINEAR},
    "no target norm": {"targets": {"image": {"norm": False}, "video": {"norm": False}}},
    "L1": {"targets": {"image": {"distance": "l1"}, "video": {"distance": "l1"}}},
    "L2": {"targets": {"image": {"distance": "l2"}, "video": {"distance": "l2"}}},
    "cosine": {"targets": {"image": {"distance": "cosine"}, "video": {"distance": "cosine"}}},
    "several layers": {"targets": {"image": {"layers": [1, 2]}, "video": {"layers": [1, 2]}}},
    "visible tokens too": {"targets": {"image": {"visible_weight": 0.5}, "video": {"visible_weight": 0.5}}},
    "standardised": {
        "targets": {name: {"norm": False, "standardize": "channel"} for name in ("image", "video")},
    },
    "random mask": {"data": {"mask": {"kind": "random"}}},
    "half decoded": {
        # Running cells need four time slices.
        "model": {"frames": 8},
        "data": {"stride": 2, "mask": {"decode_ratio": 0.5}},
        "targets": {"image": None, "video": None, "pixels": {"kind": "pixels", "decoder": DECODER}},
    },
    "VideoMAE": {"targets": {"image": None, "video": None, "pixels": {"kind": "pixels", "decoder": DECODER}}},
}


def train(method: str, folder: str, videos: str, image: str, video: str, steps: str) -> None:
    changes = METHODS[method]
    targets = {name: dict(target or {}) or target for name, target in changes.get("targets", {}).items()}
    for name, checkpoint in (("image", image), ("video", video)):
        if name not in targets or targets[name] is not None:
            targets[name] = {**(targets.get(name) or {}), "checkpoint": checkpoint}
    run = Path(folder) / method.replace(" ", "_")
    recipe = recipe_from_dict(
        {
            "base": "quickstart/student",
            "run": {"folder": str(run)},
            "model": changes.get("model", {}),
            "data": {"source": videos, "workers": 0, **changes.get("data", {})},
            "targets": targets,
            "training": {"max_steps": int(steps), "warmup_epochs": 0.25},
            "logging": {"every_steps": 1, "tensorboard": False, "pictures": None},
        },
        method,
    )
    run_pretraining(recipe)
    losses = [reading["loss"] for reading in read_metrics(run / "metrics.jsonl")]
    tenth = max(len(losses) // 10, 3)
    print(json.dumps({"method": method, "first": mean(losses[:tenth]), "last": mean(losses[-tenth:])}), flush=True)


def main() -> None:
    logging.getLogger("mvd_scale").setLevel(logging.WARNING)
    folder, videos, image, video, steps, *chosen = sys.argv[1:]
    for method in chosen or METHODS:
        # A process of its own: DeepSpeed keeps its groups when a process leaves them. Forked, it imports nothing again.
        process = multiprocessing.get_context("fork").Process(
            target=train, args=(method, folder, videos, image, video, steps)
        )
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{method} failed")


if __name__ == "__main__":
    main()
