"""Features on disk: those of the encoder, once per view, for any number of ranks and after any interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from mvd_scale.checkpoints.weights import load_encoder, save_weights
from mvd_scale.config import ModelConfig
from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.loaders.view_loader import ViewLoader, ViewShape, view_items
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.models import Encoder

from .conftest import Jobs

pytestmark = pytest.mark.slow

MODEL = ModelConfig(width=48, depth=3, heads=3, frames=4, input_size=48)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    save_weights(path, Encoder(MODEL).state_dict(), MODEL)
    return path


def test_they_are_those_of_the_encoder(jobs: Jobs, clips: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    arguments = (
        "features",
        weights,
        clips,
        "--out",
        out,
        "--layer",
        "2",
        "--pool",
        "time",
        "--clips",
        "2",
        "--shard",
        "6",
    )
    code, output = jobs.run(*arguments)
    assert code == 0, output
    assert "features of 40 views" in output

    manifest, views = build_manifest(clips, workers=1), ViewsConfig(clips=2, crops=1)
    encoder = load_encoder(weights, final_norm=False).eval()
    del encoder.blocks[2:]
    items = view_items(manifest, views, frames=4)
    shape, rank = ViewShape(4, 48), DataRank(torch.device("cpu"))
    loader = ViewLoader(manifest, DataConfig(workers=0), views, items, shape=shape, batch=20, rank=rank)
    with loader, torch.no_grad():
        pixels = next(loader).pixels.flatten(0, 2)
        expected = encoder(pixels).unflatten(1, (2, 9)).mean(2)
    index = pq.read_table(out / "index.parquet").to_pylist()
    shards = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    assert len(shards) == 4
    written = torch.stack([shards[row["shard"]]["features"][row["row"]] for row in index])
    torch.testing.assert_close(written, expected, atol=1e-5, rtol=1e-5)
    assert [row["name"] for row in index[::2]] == manifest.name
    assert [row["clip"] for row in index[:4]] == [0, 1, 0, 1]

    # Cut off and started again, only what is missing is made; asked for something else, it refuses.
    before = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    lost = out / "features_000002.safetensors"
    lost.unlink()
    code, output = jobs.run(*arguments)
    assert code == 0, output
    assert "3 of 4 shards were written before" in output
    assert {f for f in before if f.stat().st_mtime_ns != before[f]} == {lost}
    code, output = jobs.run(*arguments, "--no-norm")
    assert code == 2
    assert "norm True, but this command has norm False" in output


def test_ranks_share_the_work(jobs: Jobs, clips: Path, weights: Path, tmp_path: Path) -> None:
    broken = tmp_path / "clips"
    broken.mkdir()
    for file in sorted(clips.iterdir())[:7]:
        (broken / file.name).write_bytes(file.read_bytes())
    manifest = tmp_path / "clips.parquet"
    build_manifest(broken, workers=1).save(manifest)
    sorted(broken.iterdir())[3].unlink()
    tables = []
    for ranks in (1, 2):
        out = tmp_path / f"by{ranks}"
        sliding = ("--sampling", "sliding", "--stride", "2", "--every", "8", "--clips", "3")
        code, output = jobs.run(
            "features", weights, manifest, "--out", out, "--format", "parquet", "--shard", "2", *sliding, ranks=ranks
        )
        assert code == 0, output
        assert "1 videos cannot be decoded" in output
        files = sorted(out.glob("features_*.parquet"))
        tables.append([row for file in files for row in pq.read_table(file).to_pylist()])
        assert json.loads(pq.read_schema(files[0]).metadata[b"shape"]) == [48]
        assert len(list(out.glob("quarantine.jsonl"))) == 1
    one, two = tables
    assert len(one) > 20
    assert {row["video"] for row in one} == set(range(7)) - {3}
    assert [{k: v for k, v in row.items() if k != "features"} for row in one] == [
        {k: v for k, v in row.items() if k != "features"} for row in two
    ]
    features = [torch.tensor([row["features"] for row in rows]) for rows in tables]
    torch.testing.assert_close(*features, atol=1e-5, rtol=1e-5)
