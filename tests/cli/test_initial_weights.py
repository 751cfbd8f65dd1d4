"""init_from at another window and image size: trains, says what it changed, keeps it for whoever loads the weights, resumes."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import simmim_scale
from simmim_scale.models.weights import read_weights_config
from tests.cli.train_many import train_many
from tests.data.conftest import encode, picture, write_shards

LARGER = ["model.window_size=8", "model.image_size=96"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict:
    root = tmp_path_factory.mktemp("initial")
    write_shards(root / "shards", [encode(picture(sample)) for sample in range(24)])
    base = [f"data.train={root / 'shards'}", "data.validation=null", "train.steps=1", "schedule.warmup_epochs=0"]

    def command(config: str, name: str, *settings: str) -> list[str]:
        return [str(repository / f"configs/debug/{config}.yaml"), *base, f"run_dir={root / name}", *settings]

    runs = {}
    for config in ("tiny_swin", "tiny_swinv2"):
        runs[config] = command(config, config)
        runs[f"{config}_larger"] = command(config, f"{config}_larger", f"init_from={root / config}", *LARGER)
    for name, source in (("began", "tiny_swinv2"), ("went on although the weights are gone", "gone")):
        runs[name] = command("tiny_swinv2", "began", f"init_from={root / source}", *LARGER)
    return {"root": root, **train_many(runs)}


def test_all_of_them_train(outcomes):
    codes = {name: outcome["code"] for name, outcome in outcomes.items() if name != "root"}
    assert set(codes.values()) == {0}, outcomes


@pytest.mark.parametrize(
    ("config", "said"),
    [("tiny_swin", "5 bias tables interpolated (geometric)"), ("tiny_swinv2", "offsets of windows 4,4,4,2")],
)
def test_the_run_says_what_it_changed_and_the_weights_keep_it(outcomes, config, said):
    # The header of a run goes to environment.json too.
    header = (outcomes["root"] / f"{config}_larger/environment.json").read_text()
    assert "image 64x64 -> 96x96; windows 4,4,4,2 -> 8,8,6,3" in header
    assert said in header
    weights = outcomes["root"] / f"{config}_larger/weights"
    model = read_weights_config(weights)["model"]
    assert model.get("pretrained_window_sizes", [4, 4, 4, 2]) == [4, 4, 4, 2]
    module = simmim_scale.load(weights)
    image = torch.randn(1, 3, 96, 96)
    assert torch.isfinite(module({"image": image, "mask": torch.zeros(1, 24, 24, dtype=torch.bool)})["prediction"]).all()
    with safe_open(outcomes["root"] / config / "weights/model.safetensors", "pt") as before:
        assert module.backbone.norm.weight.shape == before.get_tensor("backbone.norm.weight").shape
