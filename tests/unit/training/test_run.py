"""Log lines of a run before its first step."""

import torch

from mvd_scale.config import load_recipe
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.training.run import _attention


def test_every_attention_that_is_not_taken_is_named_with_its_reason() -> None:
    recipe = load_recipe("distill/b_from_b", ["--training.precision", "fp32"])
    assert _attention(recipe, Ranks(0, 0, 1, torch.device("cpu"))) == "native (not for torch.float32), sdpa"
