"""No code of a file is run, and every fault of a file gives one clear message."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pickle
import random
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mvd_scale.checkpoints import Hints, build_encoder, describe_checkpoint, load_encoder, read_checkpoint, to_published
from mvd_scale.checkpoints.native import save_weights
from mvd_scale.config import ModelConfig
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder

SHAPE = ModelConfig(width=32, depth=2, heads=2, frames=4, input_size=32, positions="sinusoid")
HINTS = Hints(heads=2, frames=4, input_size=32)


@pytest.fixture
def published(tmp_path: Path) -> dict[str, Tensor]:
    """An encoder under VideoMAE's names."""
    path = tmp_path / "native.safetensors"
    save_weights(path, Encoder(SHAPE).state_dict(), SHAPE)
    return to_published(read_checkpoint(path), "videomae")


class Bomb:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["beside", "inside"])
def test_a_pickle_that_carries_code_is_refused_and_nothing_runs(
    tmp_path: Path, published: dict[str, Tensor], where: str, zipped: bool
) -> None:
    marker, file = tmp_path / "marker", tmp_path / "teacher.pth"
    bomb = Bomb(f"touch {marker}")
    content: dict[str, Any] = {"model": dict(published), "args": bomb}
    if where == "inside":
        content = {"model": {**published, "blocks.9.bomb": bomb}}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="contains code") as error:
        read_checkpoint(file, HINTS)
    assert not marker.exists()
    assert "save_file" in str(error.value)
    torch.load(file, weights_only=False)
    assert marker.exists(), "the bomb of this test is no bomb"


class Looked:
    """As Python 3.11.0 to 3.11.3 pickle the members of an enum."""

    def __init__(self, owner: object, name: str) -> None:
        self.found = owner, name

    def __reduce__(self) -> Any:
        return getattr, self.found


def test_a_dictionary_that_holds_itself_comes_to_an_end(tmp_path: Path) -> None:
    endless: dict[str, Any] = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "teacher.pth")
    with pytest.raises(UserError, match="holds no tensors"):
        read_checkpoint(tmp_path / "teacher.pth", HINTS)


def test_members_of_enums_are_read_as_nothing_and_no_attribute_is_looked_up(
    tmp_path: Path, published: dict[str, Tensor]
) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    file = tmp_path / "teacher.pth"
    torch.save({"model": published, "stage": Looked(ZeroStageEnum, "weights"), "none": Looked(1, "nothing")}, file)
    assert set(read_checkpoint(file, HINTS).encoder)


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "teacher.pth"
    for protocol in (2, 4):
        file.write_bytes(pickle.dumps(Bomb(f"touch {marker}"), protocol=protocol))
        with pytest.raises(UserError):
            read_checkpoint(file, HINTS)
    assert not marker.exists()


def test_what_published_files_carry_beside_weights_is_harmless(tmp_path: Path, published: dict[str, Tensor]) -> None:
    beside = {
        "args": argparse.Namespace(lr=1e-3, output=Path("runs"), nested=argparse.Namespace(a=1)),
        "max_accuracy": np.float64(81.5),
        "history": np.zeros(3),
        "epoch": 1599,
    }
    torch.save({"model": published, **beside}, tmp_path / "a.pth")
    assert not describe_checkpoint(read_checkpoint(tmp_path / "a.pth", HINTS)).count("surplus")


@pytest.mark.parametrize("name", ["a.safetensors", "zipped.pth", "legacy.pth"])
def test_a_file_cut_short_is_named(tmp_path: Path, published: dict[str, Tensor], name: str) -> None:
    file = tmp_path / name
    if name.endswith("safetensors"):
        save_file({n: t.contiguous() for n, t in published.items()}, file)
    else:
        torch.save({"model": published}, file, _use_new_zipfile_serialization=name == "zipped.pth")
    whole = file.read_bytes()
    assert read_checkpoint(file, HINTS).model == SHAPE
    for share in (0, 0.001, 0.01, 0.3, 0.7, 0.999):
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match=name):
            read_checkpoint(file, HINTS)


@pytest.mark.parametrize("name", ["a.safetensors", "zipped.pth", "legacy.pth"])
def test_flipped_bytes_end_in_a_user_error_or_in_tensors(
    tmp_path: Path, published: dict[str, Tensor], name: str
) -> None:
    file, chance = tmp_path / name, random.Random(0)
    if name.endswith("safetensors"):
        save_file({n: t.contiguous() for n, t in published.items()}, file)
    else:
        torch.save({"model": published}, file, _use_new_zipfile_serialization=name == "zipped.pth")
    whole = file.read_bytes()
    for _ in range(150):
        broken = bytearray(whole)
        for _ in range(3):
            broken[chance.randrange(min(len(broken), 9000))] = chance.randrange(256)
        file.write_bytes(broken)
        with suppress(UserError):
            describe_checkpoint(read_checkpoint(file, HINTS))


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"path,label\na.mp4,0\n", "neither a safetensors"), (b"", "empty"), (b"<html>", "a page of a server")],
)
def test_a_text_file_is_no_checkpoint(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "teacher.pth"
    file.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_checkpoint(file)


def _zip(*members: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member in members:
            archive.writestr(member, b"")
    return out.getvalue()


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return out.getvalue()


@pytest.mark.parametrize("name", ["teacher.pth", "teacher.safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "a page of a server"),
        (gzip.compress(b"weights"), "compressed by gzip: unpack it"),
        (_tar(), "a tar archive: unpack it"),
        (_zip("weights.pth"), "a zip archive: unpack it"),
        (_zip("cls_token.npy"), "an archive of numpy"),
        (_zip("net/data.pkl", "net/constants.pkl"), "a program of TorchScript"),
        (_zip("net/archive_format", "net/data/weights/model.pt"), "a program of `torch.export`"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    ],
    ids=["lfs", "page", "gzip", "tar", "zip", "npz", "script", "export", "hdf5"],
)
def test_what_is_no_checkpoint_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_checkpoint(file)


def test_a_file_under_the_name_of_the_other_format(tmp_path: Path, published: dict[str, Tensor]) -> None:
    torch.save({"model": published}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"a file of `torch.save` under .*: rename it to \.pth"):
        read_checkpoint(tmp_path / "weights.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in published.items()}, tmp_path / "weights.pth")
    assert read_checkpoint(tmp_path / "weights.pth", HINTS).format == "videomae"


def test_a_folder_of_other_files_names_them(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "checkpoint-799.pth")
    with pytest.raises(UserError, match=r"give the file itself, such as .*checkpoint-799\.pth"):
        read_checkpoint(tmp_path)


def test_nothing_there_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.pth does not exist"):
        read_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="holds no checkpoint"):
        read_checkpoint(tmp_path)
    torch.save({"model": {}}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds no tensors"):
        read_checkpoint(tmp_path / "empty.pth")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="no known format"):
        read_checkpoint(tmp_path / "other.pth")


def test_all_faults_of_a_published_file_are_named_at_once(tmp_path: Path, published: dict[str, Tensor]) -> None:
    del published["blocks.0.norm1.bias"]
    published["blocks.1.attn.proj.weight"] = torch.zeros(3, 3)
    published["blocks.1.attn.q_bias"] = torch.full((32,), float("nan"))
    published["blocks.0.ls1.gamma"] = torch.ones(32)
    published["rope.freqs"] = torch.ones(3)
    torch.save(published, tmp_path / "broken.pth")
    expected = (
        "missing blocks.0.norm1.bias",
        "blocks.1.attn.proj.weight is (3, 3), expected (32, 32)",
        "blocks.1.attn.qkv.q_bias holds values that are not finite",
        "surplus blocks.0.ls1.gamma",
        "surplus rope.freqs",
    )
    with pytest.raises(UserError) as error:
        load_encoder(tmp_path / "broken.pth", final_norm=True, hints=HINTS)
    description = describe_checkpoint(read_checkpoint(tmp_path / "broken.pth", HINTS))
    for fault in expected:
        assert fault in str(error.value)
        assert fault in description


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict"])
@pytest.mark.parametrize("prefix", ["module.", "backbone.", "encoder.", "model.", "module.model.", "module.encoder."])
def test_wrappers_and_prefixes_come_off(
    tmp_path: Path, published: dict[str, Tensor], wrapper: str, prefix: str
) -> None:
    torch.save({wrapper: {prefix + name: tensor for name, tensor in published.items()}}, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth", HINTS)
    assert (checkpoint.format, checkpoint.model) == ("videomae", SHAPE)
    build_encoder(checkpoint, final_norm=True)


def test_a_backbone_beside_a_foreign_head_is_found_and_the_head_named(
    tmp_path: Path, published: dict[str, Tensor]
) -> None:
    tensors = {f"backbone.{name}": tensor for name, tensor in published.items()}
    torch.save({"state_dict": {**tensors, "cls_head.fc_cls.weight": torch.zeros(5, 32)}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"surplus cls_head\.fc_cls\.weight") as error:
        load_encoder(tmp_path / "a.pth", final_norm=True, hints=HINTS)
    assert len(str(error.value).splitlines()) == 2


def test_unknown_heads_are_asked_for(tmp_path: Path, published: dict[str, Tensor]) -> None:
    torch.save(published, tmp_path / "a.pth")
    with pytest.raises(UserError, match="--heads"):
        read_checkpoint(tmp_path / "a.pth")


def test_shards_with_an_index(tmp_path: Path, published: dict[str, Tensor]) -> None:
    names = sorted(published)
    places = {name: f"model-{1 + (i > 7)}.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({n: published[n].contiguous() for n in names if places[n] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    for path in (tmp_path, index):
        build_encoder(read_checkpoint(path, HINTS), final_norm=True)
    index.write_text(json.dumps({"weight_map": {**places, "more": "model-1.safetensors"}}))
    with pytest.raises(UserError, match="do not contain: more"):
        read_checkpoint(tmp_path, HINTS)
    (tmp_path / "elsewhere.safetensors").symlink_to(tmp_path / "model-1.safetensors")
    index.write_text(json.dumps({"weight_map": {**places, "more": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="is not in the same folder"):
        read_checkpoint(tmp_path, HINTS)
