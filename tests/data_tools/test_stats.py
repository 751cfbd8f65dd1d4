"""Statistics are those that numpy finds on the same images; pictures are drawn."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_tools import cli
from data_tools.plan import ShardOptions
from data_tools.sharding import write_shards
from data_tools.sources.folder import list_folder
from data_tools.stats import choose, measure
from simmim_scale.data.shards import ShardIndex
from tests.data_tools.layouts import fill, picture

FILES = {f"{'cat' if i % 3 else 'dog'}/{i}.png": picture(i, "PNG", size=(10 + i, 20)) for i in range(12)}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(list_folder(fill(tmp_path / "src", FILES)), tmp_path / "set", ShardOptions(5))
    return tmp_path / "set"


@pytest.mark.parametrize("jobs", [1, 2])
def test_numbers_are_those_of_all_images(shards: Path, jobs: int) -> None:
    stats = measure(ShardIndex.load(shards), images=0, jobs=jobs).as_json()
    pixels = np.concatenate([np.asarray(Image.open(io.BytesIO(data))).reshape(-1, 3) for data in FILES.values()]) / 255
    np.testing.assert_allclose(stats["mean"], pixels.mean(0), atol=1e-5)
    np.testing.assert_allclose(stats["std"], pixels.std(0), atol=1e-5)
    assert stats["classes"] == {"cat": 8, "dog": 4}
    assert (stats["samples"], stats["shards"], stats["measured_images"], stats["broken_images"]) == (12, 3, 12, 0)
    assert (stats["width"]["least"], stats["width"]["largest"], stats["height"]["median"]) == (10, 21, 20)
    assert stats["image_bytes"]["largest"] == max(map(len, FILES.values()))


def test_the_command_prints_and_draws(shards: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["stats", str(shards), "--jobs", "1"])
    assert result.exit_code == 0, result.output
    assert "smallest dog with 4, largest cat with 8" in result.output.replace("\n", " ")
    out = tmp_path / "set_stats"
    assert json.loads((out / "stats.json").read_text())["samples"] == 12
    for name in ("stats.png", "samples.png"):
        with Image.open(out / name) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 10
    assert not list(shards.glob("*stats*"))


def test_broken_images_are_counted(tmp_path: Path) -> None:
    files = {"a.jpg": picture(0), "b.jpg": b"bad"}
    write_shards(list_folder(fill(tmp_path / "src", files)), tmp_path / "set", ShardOptions(undecodable="keep"))
    stats = measure(ShardIndex.load(tmp_path / "set")).as_json()
    assert (stats["measured_images"], stats["broken_images"], stats["classes"]) == (1, 1, None)


def test_the_choice_is_seeded_and_has_no_repeats() -> None:
    assert (choose(100, 20, 1) == choose(100, 20, 1)).all()
    assert len(set(choose(100, 20, 1).tolist())) == 20
    assert choose(5, 20, 1).tolist() == [0, 1, 2, 3, 4]
