"""Teachers in 8 bits: close to the float32 ones; refused if they are not close, or if the recipe makes no sense."""

from typing import Any

import pytest
import torch

from mvd_scale.config import Recipe, load_recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder
from mvd_scale.models.quantization import quantize_linear_layers
from mvd_scale.models.timm_vit import TimmViT
from mvd_scale.targets import FrozenTeacher, build_targets
from mvd_scale.training.capabilities import make_placement
from mvd_scale.training.placement import Placement
from mvd_scale.training.teachers import fidelity
from mvd_scale.training.teachers.fidelity import Fidelity, check_fidelity
from mvd_scale.training.teachers.place import cast_teacher

CPU = torch.device("cpu")
SHAPE = '"size": null, "width": 64, "depth": 2, "heads": 2, "input_size": 32'
SMALL = [
    "--model", f'{{{SHAPE}, "frames": 4}}',
    "--targets.image.model", f'{{{SHAPE}, "frames": 1, "tubelet": 1, "positions": "sincos2d", "class_token": true}}',
    "--targets.video.model", f'{{{SHAPE}, "frames": 4}}',
    "--data.source", "clips", "--run.folder", "run", "--device", "cpu", "--training.precision", "fp32",
]  # fmt: skip


def recipe(*overrides: str) -> Recipe:
    made = load_recipe("distill/b_from_b", [*SMALL, *overrides])
    assert isinstance(made, Recipe)
    return made


def teachers(made: Recipe) -> dict[str, Any]:
    torch.manual_seed(0)
    return build_targets(made, lambda name: Encoder(made.targets[name].model, final_norm=False))  # type: ignore[union-attr]


def placed(made: Recipe) -> Placement:
    return make_placement(made, teachers(made), Ranks(0, 0, 1, CPU))


def clip() -> ClipBatch:
    tokens = torch.arange(8)[None]
    pixels = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # The second patch of each of the two slices is seen, of four.
    visible = torch.tensor([[1, 5]])
    masked = tokens[:, ~torch.isin(tokens[0], visible[0])]
    return ClipBatch(pixels, visible, masked, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), {})


def test_8_bits_are_near_and_replace_every_linear_layer_of_the_blocks() -> None:
    made = recipe("--teachers.precision", "int8")
    for name, target in teachers(made).items():
        assert isinstance(target, FrozenTeacher)
        teacher = placed(made).teacher(name)
        found = fidelity.lowered(target, teacher, clip(), CPU)
        assert 0.999 < found.cosine < 1
        assert 0 < found.relative_error < 0.05
        low = cast_teacher(target.teacher, teacher, CPU)
        linear = [name for name, module in low.named_modules() if isinstance(module, torch.nn.Linear)]
        assert linear == ["patch_embed"]


def test_what_is_not_near_is_refused_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "first_clip", lambda *_: clip())
    monkeypatch.setattr(fidelity, "lowered", lambda *_: Fidelity(0.99, 0.1))
    made = recipe("--teachers.precision", "int8")
    with pytest.raises(UserError, match=r"targets.image have a mean cosine of 0.99000 .* less than 0.999"):
        check_fidelity(teachers(made), made, [placed(made)], None, CPU)  # type: ignore[arg-type]
    accepted = recipe("--teachers.precision", "int8", "--teachers.accept_inexact", "true")
    check_fidelity(teachers(accepted), accepted, [placed(accepted)], None, CPU)  # type: ignore[arg-type]
    plain = recipe()
    check_fidelity(teachers(plain), plain, [placed(plain)], None, CPU)  # type: ignore[arg-type]


def test_features_that_are_no_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "first_clip", lambda *_: clip())
    monkeypatch.setattr(fidelity, "lowered", lambda *_: Fidelity(float("nan"), float("nan")))
    made = recipe("--teachers.precision", "int8")
    with pytest.raises(UserError, match="mean cosine of nan"):
        check_fidelity(teachers(made), made, [placed(made)], None, CPU)  # type: ignore[arg-type]


def test_weights_in_half_precision_are_compared_with_float32() -> None:
    made = recipe("--teachers.precision", "int8")
    target = teachers(made)["video"]
    target.teacher.half()
    assert fidelity.lowered(target, placed(made).teacher("video"), clip(), CPU).cosine > 0.999
    assert target.teacher.patch_embed.weight.dtype == torch.float16


@pytest.mark.parametrize("vit", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_timms_models_of_any_kind_run_in_8_bits(vit: str) -> None:
    torch.manual_seed(0)
    model = TimmViT(vit, 2, final_norm=False, pretrained=False).eval()
    frames = torch.randint(0, 256, (2, 1, model.input_size, model.input_size, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(frames)
        found = Fidelity.of(quantize_linear_layers(model, "int8", CPU)(frames), expected)
    assert found.cosine > 0.99


def test_fp8_on_a_cpu_is_one_message() -> None:
    with pytest.raises(UserError, match="fp8 is not supported on device cpu"):
        recipe("--teachers.precision", "fp8")
    made = recipe("--teachers.precision", "fp8", "--device", "auto")
    with pytest.raises(UserError, match="fp8 needs a GPU"):
        placed(made)
    with pytest.raises(UserError, match="fp8 needs a GPU"):
        quantize_linear_layers(teachers(made)["video"].teacher, "fp8", CPU)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--teachers.precision", "int8", "--teachers.sharding", "zero3"), "cannot be sharded"),
        (("--teachers.shard_over", "world", "--teachers.sharding", "replicated"), "shard_over world has no effect"),
        (("--teachers.accept_inexact", "true"), "has no effect with teachers.precision auto"),
    ],
)
def test_contradictions(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(*overrides)


def test_without_a_teacher_8_bits_do_nothing() -> None:
    with pytest.raises(UserError, match="no target has a teacher"):
        load_recipe("pretrain/videomae_b_k400", ["--teachers.precision", "int8"])


def test_weights_that_move_have_no_8_bits() -> None:
    with pytest.raises(UserError, match=r"int8 requires frozen weights"):
        load_recipe("ablations/momentum_b", ["--teachers.precision", "int8"])
