from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from mvd_scale.cli import cli
from mvd_scale.config import load_finetune_recipe, load_recipe
from mvd_scale.errors import UserError
from mvd_scale.performance.planning.communication import seconds_of
from mvd_scale.performance.planning.hardware import GIB, GPUS, LINK_SHARE, usable_memory
from mvd_scale.performance.planning.plan import Plan, make_cluster, make_plan, micro_batches, with_stage
from mvd_scale.performance.planning.plan_report import to_text
from mvd_scale.performance.planning.video_decoding import (
    VideoFormat,
    decoded_clips,
    decoded_frames,
    decoding_memory,
)
from mvd_scale.performance.planning.workload import build_workload

SLOW_DECODING = VideoFormat(keyframes=250)
FAST_DECODING = VideoFormat(keyframes=8, long_side=448)


def plan(
    recipe: str = "distill/b_from_b",
    *overrides: str,
    gpu: str = "H100",
    gpus: int = 8,
    per_node: int = 8,
    efficiency: float | None = None,
    video: VideoFormat = FAST_DECODING,
) -> Plan:
    cluster = make_cluster(
        gpu, gpus, per_node, attention=None, efficiency=efficiency, video=video, videos=240_000
    )  # fmt: skip
    return make_plan(recipe, list(overrides), cluster)


def sent(made: Plan) -> dict[str, tuple[str, int, int]]:
    return {message.name: (message.kind, message.payload, message.times) for message in made.messages}


def test_arithmetic_alone_decides_where_nothing_else_can() -> None:
    """One GPU, fast decoding: the step is its FLOPs over the share of the peak."""
    made = plan(gpus=1, efficiency=0.2)
    flops = 1024 * sum(part.total for part in made.flops)
    assert made.limit == "arithmetic"
    assert not made.messages
    assert made.step_seconds == pytest.approx(flops / (0.2 * 989e12), rel=1e-3)
    assert made.arithmetic_share == pytest.approx(0.2, rel=1e-3)
    assert made.clips_per_second == pytest.approx(1024 / made.step_seconds)
    assert made.epoch_seconds == pytest.approx(240_000 // 1024 * made.step_seconds)
    assert made.run_hours == pytest.approx(400 * made.epoch_seconds / 3600)


def test_a_run_is_no_faster_than_its_videos_are_decoded() -> None:
    made = plan(video=SLOW_DECODING)
    assert made.limit == "decoding"
    assert made.decode_capacity is not None
    assert made.clips_per_second == pytest.approx(made.decode_capacity)
    assert made.decode_needed > made.decode_capacity
    assert plan().clips_per_second > made.clips_per_second


def test_frames_before_a_clip_are_decoded_from_the_last_key_frame() -> None:
    recipe = load_recipe("distill/b_from_b")
    # 15 strides of 4 and a frame; nothing before it where each frame is a key frame.
    assert decoded_frames(recipe.data, recipe.model, VideoFormat(keyframes=1)) == 61
    assert decoded_frames(recipe.data, recipe.model, VideoFormat(keyframes=251)) == 61 + 125
    # A clip that spans its video needs all of it, wherever key frames are.
    whole = load_finetune_recipe("finetune/b_ssv2")
    for rule in ("segments", "whole_segments"):
        data = whole.data.model_copy(update={"sampling": rule})
        assert decoded_frames(data, whole.model, VideoFormat(keyframes=12, frames=45)) == 45
    gpu, video = GPUS["A100"], VideoFormat(1088, keyframes=1, long_side=1920)
    assert decoded_clips(gpu, recipe.data, recipe.model, video) == pytest.approx(2250 / 61 * 1080 / 1088)
    # Of 1080 rows, which are no whole macroblocks, each clip gets a decoder of its own.
    video = VideoFormat(1080, keyframes=1, long_side=1920)
    assert decoded_clips(gpu, recipe.data, recipe.model, video) == pytest.approx(5 / (61 / 450 + 0.06))


def test_decoding_takes_gigabytes_of_a_gpu_at_1080_rows() -> None:
    recipe = load_recipe("distill/b_from_b")
    full, data = VideoFormat(1080, long_side=1920), recipe.data
    parts = decoding_memory(data, recipe.model, full, 64, "nvdec")
    picture = 3 * 1920 * 1080
    assert parts == {
        "decoded clips": 2 * 64 * 16 * picture,
        "frames of DALI's decoders": 8 * 64 * picture,
        "surfaces of NVDEC": 100 * 12 * picture // 2,
    }
    assert sum(parts.values()) > 15 * GIB
    assert decoding_memory(data, recipe.model, full, 64, "host") == {"decoded clips": 2 * 64 * 16 * picture}
    # Decoders for whole macroblocks are used again, and copies of a clip are decoded once.
    data, video = data.model_copy(update={"copies": 2}), VideoFormat(1088, long_side=1920)
    whole = decoding_memory(data, recipe.model, video, 8, "nvdec")
    assert whole["surfaces of NVDEC"] == 4 * 12 * 1920 * 1088 * 3 // 2
    large, small = (plan("distill/b_from_b", video=VideoFormat(height)) for height in (1080, 320))
    taken = [
        sum(decoding_memory(recipe.data, recipe.model, VideoFormat(height), large.parallel.micro, "nvdec").values())
        for height in (1080, 320)
    ]
    assert large.memory.peak - small.memory.peak == taken[0] - taken[1]


def test_the_plan_tells_who_decodes() -> None:
    slow, host = plan("distill/b_from_b", video=SLOW_DECODING), plan("distill/b_from_b", "--data.decoder", "host")
    assert "426x320 pixels are no multiples of 16: each clip gets a new decoder, in 60 ms" in to_text(slow)
    assert (slow.limit, host.decode_capacity) == ("decoding", None)
    assert host.limit != "decoding"
    assert "which the CPUs must decode" in to_text(host)
    assert "host" in str(host.placement.decoder)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (1, {"gradients": ("all-reduce", 1), "updated weights": ("all-gather", 1)}),
        (2, {"gradients": ("all-reduce", 8), "updated weights": ("all-gather", 1)}),
        (3, {"weights, forward": ("all-gather", 8), "gradients": ("reduce-scatter", 8)}),
    ],
)
def test_what_each_stage_sends(stage: int, expected: dict[str, tuple[str, int]]) -> None:
    """Stage 1 reduces once a step, the others after each of the 8 micro batches."""
    made = plan("distill/b_from_b", *with_stage([], stage))
    found = sent(made)
    assert {name: (kind, times) for name, (kind, _, times) in found.items()} == expected
    assert all(0.99 * 2 * made.parameters < payload <= 2 * made.parameters for _, payload, _ in found.values())


def test_sharded_teachers_are_gathered_for_every_micro_batch() -> None:
    replicated, sharded = (plan("distill/b_from_b", "--teachers.sharding", way) for way in ("replicated", "zero3"))
    more = sent(sharded).keys() - sent(replicated).keys()
    assert more == {"image teacher's weights", "video teacher's weights"}
    for name in more:
        kind, payload, times = sent(sharded)[name]
        assert (kind, times) == ("all-gather", 8)
        assert payload == pytest.approx(2 * 86e6, rel=0.01)
    assert (
        sharded.memory.phases["optimizer step"]["teachers"]
        < 0.15 * replicated.memory.phases["optimizer step"]["teachers"]
    )


def test_8_bit_teachers_compute_linear_layers_at_the_8_bit_peak() -> None:
    """And attention and the embedding at that of bf16; no message carries their weights, however large they are."""
    base, fp8 = (plan("distill/b_from_b", *words, efficiency=0.5) for words in ([], ["--teachers.precision", "fp8"]))
    # Tokens are projected to 3 D, D, 4 D and back; in the last block all of them to 3 D, but only masked ones further.
    # The image teacher sees 8 frames of 196 tokens and a class token.
    masked, width = 8 * 176, 768
    linear = sum(2 * width**2 * (12 * 11 * seen + 3 * seen + 9 * masked) for seen in (8 * 197, 1568))
    assert fp8.flops == base.flops
    whole = sum(part.forward for part in fp8.flops if part.part.endswith("teacher"))
    spent = {made.parallel.quantized: made.phases[0].arithmetic for made in (base, fp8)}
    assert spent[None] == pytest.approx(128 * whole / (0.5 * 989e12), rel=1e-6)
    assert spent["fp8"] == pytest.approx(128 * (linear / 1979e12 + (whole - linear) / 989e12) / 0.5, rel=1e-6)
    # Weights of 12 blocks in a byte, and a scale for each output channel; what remains in two bytes.
    weights, channels = 2 * 12 * 12 * width**2, 2 * 12 * 9 * width
    rest = base.memory.parts["teachers"] - 2 * weights
    assert fp8.memory.parts["teachers"] == weights + 4 * channels + rest
    assert "teachers in fp8" in to_text(fp8)
    large = plan("distill/h_from_h", "--teachers.precision", "fp8", "--teachers.sharding", "auto")
    assert not any("teacher" in name for name in sent(large))


def test_what_a_timm_teacher_has_in_8_bits_is_planned_too() -> None:
    vit = "{kind: timm, vit: vit_base_patch16_224, decoder: {width: 768, depth: 2, heads: 12}}"
    words = ["--targets.image", "null", "--targets.vit", vit]
    (part,) = (
        part for part in build_workload(load_recipe("distill/b_from_b", words)).teachers if part.name == "vit teacher"
    )
    assert part.linear == 12 * 12 * 768**2
    # Attention and the embedding are the rest.
    attention, embedding = 12 * 4 * 197**2 * 768 * 8, 2 * 8 * 196 * 768**2
    assert part.products == part.forward - attention - embedding


def test_large_students_are_gathered_again_backwards() -> None:
    made = plan("distill/h_from_h", *with_stage([], 3))
    (again,) = (message for message in made.messages if message.name == "weights, backward")
    assert again.payload == pytest.approx(2 * (made.parameters - 200e6), rel=0.01)


def test_rings_are_as_fast_as_their_slowest_link() -> None:
    gpu = GPUS["H100"]
    alone = seconds_of("all-gather", 10**9, 8, 8, gpu)
    assert alone == pytest.approx(7 / 8 / (450 * LINK_SHARE))
    # A machine gets seven eighths from the seven others by its eight network cards.
    assert seconds_of("all-gather", 10**9, 64, 8, gpu) == pytest.approx(max(63 / 64 / 450, 7 / 8 / 400) / LINK_SHARE)
    assert seconds_of("all-gather", 10**9, 8, 1, gpu) == pytest.approx(7 / 8 / (50 * LINK_SHARE))
    assert seconds_of("all-reduce", 10**9, 8, 8, gpu) == 2 * alone


def test_slow_links_become_the_limit() -> None:
    cluster = make_cluster("H100", 64, 8, attention=None, efficiency=None, video=FAST_DECODING, videos=240_000)
    slow = replace(cluster, gpu=replace(cluster.gpu, network=1e9))
    fast, made = (make_plan("distill/b_from_b", with_stage([], 3), place) for place in (cluster, slow))
    assert (fast.limit, made.limit) == ("arithmetic", "communication")
    # What runs beside the arithmetic costs nothing until it takes longer.
    assert fast.step_seconds == pytest.approx(sum(max(p.arithmetic, p.launching) for p in fast.phases), rel=0.01)


def test_the_backward_pass_waits_for_deepspeeds_hooks_on_each_parameter() -> None:
    """So many parameters have the student of ViT-B and its two decoders."""
    hooks = {}
    for stage in (2, 3):
        cluster = make_cluster("H100", 8, 8, attention=None, efficiency=None, video=FAST_DECODING, videos=240_000)
        made = make_plan("distill/b_from_b", with_stage([], stage), cluster)
        forward, backward = (phase.launching for phase in made.phases if phase.phase in ("forward", "backward"))
        assert made.tensors == 226
        hooks[stage] = (backward - 2 * forward) / made.parallel.accumulation
    assert hooks[2] == pytest.approx(226 * 50e-6)
    assert hooks[3] == pytest.approx(226 * 115e-6)


def test_the_best_micro_batch_is_the_fastest_that_fits() -> None:
    made = plan("distill/h_from_h", "--training.gradient_checkpointing", "none", gpu="V100", gpus=8)
    assert [candidate.micro for candidate in made.candidates] == [1, 2, 4, 8, 16, 32, 64]
    usable = usable_memory(GPUS["V100"])
    assert [candidate.fits for candidate in made.candidates] == [c.memory <= usable for c in made.candidates]
    assert not made.candidates[-1].fits
    fitting = [candidate for candidate in made.candidates if candidate.fits]
    assert made.best.clips_per_second == max(candidate.clips_per_second for candidate in fitting)
    memory = [candidate.memory for candidate in made.candidates]
    assert memory == sorted(memory)


def test_gradient_checkpointing_trades_time_for_memory() -> None:
    made = plan("distill/h_from_h", gpu="H100", gpus=8)
    none, block, attention = (made.policies[name] for name in ("none", "block", "attention"))
    assert none.memory > attention.memory > block.memory == made.memory.peak
    assert none.clips_per_second > attention.clips_per_second > block.clips_per_second == made.clips_per_second
    assert none.recomputed == 0 < attention.recomputed < block.recomputed == sum(p.recomputed for p in made.flops)
    assert none.activations > attention.activations > block.activations
    assert re.search(r"block .* the recipe's", to_text(made))


def test_a_micro_batch_that_does_not_fit_gives_way_to_the_largest_that_does() -> None:
    made = plan("finetune/l_k400", "--training.micro_batch", "128", gpu="V100", gpus=4)
    assert made.recipe_micro == 128
    assert made.parallel.micro == max(candidate.micro for candidate in made.candidates if candidate.fits) < 128
    assert "the recipe's micro batch of 128 does not fit" in to_text(made)


def test_micro_batches_hold_whole_sets_of_copies() -> None:
    recipe = load_recipe("distill/b_from_b", ["--data.copies", "2", "--training.global_batch", "96"])
    assert micro_batches(recipe, 8) == [2, 4, 6, 12]


def test_the_papers_run_stands_beside_the_plan() -> None:
    """57 hours on 32 V100, and where they went; other runs have nothing to stand beside."""
    made = plan(gpu="V100", gpus=32)
    comparison = made.comparison
    assert comparison is not None
    assert comparison.published == 57
    assert comparison.computing + comparison.decoding == pytest.approx(made.run_hours)
    # VideoMAE: 240 k videos x 1600 epochs in 214 hours; MVD has 400 epochs.
    assert comparison.loading == pytest.approx(214 / 4, rel=0.01)
    longer = max(comparison.computing + comparison.plain_attention, comparison.loading)
    assert longer + comparison.unexplained == pytest.approx(57)
    assert abs(comparison.unexplained) < 0.1 * 57
    assert "57.0 h on 32 V100" in to_text(made)
    assert plan(gpu="V100", gpus=16).comparison is None
    assert plan("distill/b_from_l", gpu="V100", gpus=32).comparison is None


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("recipe", ["distill/s_from_b", "distill/h_from_h_800", "pretrain/mae_l", "finetune/b_k400"])
def test_every_gpu_and_kind_of_recipe_has_a_plan(recipe: str, gpu: str) -> None:
    made = plan(recipe, gpu=gpu, gpus=32)
    assert 0 < made.arithmetic_share < 1
    assert made.memory.peak < made.memory_usable
    assert made.recipe in to_text(made)


def run(*words: str) -> Any:
    return CliRunner().invoke(cli, ["plan", *words])


def test_text_and_json_say_the_same() -> None:
    words = ["--recipe", "distill/b_from_b", "--gpu", "a100", "--gpus", "16"]
    told, text = json.loads(run(*words, "--json").stdout), run(*words).stdout
    assert told["cluster"]["gpu"]["name"] == "A100"
    assert sum(told["memory"]["parts"].values()) == told["memory"]["peak"]
    assert f"{told['clips_per_second']:.0f} clips/s" in text
    assert f"run {told['run_hours']:.1f} h" in text
    assert f"the limit is {told['limit']}" in text
    assert "assumptions" in text
    assert {part["part"] for part in told["flops"]} == {
        "patch embedding", "encoder", "image decoder", "video decoder", "image teacher", "video teacher"
    }  # fmt: skip


def test_an_efficiency_of_ones_own_replaces_the_assumed_one() -> None:
    words = ["--recipe", "distill/h_from_h", "--gpus", "8", "--keyframes", "8", "--json"]
    slow, fast = (json.loads(run(*words, "--efficiency", share).stdout) for share in ("0.1", "0.2"))
    assert fast["clips_per_second"] == pytest.approx(2 * slow["clips_per_second"], rel=0.02)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "P100"], "one of V100, A100, H100, H200, B200"),
        (["--gpus", "0"], "0 is not in the range"),
        (["--gpus", "12"], "use 8 or 16 GPUs"),
        (["--gpus", "24"], "Start 16 or 32 ranks"),
        (["--gpu", "V100", "--training.precision", "bf16"], "V100 has no bf16"),
        (["--gpu", "V100", "--attention", "flash-attn"], "V100 supports sdpa only"),
        (["--gpu", "A100", "--teachers.precision", "fp8"], "A100: precision fp8 needs a GPU of the kind Ada"),
        (["--teachers.precision", "int8"], "H100: precision int8 is for CPUs"),
        (["--stage", "2", "--training.deepspeed=zero3"], "--stage cannot be combined with --training.deepspeed"),
        (["--videos", "9"], "no whole global batch of 1024"),
        (["--targets.image.model", "null"], "targets.image.model is missing"),
        (["--training.typo", "3"], "training.typo: unknown key"),
        (["--recipe", "detection/b_ava"], "is a recipe of action detection"),
        (["--recipe", "finetune/own_videos"], "--classifier.classes N"),
    ],
)
def test_bad_input_ends_in_one_message(words: list[str], said: str) -> None:
    given = words if "--recipe" in words else ["--recipe", "distill/b_from_b", *words]
    result = run(*given)
    assert said in (str(result.exception) if isinstance(result.exception, UserError) else result.output)
    assert result.exit_code != 0


def test_what_stage_3_refuses_does_not_keep_it_from_being_named() -> None:
    big = ["--model.size", "null", "--model.width", "4096", "--model.depth", "40", "--model.heads", "32"]
    asked = ["--training.batch_decoders", "true", "--training.compile", "true"]
    with pytest.raises(UserError, match=r"changes that fit: .*--stage 3"):
        plan("distill/b_from_b", *big, *asked, gpu="V100", gpus=32)


def test_what_fits_on_no_micro_batch_says_what_would() -> None:
    big = ["--model.size", "null", "--model.width", "4096", "--model.depth", "40", "--model.heads", "32"]
    with pytest.raises(UserError) as caught:
        plan("pretrain/videomae_b_k400", *big, gpu="V100", gpus=16)
    message = str(caught.value)
    assert "even with a micro batch of 1" in message
    wanted = message.partition("changes that fit: ")[2].split(", or ")
    assert "--stage 3" in wanted
    assert "--training.gradient_checkpointing block" not in wanted
    assert "--gpu B200" in wanted
    for words in wanted:
        changed = words.split()
        if changed[0] == "--gpu":
            plan("pretrain/videomae_b_k400", *big, gpu=changed[1], gpus=16)
        else:
            plan("pretrain/videomae_b_k400", *big, *with_stage(changed[2:], 3), gpu="V100", gpus=16)


def test_several_students_are_their_sum_with_the_teachers_once() -> None:
    """The teachers of the two recipes are the same, and are not prefetched here, which would hide their phases."""
    words = ("--teachers.prefetch", "false", "--teachers.cuda_graphs", "false")
    both, small, large = (plan(f"distill/{name}_from_b", *words) for name in ("sb", "s", "b"))
    assert both.parameters == small.parameters + large.parameters
    assert both.memory.parts["teachers"] == large.memory.parts["teachers"]
    for part in ("weights", "optimizer"):
        assert both.memory.parts[part] == small.memory.parts[part] + large.memory.parts[part]
    # One student after the other: the activations of the larger alone.
    assert both.memory.parts["activations"] == large.memory.parts["activations"]
    assert both.memory.peak < small.memory.peak + large.memory.peak
    assert both.memory.phases["image teacher"].get("activations", 0) == 0
    teachers = {part.part: part.total for part in large.flops if part.part.endswith("teacher")}
    flops = [sum(part.total for part in made.flops) for made in (both, small, large)]
    assert flops[0] == flops[1] + flops[2] - sum(teachers.values())
    assert teachers.items() <= {part.part: part.total for part in both.flops}.items()
    seconds = [sum(phase.seconds for phase in made.phases) for made in (both, small, large)]
    once = next(phase.seconds for phase in large.phases if phase.phase == "teachers")
    assert seconds[0] == pytest.approx(seconds[1] + seconds[2] - once)
    text = to_text(both)
    assert "s: placement on 8 x H100" in text
    assert "b: video decoder" in text
    assert "s: backward" in text
    assert [phase.label for phase in both.phases].count("teachers") == 1


def test_a_smaller_micro_batch_is_that_of_all_students() -> None:
    made = plan("distill/sbl_from_l", "--training.micro_batch", "128", gpu="V100")
    assert made.parallel.micro < 128
    assert {placement.micro_batch.value for placement in made.students.values()} == {made.parallel.micro}
