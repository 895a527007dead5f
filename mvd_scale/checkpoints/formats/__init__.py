"""Published checkpoint formats and their recognition by keys."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mvd_scale.checkpoints.formats.format import Format
from mvd_scale.checkpoints.formats.hf_mae import HF_MAE
from mvd_scale.checkpoints.formats.hf_videomae import HF_VIDEOMAE
from mvd_scale.checkpoints.formats.internvideo2 import INTERNVIDEO2
from mvd_scale.checkpoints.formats.jepa import DINO, I_JEPA, V_JEPA
from mvd_scale.checkpoints.formats.mae import MAE
from mvd_scale.checkpoints.formats.mvd import MVD, MVD_CLASSIFIER
from mvd_scale.checkpoints.formats.timm import TIMM
from mvd_scale.checkpoints.formats.umt import UMT
from mvd_scale.checkpoints.formats.videomae import VIDEOMAE, VIDEOMAE_FINETUNED, VIDEOMAE_V2_GIANT
from mvd_scale.checkpoints.formats.vjepa2 import HF_VJEPA2, V_JEPA_2, V_JEPA_2_1, V_JEPA_2_1_IMAGES
from mvd_scale.config.model import Positions

FAMILIES: dict[str, tuple[Format, ...]] = {
    "videomae": (VIDEOMAE, VIDEOMAE_FINETUNED),
    "mvd": (MVD, MVD_CLASSIFIER),
    "mae": (MAE,),
    "timm": (TIMM,),
    "hf": (HF_VIDEOMAE, HF_MAE),
}
"""Formats that can be written, by the value of `mvd-scale export --to`."""

_ORDER = (
    *(HF_MAE, HF_VIDEOMAE, HF_VJEPA2, VIDEOMAE, V_JEPA, V_JEPA_2_1, V_JEPA_2),
    *(INTERNVIDEO2, UMT, VIDEOMAE_V2_GIANT, MVD, MAE, MVD_CLASSIFIER, VIDEOMAE_FINETUNED),
    *(DINO, I_JEPA, TIMM),
)
"""Order of recognition, the most specific keys first: later formats also match files of earlier ones."""

_PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "encoder.")
_COUNTER = "n_averaged"
"""Entry of torch's `AveragedModel` beside the weights."""

_TOKENS_OF_V_JEPA_2 = (2048, 8192, 18432)
"""Tokens of V-JEPA 2's clips: 16 or 64 frames of 256 pixels, 64 of 384. V-JEPA was published for 16 of 224 or 384."""

_PATCHES = ("patch_embed.proj.weight", "patch_embed.weight", "embeddings.patch_embeddings.projection.weight")


def recognise(tensors: Mapping[str, Tensor], positions: Positions | None, frames: int | None = None) -> Format | None:
    """Recognise the published format of a state dict without wrapper prefixes.

    Fine-tuned classifiers of VideoMAE and MVD have the same keys: `is_ambiguous` tells whether `positions` must say
    which one it is. They are VideoMAE's if it is `sinusoid`, else MVD's. V-JEPA 2 has the keys of V-JEPA but for the
    table, which a file may hold all the same, and those of other models of clips: there `positions` decides as well.

    Args:
        tensors: tensors by the names of the file.
        positions: position table that the user states, or None.
        frames: frames of a clip that the user states, or None; 1 for the part of V-JEPA 2.1 that sees images.

    Returns:
        the format, or None if no published format has these keys.
    """
    found = next((form for form in _ORDER if form.recognise(tensors)), None)
    if found is V_JEPA_2_1 and frames == 1:
        return V_JEPA_2_1_IMAGES
    if found is V_JEPA and positions == V_JEPA_2.positions:
        return V_JEPA_2
    if found is V_JEPA_2 and positions not in (None, V_JEPA_2.positions):
        return VIDEOMAE_FINETUNED
    return VIDEOMAE_FINETUNED if found is MVD_CLASSIFIER and positions == "sinusoid" else found


def is_ambiguous(form: Format) -> bool:
    """Whether files of this format can be of another one, which adds another position table."""
    return form is MVD_CLASSIFIER


def may_be_v_jepa_2(form: Format, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file that V-JEPA would be read from has the table of a clip of V-JEPA 2, which does not add it."""
    return form is V_JEPA and tensors["pos_embed"].shape[-2] in _TOKENS_OF_V_JEPA_2


def strip_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove prefixes that engines and larger models put before the names, if the encoder is below them.

    The prefixes are tried twice, because they can be nested in any order. A prefix that all names have is removed
    whatever it is.
    """
    stripped = {name: tensor for name, tensor in tensors.items() if name != _COUNTER}
    for prefix in _PREFIXES * 2:
        inside = {name.removeprefix(prefix) for name in stripped if name.startswith(prefix)}
        outside = {name for name in stripped if not name.startswith(prefix)}
        # `encoder.` is part of the names of VideoMAE and of this project if the file also has a decoder or a head.
        holds_decoder = any(name.startswith(("decoder", "encoder_to_decoder")) for name in outside)
        native = "patch_embed.weight" in inside
        whole = prefix != "encoder." or not (holds_decoder or (native and outside))
        encoder_inside = any(name.endswith(_PATCHES) for name in inside)
        if encoder_inside and whole and inside.isdisjoint(outside):
            stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
    common = _common_prefix(stripped)
    return {name.removeprefix(common): tensor for name, tensor in stripped.items()}


def _common_prefix(tensors: Mapping[str, Tensor]) -> str:
    """Return the prefix of timm's patch embedding if every other name has it too; otherwise empty."""
    starts = [name.removesuffix(_PATCHES[0]) for name in tensors if name.endswith(_PATCHES[0])]
    return starts[0] if len(starts) == 1 and all(name.startswith(starts[0]) for name in tensors) else ""
