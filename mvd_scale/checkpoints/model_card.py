"""Model card of an exported folder: `README.md` in the form of Hugging Face's hub.

It states what the run folder beside the weights tells: recipe, videos, teachers, and the tests of these weights. Paths
and URLs are cut to the last two parts of their path: a card is published, and hosts, folders above, passwords and
signatures are nobody's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mvd_scale.checkpoints.checkpoint import Checkpoint
from mvd_scale.checkpoints.reading import recipe_near
from mvd_scale.checkpoints.roles import describe_checkpoint, identify_checkpoint
from mvd_scale.utils.io import read_json_object

Library = Literal["transformers", "mvd-scale"]

UNKNOWN_LICENCE = "unknown"
"""Identifier of the hub for a licence that nobody has stated."""

_USES = {
    ("transformers", "classifier"): """\
from transformers import pipeline

classify = pipeline("video-classification", model="FOLDER")
print(classify("video.mp4"))  # by torchcodec; frames of the whole video, where mvd-scale averages several views""",
    ("transformers", "encoder"): """\
from transformers import AutoModel

model = AutoModel.from_pretrained("FOLDER")""",
    ("mvd-scale", "classifier"): """\
import mvd_scale

classifier = mvd_scale.load_classifier("FOLDER")  # for whole videos, by the views of its test
print(classifier.top("video.mp4"))
module = mvd_scale.from_pretrained("FOLDER")  # uint8 (batch, frames, height, width, 3) to logits""",
    ("mvd-scale", "encoder"): """\
import mvd_scale

encoder = mvd_scale.from_pretrained("FOLDER")  # uint8 (batch, frames, height, width, 3) to (batch, tokens, width)""",
    ("mvd-scale", "detector"): """\
import mvd_scale

detector = mvd_scale.from_pretrained("FOLDER")  # needs mvd-scale[detection]
# uint8 (batch, frames, height, width, 3), and boxes, float32 (people, 5): clip, x1, y1, x2, y2 in pixels
logits = detector(clips, boxes)  # (people, actions)""",
}
"""Code that loads a folder, by library and kind; of students that of an encoder."""


@dataclass(frozen=True)
class Origin:
    """Making of weights, as far as the files beside them tell it."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Recipe with its locations cut; empty without a run folder."""

    digests: Mapping[str, Any] = field(default_factory=dict)
    """Digests of videos and weights that the run began from."""

    tests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Summaries of finished tests of these weights alone in the run folder, by the name of their folder."""


def read_origin(checkpoint: Checkpoint) -> Origin:
    """Read recipe, digests and tests of the run whose folder holds a checkpoint; empty if there is none."""
    weights = Path(checkpoint.source)
    path = recipe_near(weights if weights.is_dir() else weights.parent)
    if path is None:
        return Origin()
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        recipe = None
    return Origin(
        _cut_locations(recipe) if isinstance(recipe, dict) else {},
        read_json_object(path.with_name("summary.json")).get("origin", {}),
        _tests_of(checkpoint, path.parent),
    )


def _tests_of(checkpoint: Checkpoint, run: Path) -> dict[str, Mapping[str, Any]]:
    """Read the tests in a run folder that are of a checkpoint alone, not of its best weights or of an ensemble."""
    summaries = {file.parent.name: read_json_object(file) for file in sorted(run.glob("*/summary.json"))}
    tests = {name: summary for name, summary in summaries.items() if "top1" in summary and summary.get("model")}
    if not tests:
        return {}
    model = identify_checkpoint(checkpoint)
    return {name: summary for name, summary in tests.items() if summary["model"] == model}


def write_model_card(checkpoint: Checkpoint, library: Library, licence: str, out: Path) -> None:
    """Write the card of an exported model.

    Args:
        checkpoint: the model; its source says which run made it.
        library: library that loads the folder.
        licence: identifier of the hub, such as `cc-by-nc-4.0`; `UNKNOWN_LICENCE` if nobody has stated one.
        out: file to write.
    """
    origin = read_origin(checkpoint)
    head = yaml.safe_dump(_head(checkpoint, library, licence, origin, out.parent.name), sort_keys=False)
    lines = "\n".join(_body(checkpoint, library, licence, origin, out.parent.name))
    out.write_text(f"---\n{head}---\n\n{lines}\n", encoding="utf-8")


def _head(checkpoint: Checkpoint, library: Library, licence: str, origin: Origin, name: str) -> dict[str, Any]:
    task = "video-classification" if checkpoint.kind == "classifier" else "feature-extraction"
    head: dict[str, Any] = {
        "license": licence,
        "library_name": library,
        "pipeline_tag": task,
        "tags": ["video", "masked-video-distillation", checkpoint.kind],
    }
    if origin.tests:
        results = [
            {
                "task": {"type": task},
                "dataset": {"type": "video", "name": test},
                "metrics": [
                    {"type": "accuracy", "name": title, "value": round(100 * summary[key], 2)}
                    for key, title in (("top1", "top-1"), ("top5", "top-5"))
                    if key in summary
                ],
            }
            for test, summary in origin.tests.items()
        ]
        head["model-index"] = [{"name": name, "results": results}]
    return head


def _body(checkpoint: Checkpoint, library: Library, licence: str, origin: Origin, name: str) -> Iterator[str]:
    yield f"# {name}\n"
    yield f"A video {checkpoint.kind} trained by MVD-Scale (Masked Video Distillation).\n"
    yield from _fenced("text", describe_checkpoint(checkpoint))
    yield "\n## How to load\n"
    kind = checkpoint.kind if (library, checkpoint.kind) in _USES else "encoder"
    yield from _fenced("python", _USES[library, kind])
    if library == "transformers" and kind == "classifier":
        yield (
            "\nThe last norm of transformers' classifier adds 1e-5 to the variance of features, that of ours 1e-6:"
            " logits differ by some 0.0005 % of their size at a variance of 1, by 0.05 % at 0.01."
        )
    yield "\n## Training\n"
    yield from _training(origin)
    yield "\n## Results\n"
    yield from _results(origin)
    yield "\n## Licence\n"
    if licence == UNKNOWN_LICENCE:
        yield (
            "Not stated. Weights may be bound by the licences of the videos, of the teachers and of the weights that "
            "their training began from."
        )
    else:
        yield f"`{licence}`, as stated by whoever exported the weights."
    if origin.recipe:
        yield "\n## Recipe\n"
        yield from _fenced("yaml", yaml.safe_dump(dict(origin.recipe), sort_keys=False).strip())


def _training(origin: Origin) -> Iterator[str]:
    recipe = origin.recipe
    if not recipe:
        yield "The weights lay beside no recipe: nothing is known of their training."
        return
    data, training = recipe.get("data") or {}, recipe.get("training") or {}
    facts = {
        "videos": data.get("source"),
        "digest of the videos": origin.digests.get("videos"),
        "epochs": training.get("epochs"),
        "global batch": training.get("global_batch"),
        "began from": training.get("initial_encoder"),
        "seed": recipe.get("seed"),
    }
    yield "| | |\n|---|---|"
    for title, value in facts.items():
        if value is not None:
            yield f"| {title} | {_cell(value)} |"
    digests = origin.digests.get("teachers") or {}
    for name, target in (recipe.get("targets") or {}).items():
        told = [str(target[key]) for key in ("kind", "checkpoint", "size", "weight") if target.get(key) is not None]
        known = [f"digest {digests[name]}"] if digests.get(name) else []
        yield f"| target {_cell(name)} | {_cell(', '.join([*told, *known]))} |"


def _results(origin: Origin) -> Iterator[str]:
    if not origin.tests:
        yield "No finished test of these weights lies beside them."
        return
    yield "| test | videos | top-1 | top-5 |\n|---|---|---|---|"
    for name, summary in origin.tests.items():
        shares = [f"{100 * summary[key]:.2f} %" if key in summary else "" for key in ("top1", "top5")]
        yield f"| {_cell(name)} | {summary.get('videos', '')} | {' | '.join(shares)} |"


def _cell(value: Any) -> str:
    """Format a value as code in a table, whatever characters it holds."""
    text = str(value).replace("`", "'").replace("|", "\\|").replace("\n", " ")
    return f"`{text}`"


def _fenced(language: str, text: str) -> Iterator[str]:
    """Fence text as a block, with a longer fence than any in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    yield f"{fence}{language}\n{text}\n{fence}"


def _cut_locations(value: Any) -> Any:
    """Cut the locations in nested values; see `_cut_location`."""
    if isinstance(value, dict):
        return {key: _cut_locations(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_cut_locations(each) for each in value]
    return _cut_location(value) if isinstance(value, str) else value


def _cut_location(text: str) -> str:
    """Cut an absolute path, a path that leads upwards, or a URL to its last two parts; other text is returned as it is.

    Of a URL the path alone is kept, without host, user, password, query and fragment; of chained URLs the last one's.
    """
    _, url, path = text.rpartition("://")
    if url:
        # A slash in a password does not end the host.
        path = re.split("[?#]", path)[0].rpartition("@")[2].partition("/")[2]
    elif not re.search("(^|::)[/~]", text) and ".." not in text.split("/"):
        return text
    parts = [part for part in path.split("/") if part not in ("", ".", "..") and not part.startswith("~")]
    return "/".join(parts[-2:]) or "..."
