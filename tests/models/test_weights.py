"""Portable weights: round trip, atomic replacement, and errors that name what does not fit."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from simmim_scale.models import weights as weights_module
from simmim_scale.models.weights import TENSORS, load_into, load_weights, read_weights_config, save_weights

CONFIG = {"seed": 3, "model": {"name": "swin_v2", "depths": [2, 2], "drop_path": 0.1}, "data": {"validation": None}}


def make_module(width: int = 4) -> nn.Module:
    module = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
    module.register_buffer("table", torch.ones(2), persistent=False)
    return module


def test_round_trip_keeps_tensors_dtypes_config_and_facts(tmp_path):
    state = {
        "a": torch.randn(2, 3).t(),
        "b": torch.randn(4, dtype=torch.bfloat16),
        "c": torch.tensor(5),
        "d": torch.arange(100.0)[:2],
    }
    state["e"] = state["d"]  # shared memory
    save_weights(tmp_path / "w", state, CONFIG, {"step": "7"})
    weights = load_weights(tmp_path / "w")
    assert weights.config == CONFIG
    assert weights.extra == {"step": "7"}
    assert weights.state.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(weights.state[name], tensor)
        assert weights.state[name].dtype == tensor.dtype
    assert (tmp_path / "w" / TENSORS).stat().st_size < 2000
    assert "seed: 3" in (tmp_path / "w" / "config.yaml").read_text()


def test_a_failed_save_leaves_the_older_weights_and_no_litter(tmp_path, monkeypatch):
    save_weights(tmp_path, {"a": torch.zeros(1)}, CONFIG)

    def fails_half_way(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(weights_module, "save_file", fails_half_way)
    with pytest.raises(OSError, match="disk full"):
        save_weights(tmp_path, {"a": torch.ones(1)}, CONFIG)
    assert torch.equal(load_weights(tmp_path).state["a"], torch.zeros(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", TENSORS]


def test_the_config_comes_from_the_tensors_file(tmp_path):
    save_weights(tmp_path, {"a": torch.zeros(1)}, CONFIG)
    (tmp_path / "config.yaml").write_text("seed: 99")  # as if a save had stopped between the two files
    assert read_weights_config(tmp_path) == CONFIG


def test_missing_directory_and_missing_file_are_clear(tmp_path):
    with pytest.raises(ValueError, match="no directory"):
        load_weights(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"expected model.safetensors .* found notes.txt"):
        load_weights(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_file_is_a_clear_error(tmp_path, keep):
    save_weights(tmp_path, {"a": torch.zeros(100)}, CONFIG)
    path = tmp_path / TENSORS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated"):
        load_weights(tmp_path)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / TENSORS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="import-weights"):
        load_weights(tmp_path)


def test_load_into_copies_parameters_and_persistent_buffers():
    source, module = make_module(), make_module()
    source[1].running_mean.fill_(3)
    source[1].num_batches_tracked.fill_(9)
    report = load_into(module, source.state_dict(), source="here")
    assert report.fits
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_load_into_names_all_differences_and_writes_nothing():
    module = make_module()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = {**make_module(width=5).state_dict(), "extra.weight": torch.zeros(1)}
    del state["1.running_var"]
    with pytest.raises(ValueError, match="does not fit") as error:
        load_into(module, state, source="runs/a")
    message = str(error.value)
    for part in ("runs/a", "1.running_var", "extra.weight", "0.weight (file (5, 3), model (4, 3))"):
        assert part in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_optional_prefixes_may_be_absent_on_either_side_but_not_of_another_shape():
    module = make_module()
    state = {name: tensor for name, tensor in make_module().state_dict().items() if name.startswith("0.")}
    report = load_into(module, {**state, "1.gone": torch.zeros(1)}, source="here", optional=("1.",))
    assert report.unexpected == ["1.gone"]
    assert len(report.missing) == 5
    assert torch.equal(module[0].weight, state["0.weight"])
    with pytest.raises(ValueError, match=r"0\.bias"):
        load_into(module, {**state, "0.bias": torch.zeros(9)}, source="here", optional=("1.", "0."))


def test_a_module_on_the_meta_device_is_compared_without_memory():
    with torch.device("meta"):
        module = make_module()
    assert load_into(module, make_module().state_dict(), source="here").fits
    assert module[0].weight.is_meta
