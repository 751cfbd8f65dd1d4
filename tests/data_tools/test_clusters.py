"""RGB centres of a set of shards: found where the colours are, saved as the target reads them, refused where they cannot be."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_tools import cli
from data_tools.clusters import fit_clusters
from data_tools.plan import ShardOptions
from data_tools.sharding import write_shards
from data_tools.sources.folder import list_folder
from simmim_scale.data.shards import ShardIndex
from simmim_scale.objectives.colour_targets import read_centres
from tests.data_tools.layouts import fill

COLOURS = np.array([[10, 20, 30], [200, 40, 60], [90, 220, 120], [240, 240, 250]], dtype=np.uint8)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Pictures of four flat colours with a little noise."""
    rng = np.random.default_rng(0)
    files = {}
    for number in range(8):
        pixels = COLOURS[rng.integers(4, size=(12, 12))].astype(int) + rng.integers(-3, 4, size=(12, 12, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
        files[f"{number}.png"] = file.getvalue()
    write_shards(list_folder(fill(tmp_path / "src", files)), tmp_path / "set", ShardOptions(5))
    return tmp_path / "set"


def test_centres_lie_where_the_colours_are(shards: Path) -> None:
    palette = fit_clusters(ShardIndex.load(shards), centres=4, pixels=50)
    expected = COLOURS[COLOURS.sum(1).argsort()] / 127.5 - 1
    np.testing.assert_allclose(palette.centres, expected, atol=0.02)
    assert palette.pixels == 400
    assert 2 < palette.distance < 5
    again = fit_clusters(ShardIndex.load(shards), centres=4, pixels=50, jobs=1)
    assert np.array_equal(palette.centres, again.centres)


def test_command_writes_what_the_target_reads(shards: Path, tmp_path: Path) -> None:
    arguments = ["fit-clusters", str(shards), "--out", str(tmp_path / "c.npy"), "--centres", "4", "--jobs", "1"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "objective.target=clusters" in result.output
    assert read_centres(tmp_path / "c.npy").shape == (4, 3)
    assert "is there already" in str(CliRunner().invoke(cli.app, arguments).exception)


def test_more_centres_than_colours_are_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match="need as many colours"):
        fit_clusters(ShardIndex.load(shards), centres=2000, pixels=10)
