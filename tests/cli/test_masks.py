"""`simmim masks` as a person calls it."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from simmim_scale.cli.app import app


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["masks", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_prints_the_distance_of_a_setting_and_solves_for_another():
    report = json.loads(call("--image-size", "64", "--cell", "16", "--ratio", "0.5", "--solve", "6", "--json"))
    assert (report["hidden_cells"], report["mask_cells"]) == (8, 16)
    assert 4 < report["avg_dist"] < 12
    best = report["solutions"][0]
    assert best["distance"] == pytest.approx(6.0, abs=0.3)
    assert {solution["sampler"] for solution in report["solutions"]} == {"random", "block", "square"}


def test_lays_masks_over_a_picture_and_draws_the_axis(tmp_path):
    Image.fromarray(np.full((90, 120, 3), 40, np.uint8)).save(tmp_path / "photo.png")
    arguments = ("--image-size", "64", "--cell", "16", "--photo", str(tmp_path / "photo.png"))
    text = call(*arguments, "--out", str(tmp_path / "out.png"), "--axis", str(tmp_path / "axis.png"))
    assert "10 of 16 cells hidden" in text
    assert "out.png" in text
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    hidden = (picture == (205, 205, 210)).all(-1)
    dark = (picture == 40).all(-1)
    # Five masks that hide 10 of 16 cells beside one whole picture: 50 hidden cells to 46 dark ones.
    assert hidden.sum() / dark.sum() == pytest.approx(50 / 46, rel=0.02)
    assert Image.open(tmp_path / "axis.png").width > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cell", "20"), "must divide the image"),
        (("--cell", "64", "--ratio", "0.95"), "hides every cell"),
        (("--ratio", "1.5"), "mask.ratio"),
        (("--sampler", "stripes"), "mask.sampler"),
        (("--photo", "nowhere.jpg"), "cannot read nowhere.jpg"),
        (("--solve", "0"), "positive number of pixels"),
    ],
)
def test_wrong_input_is_one_message(arguments, message):
    assert message in call(*arguments, code=2)
