"""Entry points of torch.hub: `torch.hub.load("OWNER/REPOSITORY", "encoder", "FOLDER")`.

Weights are a folder that `mvd-scale export --to hub` or `--to hf` wrote, any file that `mvd-scale inspect` reads, or an
id `owner/name` of Hugging Face's hub; tensors only. With `source="local"` the first argument is a clone.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

dependencies = ["torch", "numpy", "pydantic", "safetensors", "yaml"]

if find_spec("mvd_kernels") is None:
    # torch.hub puts this folder on the path, but not the operators below it.
    sys.path.append(str(Path(__file__).resolve().parent / "kernels"))


def encoder(weights, revision=None):
    """Encoder of any model, without its head: uint8 (B, T, H, W, 3) to features (B, N, D)."""
    from mvd_scale.checkpoints.hub import pretrained_encoder

    return pretrained_encoder(weights, revision=revision)


def classifier(weights, revision=None):
    """Fine-tuned classifier: uint8 (B, T, H, W, 3) to logits (B, C)."""
    from mvd_scale.checkpoints.hub import pretrained_classifier

    return pretrained_classifier(weights, revision=revision)
