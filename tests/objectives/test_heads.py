"""The linear head against the published convolution and pixel shuffle; names of plug-ins."""

import pytest
import torch
from torch.nn import functional as F

from simmim_scale.config.lookup import lookup
from simmim_scale.objectives.heads import HEADS, LinearHead
from simmim_scale.objectives.targets import TARGETS


@pytest.mark.parametrize(("channels", "stride"), [(3, 32), (1, 8), (5, 2)])
def test_linear_head_is_a_1x1_convolution_and_a_pixel_shuffle(channels, stride):
    head = LinearHead(num_features=6, stride=stride, channels=channels)
    head.init_weights(torch.Generator().manual_seed(0))
    features = torch.randn(2, 3, 4, 6)
    convolved = F.conv2d(features.permute(0, 3, 1, 2), head.proj.weight[:, :, None, None], head.proj.bias)
    torch.testing.assert_close(head(features), F.pixel_shuffle(convolved, stride))


def test_linear_head_init_fills_all_within_the_bound():
    head = LinearHead(num_features=16, stride=4, channels=3)
    for parameter in head.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    head.init_weights(torch.Generator().manual_seed(0))
    for parameter in head.parameters():
        assert parameter.abs().max() <= 0.25
        assert parameter.std() > 0.1


@pytest.mark.parametrize("table", [HEADS, TARGETS])
def test_every_entry_of_a_table_can_be_imported(table):
    for name in table:
        assert callable(lookup(table, name, setting="objective"))


def test_a_function_of_ones_own_is_found_by_module_and_attribute():
    assert lookup(HEADS, "math:sqrt", setting="objective.head")(4) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("linaer", "Did you mean 'linear'"),
        ("no_such_module_x:f", "cannot import"),
        ("math:no_such_name", "has no 'no_such_name'"),
    ],
)
def test_unknown_names_are_user_errors(name, message):
    with pytest.raises(ValueError, match=message):
        lookup(HEADS, name, setting="objective.head")
