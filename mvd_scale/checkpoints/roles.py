"""Import of a checkpoint of any format for one role (teacher, student, classifier), its identity and description."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from mvd_scale.checkpoints.checkpoint import Checkpoint
from mvd_scale.checkpoints.native import save_weights
from mvd_scale.checkpoints.reading import tensors_digest
from mvd_scale.checkpoints.weights import build_classifier, build_encoder, build_student, find_mismatches
from mvd_scale.config import SIZES
from mvd_scale.errors import UserError

Role = Literal["image_teacher", "video_teacher", "student", "classifier"]
ROLES: tuple[Role, ...] = get_args(Role)


def import_checkpoint(checkpoint: Checkpoint, role: Role, out: Path) -> None:
    """Write the part of a checkpoint that a role needs as safetensors of this project, float32.

    All names, shapes and values are checked before anything is written.

    Raises:
        UserError: the checkpoint does not suit the role, tensors do not fit (the message names each), or `out` does
            not end in `.safetensors`.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: expected a file name that ends in .safetensors")
    model: nn.Module
    if role == "student":
        model = build_student(checkpoint)
    elif role == "classifier":
        model = build_classifier(checkpoint)
    else:
        image = checkpoint.model.frames == 1
        if image != (role == "image_teacher"):
            raise UserError(
                f"{checkpoint.source} is a model of {'images' if image else f'{checkpoint.model.frames} frames'}: "
                f"import it as {'image_teacher' if image else 'video_teacher'}"
            )
        model = build_encoder(checkpoint, final_norm=checkpoint.final_norm)
    decoders = {name: decoder.config for name, decoder in checkpoint.decoders.items()} if role == "student" else None
    out.parent.mkdir(parents=True, exist_ok=True)
    classes, views = (checkpoint.class_names, checkpoint.views) if role == "classifier" else ((), None)
    save_weights(out, model.state_dict(), checkpoint.model, decoders, classes=classes, views=views)


def identify_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the facts by which a model is recognised, whatever file holds it: equal for equal models, and JSON.

    The same tensors are another model where they are adapted to other clips or read with another position table.
    """
    model = checkpoint.model
    return {
        "weights": tensors_digest(checkpoint.tensors()),
        "positions": model.positions,
        "frames": model.frames,
        "input_size": model.input_size,
    }


def describe_checkpoint(checkpoint: Checkpoint) -> str:
    """Describe a checkpoint, one line per fact, then every tensor that is missing, surplus, misshapen or not finite."""
    model = checkpoint.model
    shape = (model.width, model.depth, model.heads)
    size = next((name for name, published in SIZES.items() if published == shape), "free")
    time, rows, columns = model.grid
    positions = "learned" if "positions" in checkpoint.encoder else model.positions
    lines = {
        "format": f"{checkpoint.format}, {checkpoint.kind}",
        "size": f"{size} (width {model.width}, depth {model.depth}, heads {model.heads})",
        "patch": f"{model.patch_size} pixels, tubelet {model.tubelet}",
        "grid": f"{time} x {rows} x {columns} tokens",
        "input": f"{model.frames} frames of {model.input_size} x {model.input_size} pixels",
        "positions": positions,
        "class token": "yes" if model.class_token else "no",
        "final norm": "yes" if checkpoint.final_norm else "no",
    }
    if model.rms_norm:
        lines["blocks"] = "norms by the root mean square, of queries and keys too"
    for name, decoder in checkpoint.decoders.items():
        deep = decoder.config
        lines[f"decoder {name}"] = (
            f"width {deep.width}, depth {deep.depth}, heads {deep.heads}, {decoder.channels} channels"
        )
    lines["classes"] = "none" if checkpoint.classes is None else str(checkpoint.classes)
    if checkpoint.class_names:
        lines["classes"] += f" ({', '.join(checkpoint.class_names[:3])}{' ...' * (len(checkpoint.class_names) > 3)})"
    for name, head in checkpoint.token_heads.items():
        lines[f"{head.config.kind} head {name}"] = f"{head.channels} channels"
    count = sum(tensor.numel() for name, tensor in checkpoint.tensors().items() if not name.endswith("positions"))
    lines["parameters"] = f"{count / 1e6:.2f} M"
    if checkpoint.unused:
        lines["left out"] = _group(checkpoint.unused)
    faults = find_mismatches(checkpoint)
    lines["faults"] = "none" if not faults else ""
    width = max(map(len, lines))
    text = "\n".join(f"{key:{width}}  {value}".rstrip() for key, value in lines.items())
    return "\n  ".join([text, *faults])


def _group(names: Sequence[str]) -> str:
    """List names of tensors, those of one module of the model together: `predictor.* (188 tensors)`."""
    counts = Counter(name.partition(".")[0] for name in names)
    alone = {name.partition(".")[0]: name for name in names}
    return ", ".join(alone[start] if count == 1 else f"{start}.* ({count} tensors)" for start, count in counts.items())
