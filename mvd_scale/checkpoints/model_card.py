"""Model card of an exported folder: `README.md` in the form of Hugging Face's hub.

It states what the run folder beside the weights tells: recipe, videos, teachers, and the tests of these weights. Paths
and URLs are cut to the last two parts of their path: a card is published, and hosts, folders above, passwords and
signatures are nobody's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from mvd_scale.checkpoints.checkpoint import Checkpoint
from mvd_scale.checkpoints.reading import read_raw_checkpoint, recipe_near, tensors_digest
from mvd_scale.checkpoints.roles import describe_checkpoint, identify_checkpoint
from mvd_scale.errors import UserError
from mvd_scale.utils.io import read_json_object
from mvd_scale.utils.locations import cut_locations

Library = Literal["transformers", "mvd-scale"]

_OWN_FORMAT = "mvd-scale"
"""Format of weights that runs write."""

_NO_TEACHERS = frozenset({"pixels", "momentum"})
"""Kinds of targets that take no features of another model."""

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
    """Summaries of finished tests of these weights alone, in the run folder or beside it, by name of their folder."""

    encoder: Origin | None = None
    """Making of the encoder that the run began from; None if its run is not on disk, or holds other weights now."""

    @property
    def lineage(self) -> Iterator[Origin]:
        """This origin, that of its encoder, and so on."""
        yield self
        if self.encoder is not None:
            yield from self.encoder.lineage

    @property
    def is_distilled(self) -> bool:
        """Whether a recipe has a teacher."""
        kinds = {target.get("kind") for origin in self.lineage for target in origin.targets.values()}
        return bool(kinds - _NO_TEACHERS - {None})

    @property
    def targets(self) -> Mapping[str, Mapping[str, Any]]:
        """Targets of the recipe by name; empty for a run without any."""
        return self.recipe.get("targets") or {}


def read_origin(checkpoint: Checkpoint) -> Origin:
    """Read recipe, digests and tests of the run whose folder holds a checkpoint; empty if there is none.

    Weights in the format of others are not of a run, whatever lies beside them.
    """
    path = _run_of(Path(checkpoint.source)) if checkpoint.format == _OWN_FORMAT else None
    if path is None:
        return Origin()
    return replace(_read_run(path), tests=_tests_of(checkpoint, path.parent))


def _run_of(weights: Path) -> Path | None:
    """Find the recipe of the run that wrote a file or folder of weights."""
    return recipe_near(weights if weights.is_dir() else weights.parent)


def _read_run(path: Path) -> Origin:
    """Read recipe and digests of a run, and of those that its encoder came from."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        recipe = None
    if not isinstance(recipe, dict):
        return Origin()
    digests = read_json_object(path.with_name("summary.json")).get("origin", {})
    initial = (recipe.get("training") or {}).get("initial_encoder")
    known = digests.get("initial encoder") or (digests.get("teachers") or {}).get("initial encoder")
    encoder = _read_encoder_run(Path(initial), known) if initial and known else None
    return Origin(cut_locations(recipe), digests, encoder=encoder)


def _read_encoder_run(weights: Path, digest: str) -> Origin | None:
    """Read the run that wrote an encoder; None if the encoder is gone, of no run, or not the one with this digest."""
    path = _run_of(weights)
    if path is None:
        return None
    try:
        found = tensors_digest(read_raw_checkpoint(weights).tensors)
    except (UserError, OSError):
        return None
    return _read_run(path) if found == digest else None


def _tests_of(checkpoint: Checkpoint, run: Path) -> dict[str, Mapping[str, Any]]:
    """Read the tests in and beside a run folder that are of a checkpoint alone, not of its best weights or an ensemble.

    A test beside the run that has the name of one in it is called `../NAME`.
    """
    summaries = {file.parent.name: read_json_object(file) for file in sorted(run.glob("*/summary.json"))}
    for file in sorted(run.absolute().parent.glob("*/summary.json")):
        name = file.parent.name
        summaries[f"../{name}" if name in summaries else name] = read_json_object(file)
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
    medium = _medium(checkpoint)
    # transformers loads classifiers as those of videos alone.
    classified = "video" if library == "transformers" else medium
    task = f"{classified}-classification" if checkpoint.kind == "classifier" else "feature-extraction"
    distilled = ["masked-video-distillation"] if origin.is_distilled else []
    head: dict[str, Any] = {
        "license": licence,
        "library_name": library,
        "pipeline_tag": task,
        "tags": [medium, *distilled, checkpoint.kind],
    }
    if origin.tests:
        results = [
            {
                "task": {"type": task},
                "dataset": {"type": medium, "name": test},
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


def _medium(checkpoint: Checkpoint) -> str:
    return "image" if checkpoint.model.frames == 1 else "video"


def _body(checkpoint: Checkpoint, library: Library, licence: str, origin: Origin, name: str) -> Iterator[str]:
    yield f"# {name}\n"
    medium = _medium(checkpoint)
    made = "trained" if origin.recipe else "converted"
    yield f"{'An' if medium == 'image' else 'A'} {medium} {checkpoint.kind} {made} by MVD-Scale.\n"
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
        yield "The weights lay beside no recipe of their own: nothing is known of their training."
        return
    data, training = recipe.get("data") or {}, recipe.get("training") or {}
    facts = {
        "videos": data.get("source"),
        **{f"videos of {name}": part.get("source") for name, part in (data.get("mixture") or {}).items()},
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
    for made in origin.lineage:
        digests = made.digests.get("teachers") or {}
        of_encoder = "" if made is origin else " of the encoder that it began from"
        for name, target in made.targets.items():
            told = [str(target[key]) for key in ("kind", "checkpoint", "size", "weight") if target.get(key) is not None]
            known = [f"digest {digests[name]}"] if digests.get(name) else []
            yield f"| target {_cell(name)}{of_encoder} | {_cell(', '.join([*told, *known]))} |"


def _results(origin: Origin) -> Iterator[str]:
    if not origin.tests:
        yield "No finished test of these weights lies beside them or their run folder."
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
