"""The second view of a crop: the same rectangle at another size, in training, in validation and in batches."""

import numpy as np
import pytest
import torch

from simmim_scale.config.schema import Config, DataConfig, MaskConfig, ObjectiveConfig
from simmim_scale.data.loader import build_training_loader, build_validation_loader
from simmim_scale.data.transforms import resize_crop
from simmim_scale.data.views import PretrainingView, ValidationView

COMMON = {"data": DataConfig(), "mask": MaskConfig(cell=8), "image_size": (32, 48), "seed": 3}


@pytest.mark.parametrize("view", [PretrainingView, ValidationView])
def test_it_is_the_same_crop_and_changes_nothing_else(view, make_picture):
    picture = make_picture(5, height=50, width=70)

    def draws():
        return view(**COMMON).draw(epoch=1, sample=5)

    both = view(**COMMON, second_size=(16, 24))(picture, draws())
    alone = view(**COMMON)(picture, draws())
    crop, _ = view(**COMMON).place(50, 70, draws())
    assert torch.equal(both["view"], resize_crop(picture, crop, size=(16, 24)))
    assert set(both) - set(alone) == {"view"}
    for name in alone:
        assert np.array_equal(both[name], alone[name])


def test_loaders_stack_it(make_shards):
    index, options = make_shards(6), {**COMMON, "data": DataConfig(workers=0), "in_chans": 3, "second_size": (16, 24)}
    loader = build_training_loader(index, **options, global_batch=4, micro_batch=4, accumulation=1)
    with loader:
        assert next(loader)["view"].shape == (4, 3, 16, 24)
    batch = next(iter(build_validation_loader(index, **options, micro_batch=4)))
    assert batch["view"].dtype == torch.uint8


def test_its_size_has_the_shape_of_the_image():
    assert ObjectiveConfig(second_view=112).second_size((192, 192)) == (112, 112)
    assert ObjectiveConfig(second_view=16).second_size((32, 48)) == (16, 24)
    assert ObjectiveConfig().second_size((32, 48)) is None


def test_the_gpu_decoder_makes_none():
    with pytest.raises(ValueError, match=r"data\.decoder: gpu makes no second view"):
        Config(objective={"second_view": 112}, data={"decoder": "gpu"})
