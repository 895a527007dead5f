"""`mvd_scale.from_pretrained`: a module from a folder, a file, or a repository of Hugging Face's hub; tensors only."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

from torch import nn

from mvd_scale.checkpoints.weights import build_classifier, build_detector, build_encoder, read_checkpoint
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier, Encoder

_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "config.json", "README.md"]
"""Files that are downloaded: no pickles, and no code."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def from_pretrained(name: str | os.PathLike[str], *, revision: str | None = None) -> nn.Module:
    """Load a model for inference, float32, on the CPU, in evaluation mode.

    Args:
        name: a folder that `mvd-scale export --to hub` or `--to hf` wrote, any other file or folder that `mvd-scale
            inspect` reads, or the id `owner/name` of a repository of the hub with such files.
        revision: branch, tag or commit of the hub's repository.

    Returns:
        the `Classifier` or `Detector` of fine-tuned weights, otherwise the `Encoder`; of students without decoders.

    Raises:
        UserError: the weights cannot be read, do not fit, or cannot be downloaded.
    """
    checkpoint = read_checkpoint(find_weights(name, revision))
    module: nn.Module
    if checkpoint.kind == "classifier":
        module = build_classifier(checkpoint)
    elif checkpoint.kind == "detector":
        module = build_detector(checkpoint)
    else:
        module = build_encoder(checkpoint, final_norm=checkpoint.final_norm)
    return module.eval()


def pretrained_encoder(name: str | os.PathLike[str], *, revision: str | None = None) -> Encoder:
    """Load the encoder of any model, without its head; arguments and errors as of `from_pretrained`."""
    checkpoint = read_checkpoint(find_weights(name, revision))
    return build_encoder(checkpoint, final_norm=checkpoint.final_norm).eval()


def pretrained_classifier(name: str | os.PathLike[str], *, revision: str | None = None) -> Classifier:
    """Load a fine-tuned classifier; arguments as of `from_pretrained`.

    Raises:
        UserError: see `from_pretrained`; or the weights have no classification head.
    """
    return build_classifier(read_checkpoint(find_weights(name, revision))).eval()


def find_weights(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the path of weights: the name itself if it exists, otherwise the downloaded files of the hub.

    Raises:
        UserError: there is no such file or folder, and no such repository of the hub, or it cannot be reached.
    """
    path = Path(name)
    if path.exists():
        if revision is not None:
            raise UserError(f"revision is {revision!r}, but {path} is on this disk: only the hub has revisions")
        return path
    text = os.fspath(name)
    if not _HUB_ID.fullmatch(text):
        raise UserError(f"{text} does not exist: expected a file or folder of weights, or an id owner/name of the hub")
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(
            f"{text} does not exist here, and the hub needs huggingface_hub ({error}): pip install 'mvd-scale[hf]'"
        ) from error
    try:
        return Path(hub.snapshot_download(text, revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:
        # Errors of a lost connection are those of the client's HTTP library, which differs between releases (httpx in
        # 1.31, httpx2 in 2.4). Their only base is Exception, as that of its own RevisionResolutionError is.
        raise UserError(
            f"{text} does not exist here, and cannot be downloaded from the hub: {type(error).__name__}: {error}\n"
            "Without network, run "
            f"`hf download {text} --local-dir FOLDER` where there is one, copy FOLDER, and give that"
        ) from error
