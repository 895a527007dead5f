"""The operators in C++ against plain torch, and the conditions under which they are used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mvd_kernels import attention, attention_backend, attention_backends
from mvd_kernels.native import attention as native
from mvd_kernels.native import library as native_library
from mvd_kernels.quantize import quantize
from mvd_kernels.reference.attention import attention as reference
from mvd_kernels.reference.quantize import quantize as plain_quantize
from tests.kernels.checks import check_attention

CPU = torch.device("cpu")
refused = native.unsupported_reason(CPU, torch.bfloat16, 64)
on_bf16_cpus = pytest.mark.skipif(bool(refused), reason=refused)
WORKING = Path(getattr(native_library.library(), "_name", ""))
compiled = pytest.mark.skipif(native_library.library() is None, reason=native_library.build_error())


@on_bf16_cpus
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("clips", "tokens", "heads", "channels", "queries"),
    [
        (2, 37, 3, 64, 37),  # neither a multiple of the rows nor of the columns that go together
        (1, 5, 2, 96, 5),
        (3, 33, 1, 128, 1),
        (1, 197, 2, 32, 197),
        (2, 300, 2, 80, 100),  # two tiles of keys, two of queries
    ],
)
def test_attention_is_that_of_float32(
    clips: int, tokens: int, heads: int, channels: int, queries: int, threads: int
) -> None:
    shape = (clips, tokens, 3, heads, channels)
    check_attention(lambda qkv: attention_of(qkv, queries, threads), shape, queries)


def attention_of(qkv: torch.Tensor, queries: int, threads: int) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return attention(qkv, queries)
    finally:
        torch.set_num_threads(before)


@on_bf16_cpus
def test_scores_of_any_size_are_softened() -> None:
    qkv = torch.zeros(1, 40, 3, 1, 32)
    qkv[..., 0] = torch.linspace(-200, 200, 40).view(1, 40, 1, 1)
    qkv = qkv.bfloat16()
    torch.testing.assert_close(attention(qkv).float(), reference(qkv.float()), rtol=0.01, atol=1e-3)


@on_bf16_cpus
def test_low_scores_have_finite_gradients_beside_padding() -> None:
    qkv = torch.zeros(1, 40, 3, 1, 32)
    qkv[:, :, 0, :, 0], qkv[:, :, 1, :, 0], qkv[:, :, 2] = 40, -40, torch.randn(1, 40, 1, 32)
    ours, true = qkv.bfloat16().requires_grad_(), qkv.bfloat16().float().requires_grad_()
    attention(ours).square().sum().backward()
    reference(true).square().sum().backward()
    assert ours.grad is not None
    assert true.grad is not None
    torch.testing.assert_close(ours.grad[:, :, 2].float(), true.grad[:, :, 2], rtol=0.02, atol=1e-3)
    assert ours.grad.isfinite().all()


@on_bf16_cpus
def test_no_clips_no_tokens_and_too_many_queries() -> None:
    for shape in ((0, 5, 3, 2, 32), (2, 0, 3, 2, 32)):
        qkv = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
        attention(qkv).sum().backward()
        assert qkv.grad is not None
    qkv = torch.randn(1, 5, 3, 2, 32).bfloat16()
    torch.testing.assert_close(attention(qkv, 9), attention(qkv))


@compiled
def test_the_dtype_of_new_tensors_does_not_matter() -> None:
    sequences = torch.randn(2, 5, 7)
    expected = quantize(sequences, 255)
    torch.set_default_dtype(torch.float64)
    try:
        found = quantize(sequences, 255)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@on_bf16_cpus
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(value: float) -> None:
    qkv = torch.randn(2, 40, 3, 1, 32).bfloat16()
    qkv[1, 3, 1, 0, 5] = value
    result = attention(qkv)
    assert result[0].isfinite().all()
    assert result[1].isnan().any()


@on_bf16_cpus
def test_a_view_of_a_larger_tensor_is_read_as_it_is() -> None:
    qkv = torch.randn(2, 3, 40, 2, 64).bfloat16().permute(0, 2, 1, 3, 4)
    torch.testing.assert_close(attention(qkv).float(), reference(qkv.float()), rtol=0.01, atol=0.01)


def test_what_it_does_not_compute_is_left_to_torch() -> None:
    assert attention_backends(CPU, torch.float32) == {"native": "not for torch.float32", "sdpa": ""}
    assert attention_backends(CPU, torch.bfloat16, 40) == {"native": "not for heads of 40 channels", "sdpa": ""}
    assert attention_backend(torch.device("meta"), torch.bfloat16) == "sdpa"


@compiled
@pytest.mark.parametrize("levels", [255, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_is_its_twin(dtype: torch.dtype, levels: int) -> None:
    sequences = torch.randn(5, 331, 113, generator=torch.Generator().manual_seed(0)).to(dtype)
    sequences[1] = 0
    sequences[2] = sequences[2].abs() + 5
    sequences[3, 7, 7] = float("inf")
    sequences[4, 330, 112] = float("nan")
    ours, expected = quantize(sequences, levels), plain_quantize(sequences, levels)
    assert ours[1].isnan().tolist() == [False, False, False, True, True]
    torch.testing.assert_close(ours[1], expected[1], equal_nan=True)
    assert torch.equal(ours[2][:3], expected[2][:3])
    # What lies between two levels may go to either.
    assert (ours[0][:3].int() - expected[0][:3].int()).abs().max() <= 1
    assert (ours[0][:3] != expected[0][:3]).float().mean() < 0.001


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A home without a compiled library."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    native_library._build.cache_clear()
    yield tmp_path
    native_library._build.cache_clear()


def test_without_a_compiler_the_reason_is_named(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(elsewhere))
    assert native_library.library() is None
    assert "install g++" in native_library.build_error()
    sequences = torch.ones(1, 3, 4)
    torch.testing.assert_close(quantize(sequences, 255), plain_quantize(sequences, 255))


def test_a_compiler_that_fails_is_quoted(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = elsewhere / "c++"
    compiler.write_text("#!/bin/sh\necho no such instruction >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{elsewhere}:/usr/bin:/bin")
    assert native_library.library() is None
    assert native_library.build_error().endswith("no such instruction")


def test_a_home_that_cannot_be_written_is_no_crash(elsewhere: Path) -> None:
    (elsewhere / ".cache").write_text("not a folder")
    assert native_library.library() is None
    assert ".cache" in native_library.build_error()


@compiled
def test_ranks_that_compile_at_once_keep_what_the_first_has_made(
    elsewhere: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path_factory.mktemp("first") / "made.so"
    first.write_bytes(WORKING.read_bytes())
    # While this one compiles, another rank is done.
    compiler = elsewhere / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && out="$2"; shift; done\n'
        '[ -z "$out" ] && exit 0\n'
        f'cp {first} "$out" && cp {first} "$(dirname "$out")/../$(basename "$out")" && '
        f'stat -c %i "$(dirname "$out")/../$(basename "$out")" >{elsewhere}/first\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{elsewhere}:/usr/bin:/bin")
    assert native_library.library() is not None
    (file,) = (elsewhere / ".cache" / "mvd_kernels").iterdir()
    assert file.stat().st_ino == int((elsewhere / "first").read_text())
