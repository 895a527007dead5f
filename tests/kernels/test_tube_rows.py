"""Rows of chosen tokens against slices written out, the kernel against its reference."""

from __future__ import annotations

import pytest
import torch

from mvd_kernels import tube_rows

from .conftest import Evaluate
from .evaluation import Call, evaluate

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def clip(frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, frames, height, width, 3), dtype=torch.uint8, generator=generator)


def tube(pixels: torch.Tensor, row: int, token: int, tubelet: int, patch: int) -> torch.Tensor:
    rows, columns = pixels.shape[2] // patch, pixels.shape[3] // patch
    t, h, w = token // (rows * columns), token // columns % rows, token % columns
    cut = pixels[row, tubelet * t :, patch * h :, patch * w :][:tubelet, :patch, :patch]
    return cut.double() / 255


@pytest.mark.parametrize(
    ("frames", "height", "width", "tubelet", "patch"), [(4, 32, 48, 2, 16), (1, 14, 28, 1, 14), (6, 8, 8, 3, 4)]
)
def test_rows_of_chosen_tokens(frames: int, height: int, width: int, tubelet: int, patch: int) -> None:
    pixels = clip(frames, height, width)
    count = frames // tubelet * (height // patch) * (width // patch)
    tokens = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(i)) for i in (1, 2)])
    tokens = tokens[:, : max(count // 2, 1)]
    rows = tube_rows(pixels, tokens, tubelet=tubelet, patch=patch, mean=MEAN, std=STD, dtype=torch.float32)
    for clip_index in range(2):
        for place, token in enumerate(tokens[clip_index].tolist()):
            cut = tube(pixels, clip_index, token, tubelet, patch)
            white = (cut - torch.tensor(MEAN)) / torch.tensor(STD)
            torch.testing.assert_close(rows[clip_index, place].double(), white.flatten(), atol=1e-5, rtol=1e-5)


def test_no_tokens_named_means_all_in_order() -> None:
    pixels = clip(4, 32, 32)
    everything = torch.arange(8).expand(2, -1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        arguments = {"tubelet": 2, "patch": 16, "mean": MEAN, "std": STD, "dtype": dtype}
        named, all_of_them = tube_rows(pixels, everything, **arguments), tube_rows(pixels, None, **arguments)
        assert named.dtype == dtype
        assert torch.equal(named, all_of_them)


def test_floating_pixels_are_taken_as_they_are() -> None:
    pixels = clip(4, 32, 32)
    arguments = {"tubelet": 2, "patch": 16, "mean": MEAN, "std": STD, "dtype": torch.float32}
    torch.testing.assert_close(tube_rows(pixels.float() / 255, None, **arguments), tube_rows(pixels, None, **arguments))


def test_an_export_leaves_nothing_of_its_tracing_behind() -> None:
    class Rows(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            # A mean of its own: no other test has filled the cache for it.
            return tube_rows(pixels, None, tubelet=2, patch=16, mean=(0.1, 0.2, 0.3), std=STD, dtype=torch.float32)

    pixels = clip(4, 32, 32)
    exported = torch.export.export(Rows(), (pixels,)).module()(pixels)
    eager = Rows()(pixels)
    assert type(eager) is torch.Tensor
    assert torch.equal(exported, eager)


def test_tubes_that_do_not_fill_the_clip_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4, 32, 40, 3\).* 2 x 16 x 16"):
        tube_rows(clip(4, 32, 40), None, tubelet=2, patch=16, mean=MEAN, std=STD, dtype=torch.float32)


def assert_alike(
    kernel: Evaluate, pixels: torch.Tensor, tokens: torch.Tensor | None, compiled: bool = False, **keywords: object
) -> None:
    keywords = {"mean": MEAN, "std": STD, "dtype": torch.float32, **keywords}
    call = Call("tube_rows", (pixels, tokens), keywords, compiled=compiled)
    (result,), _ = kernel(call)
    (expected,), _ = evaluate(call, "reference")
    assert result.dtype == call.keywords["dtype"]
    # Triton's interpreter cuts float32 to bfloat16 where a GPU rounds: one unit in the last place.
    tolerance = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[result.dtype]
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_equals_twin(kernel: Evaluate, dtype: torch.dtype) -> None:
    tokens = torch.tensor([[0, 3, 11], [5, 7, 2]])
    assert_alike(kernel, clip(4, 10, 15), tokens, tubelet=2, patch=5, dtype=dtype)


@pytest.mark.parametrize(("frames", "height", "width", "tubelet", "patch"), [(1, 14, 28, 1, 14), (6, 8, 4, 3, 4)])
def test_kernel_takes_all_tokens_in_order(
    kernel: Evaluate, frames: int, height: int, width: int, tubelet: int, patch: int
) -> None:
    assert_alike(kernel, clip(frames, height, width), None, tubelet=tubelet, patch=patch)


def test_kernel_takes_floating_pixels_and_views(kernel: Evaluate) -> None:
    channels_first = clip(2, 8, 12).permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    tokens = torch.tensor([[0, 1], [2, 5], [3, 4]]).T
    assert_alike(kernel, channels_first, tokens, tubelet=2, patch=4)
    assert_alike(kernel, channels_first.half() / 255, tokens, tubelet=2, patch=4)
    assert_alike(kernel, clip(2, 8, 16)[:, :, :, 4:], tokens, tubelet=2, patch=4)


def test_a_compiled_program_keeps_the_kernel_whole(kernel: Evaluate) -> None:
    assert_alike(kernel, clip(4, 10, 15), torch.tensor([[0, 3], [5, 7]]), compiled=True, tubelet=2, patch=5)
