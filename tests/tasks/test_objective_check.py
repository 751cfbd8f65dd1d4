"""What is wrong with head, target and masking is said before any data is opened."""

import numpy as np
import pytest

from simmim_scale.config.schema import Config
from simmim_scale.tasks import objective_check
from simmim_scale.tasks.objective_check import check_objective
from simmim_scale.tasks.pretrain import build

SMALL = {"name": "swin", "image_size": 64, "embed_dim": 16, "depths": (1, 1, 1), "num_heads": (1, 2, 4), "window_size": 4}


def make(mask_cell=16, **objective) -> Config:
    return Config(model=SMALL, mask={"cell": mask_cell}, objective=objective, data={"train": "nowhere"})


def test_a_head_that_no_device_holds_is_refused_and_a_smaller_one_is_not(monkeypatch):
    monkeypatch.setattr(objective_check, "device_memory", lambda: (10 * 2**20, "this machine"))
    check_objective(make(target="bins", bins=8))
    with pytest.raises(ValueError, match=r"objective\.head: .* 12,779,520 parameters.*Predict at a lower resolution"):
        build(make(target="bins", bins=256))
    check_objective(make(target="bins", bins=256, downsample=16))


def test_a_code_that_lies_in_two_cells_is_refused(tmp_path):
    from safetensors.numpy import save_file

    from simmim_scale.models.dvae import Sizes, shapes

    path = str(tmp_path / "t.safetensors")
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes(Sizes(8, 4, 1, 4)).items()}, path)
    objective = {"target": "tokens", "tokenizer": path, "second_view": 32}
    check_objective(make(16, **objective))
    with pytest.raises(ValueError, match=r"mask\.cell: a predicted pixel must lie in one cell, got 8"):
        build(make(8, **objective))
    check_objective(make(8, token_grid="resample", **objective))


def test_a_resolution_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"objective\.downsample: a predicted pixel must lie in one cell"):
        make(16, downsample=32)
    with pytest.raises(ValueError, match=r"objective\.downsample: a predicted pixel must lie in one cell"):
        make(16, downsample=5)


def test_files_that_are_missing_are_said_before_the_shards():
    with pytest.raises(ValueError, match=r"none\.npy"):
        build(make(target="clusters", centres="none.npy", downsample=4))
