"""Weights saved by a run come back as the same module; directories that hold none are named."""

import pytest
import torch

import simmim_scale
from simmim_scale.config.schema import Config
from simmim_scale.models.weights import TENSORS, save_weights
from simmim_scale.objectives.simmim import SimMIM, build_simmim
from simmim_scale.tasks.pretrained import load_pretrained

MODEL = {"name": "swin_v2", "image_size": 64, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4}


@pytest.fixture
def config() -> Config:
    return Config(model=MODEL, mask={"cell": 16}, objective={"norm_target_window": 7})


@pytest.fixture
def trained(config) -> SimMIM:
    return build_simmim(config.model, config.objective, mean=config.data.mean, std=config.data.std, seed=5).eval()


@pytest.fixture
def run_dir(tmp_path, config, trained):
    save_weights(tmp_path / "weights", trained.state_dict(), config.model_dump(mode="json"), {"step": "12"})
    (tmp_path / "config.yaml").write_text("")
    return tmp_path


@pytest.mark.parametrize("folder", [".", "weights"])
def test_a_run_and_its_weights_load_alike_and_predict_the_same(run_dir, trained, config, folder):
    module = simmim_scale.load(run_dir / folder)
    batch = {"image": torch.randn(2, 3, 64, 64), "mask": torch.rand(2, 16, 16) < 0.6}
    actual, expected = module(batch), trained(batch)
    assert torch.equal(actual["prediction"], expected["prediction"])
    assert torch.equal(actual["loss"], expected["loss"])
    assert [map_.shape[1] for map_ in module.backbone.features(batch["image"])] == [8, 16]
    assert load_pretrained(run_dir).config == config
    assert load_pretrained(run_dir).extra == {"step": "12"}


def test_every_parameter_is_loaded(run_dir, trained):
    loaded = simmim_scale.load(str(run_dir)).state_dict()
    assert loaded.keys() == trained.state_dict().keys()
    assert all(torch.equal(value, loaded[name]) for name, value in trained.state_dict().items())


def test_directories_without_weights_are_clear_errors(tmp_path):
    with pytest.raises(ValueError, match="no directory"):
        simmim_scale.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="found nothing"):
        simmim_scale.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="not written its weights yet"):
        simmim_scale.load(tmp_path)


def test_truncated_weights_are_a_clear_error(run_dir):
    path = run_dir / "weights" / TENSORS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        simmim_scale.load(run_dir)


def test_a_configuration_of_another_version_is_a_clear_error(tmp_path, config, trained):
    tree = config.model_dump(mode="json")
    tree["model"]["colour"] = "blue"
    save_weights(tmp_path, trained.state_dict(), tree)
    with pytest.raises(ValueError, match=r"(?s)does not fit this version.*model\.colour: unknown key"):
        simmim_scale.load(tmp_path)


def test_weights_of_another_architecture_are_listed(tmp_path, config, trained):
    tree = config.model_dump(mode="json")
    tree["model"]["depths"] = [2, 2]
    save_weights(tmp_path, trained.state_dict(), tree)
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.1"):
        simmim_scale.load(tmp_path)


def test_an_unknown_task_is_named(tmp_path, config, trained):
    save_weights(tmp_path, trained.state_dict(), {**config.model_dump(mode="json"), "task": "dancing"})
    with pytest.raises(ValueError, match=r"'dancing'.*pretrain, classification"):
        simmim_scale.load(tmp_path)
