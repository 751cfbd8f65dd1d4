"""Pictures of one's own: as the model was tested, by name, from files, opened pictures and pixels; and every wrong input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import simmim_scale
from simmim_scale.cli.app import app
from simmim_scale.config.load import validate
from simmim_scale.config.yaml_source import Source
from simmim_scale.models.weights import save_weights
from simmim_scale.tasks.pretrained import CLASS_NAMES, assemble

NAMES = ["cat", "dog [brown]", "zebra"]
MODEL = {"name": "swin_v2", "image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}


def write_weights(directory, task="classification", facts=None, **sections):
    config = validate(Source(tree={"task": task, "model": MODEL, "mask": {"cell": 8}, **sections}))
    module = assemble(config, {"head.weight": torch.zeros(len(NAMES), 1)})
    generator = torch.Generator().manual_seed(2)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in module.state_dict().items()}
    return save_weights(directory, state, config.model_dump(mode="json"), facts)


@pytest.fixture
def weights(tmp_path):
    return write_weights(tmp_path / "weights", facts={CLASS_NAMES: json.dumps(NAMES)})


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(4)
    paths = []
    for number, size in enumerate([(40, 60), (32, 32), (200, 90)]):
        paths.append(tmp_path / f"photo {number}.png")
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def call(*arguments, code=0):
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_probabilities_are_those_of_the_tested_view(weights, photos):
    classifier = simmim_scale.load_classifier(weights)
    with Image.open(photos[0]) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    # test_crop 0.875 of the largest square, written out: 40 x 60 -> the middle 35 x 35
    cut = torch.from_numpy(pixels[2:37, 12:47].copy()).permute(2, 0, 1)[None]
    image = torch.nn.functional.interpolate(cut, (32, 32), mode=classifier.config.data.interpolation, antialias=True)
    expected = simmim_scale.load(weights)({"image": image})["logits"].softmax(-1)
    for picture in (photos[0], str(photos[0]), pixels, Image.fromarray(pixels)):
        torch.testing.assert_close(classifier.probabilities([picture]), expected)


def test_guesses_are_sorted_named_and_independent_of_the_batch(weights, photos):
    classifier = simmim_scale.load_classifier(weights)
    guesses = classifier.predict(photos, top=2)
    assert [len(row) for row in guesses] == [2, 2, 2]
    assert all(row[0].probability >= row[1].probability for row in guesses)
    assert all(guess.name == NAMES[guess.label] for row in guesses for guess in row)
    for one, row in zip(classifier.predict(photos, top=99, batch=1), guesses, strict=True):
        assert [guess.label for guess in one[:2]] == [guess.label for guess in row]
        assert sum(guess.probability for guess in one) == pytest.approx(1)
    assert classifier.predict([]) == []


def test_the_command_prints_text_and_json(weights, photos):
    text = call(weights, *photos, "--top", 1)
    assert all(str(path) in text for path in photos)
    assert any(name in text for name in NAMES)
    found = json.loads(call(weights, *photos, "--json"))
    assert list(found) == [str(path) for path in photos]
    assert {guess["name"] for guess in found[str(photos[0])]} == set(NAMES)


def test_classes_without_names_have_numbers(tmp_path, photos):
    text = call(write_weights(tmp_path / "nameless"), photos[0])
    assert "class 2" in text


def test_wrong_inputs_are_clear(weights, photos, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    assert "cannot be decoded" in call(weights, photos[0], tmp_path / "notes.txt", code=2)
    assert "No such file" in call(weights, tmp_path / "gone.jpg", code=2)
    assert "Is a directory" in call(weights, tmp_path, code=2)
    pretrained = write_weights(tmp_path / "pretrained", task="pretrain")
    assert "holds a pretrain model, which names no classes" in call(pretrained, photos[0], code=2)
    assert "no directory" in call(tmp_path / "nowhere", photos[0], code=2)
    assert "--top" in call(weights, photos[0], "--top", 0, code=2)
    classifier = simmim_scale.load_classifier(weights)
    for pixels in (np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected pixels"):
            classifier.predict([pixels])


def test_grey_models_take_colour_pictures(tmp_path, photos):
    grey = write_weights(tmp_path / "grey", model=MODEL | {"in_chans": 1}, data={"mean": [0.5], "std": [0.2]})
    classifier = simmim_scale.load_classifier(grey)
    with Image.open(photos[1]) as picture:
        assert classifier.prepare([photos[1], picture, np.zeros((9, 9), np.uint8)]).shape == (3, 1, 32, 32)
