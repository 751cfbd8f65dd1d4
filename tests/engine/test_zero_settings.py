"""ZeRO's numbers follow from the model's sizes: checked on SwinV2-H, on a small model and on one too large to keep gathered."""

import pytest
import torch
from torch import nn

from simmim_scale.config.schema import EngineConfig, SwinV2Config
from simmim_scale.engine.zero_leaves import blocks_of, mark_leaves, model_sizes
from simmim_scale.engine.zero_settings import LEAST_BUCKET, ModelSizes, persistence_threshold, zero_settings
from simmim_scale.models import build_backbone

SMALL = ModelSizes(parameters=(10, 10, 1000, 4000), largest_block=3000)
HUGE = ModelSizes(parameters=(3_000_000_000, 1000), largest_block=200_000_000)


@pytest.fixture(scope="module")
def swinv2_h():
    with torch.device("meta"):
        module = nn.Module()
        module.backbone = build_backbone(
            SwinV2Config(embed_dim=352, num_heads=(11, 22, 44, 88), extra_norm_period=6, depths=(2, 2, 18, 2)), seed=None
        )
    return module


def test_stage_0_and_a_model_that_does_not_exist_yet_have_the_stage_alone():
    assert zero_settings(0, SMALL, world_size=8) == {"stage": 0}
    assert zero_settings(3, None, world_size=8) == {"stage": 3}


def test_swinv2_h(swinv2_h):
    sizes = model_sizes(swinv2_h)
    assert sizes.total == pytest.approx(658e6, rel=0.01)
    # Stage 4: 4c^2 of attention and 8c^2 of the MLP at c = 2816, and what is small.
    assert sizes.largest_block == pytest.approx(12 * 2816**2, rel=0.01)
    found = zero_settings(3, sizes, world_size=8)
    assert found["stage3_prefetch_bucket_size"] == found["reduce_bucket_size"] == sizes.largest_block
    assert sizes.total / found["reduce_bucket_size"] > 5, "several reductions, or none runs beside backward"
    threshold = found["stage3_param_persistence_threshold"]
    whole = [size for size in sizes.parameters if size <= threshold]
    assert sum(whole) <= 0.01 * sizes.total
    assert len(whole) > 0.7 * len(sizes.parameters)
    assert found["stage3_max_live_parameters"] >= sizes.total
    assert found["stage3_max_reuse_distance"] >= 2 * sizes.total


def test_a_model_that_is_too_large_gives_its_blocks_back():
    found = zero_settings(3, HUGE, world_size=8)
    assert found["stage3_max_live_parameters"] == 600_000_000
    assert found["stage3_max_reuse_distance"] == 400_000_000
    assert found["stage3_param_persistence_threshold"] == 1000


def test_offloaded_parameters_are_given_back_after_use():
    kept, back = (zero_settings(3, SMALL, world_size=8, may_keep=may_keep) for may_keep in (True, False))
    assert kept["stage3_max_reuse_distance"] == 2 * SMALL.total
    assert back["stage3_max_reuse_distance"] == 2 * SMALL.largest_block


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_that_gather_nothing_have_no_gather_settings(stage):
    found = zero_settings(stage, SMALL, world_size=8)
    assert not [key for key in found if key.startswith("stage3")]
    assert found["reduce_bucket_size"] == LEAST_BUCKET
    assert found["overlap_comm"]


def test_one_rank_overlaps_nothing_in_stages_1_and_2():
    assert not zero_settings(1, SMALL, world_size=1)["overlap_comm"]
    assert zero_settings(3, SMALL, world_size=1)["overlap_comm"]


@pytest.mark.parametrize(
    ("parameters", "share", "expected"),
    [((1, 1, 98), 0.02, 1), ((1, 1, 1, 97), 0.02, 0), ((5, 5), 1.0, 5), ((1, 2, 97), 0.03, 2)],
)
def test_small_parameters_stay_whole_up_to_a_share_of_the_model(parameters, share, expected):
    assert persistence_threshold(parameters, share) == expected


def test_blocks_are_leaves_in_stage_3_alone(swinv2_h):
    from deepspeed.utils import z3_leaf_module

    assert mark_leaves(swinv2_h, EngineConfig(zero_stage=2)) == 0
    assert not any(z3_leaf_module(block) for block in blocks_of(swinv2_h))
    assert mark_leaves(swinv2_h, EngineConfig(zero_stage=3)) == 24
    assert all(z3_leaf_module(block) for block in blocks_of(swinv2_h))
    assert not any(z3_leaf_module(module) for module in blocks_of(swinv2_h)[0].children())


def test_a_block_whose_input_needs_no_gradient_is_no_leaf():
    from deepspeed.utils import z3_leaf_module

    from tests.multiprocess.engine_standin import Standin

    module = Standin()  # its first block sees the data itself
    assert mark_leaves(module, EngineConfig(zero_stage=3)) == 2
    assert [z3_leaf_module(block) for block in blocks_of(module)] == [False, True, True]
    frozen = Standin()
    frozen.backbone.blocks[:2].requires_grad_(False)
    assert mark_leaves(frozen, EngineConfig(zero_stage=3)) == 0


def test_a_model_without_blocks_is_measured_by_its_largest_parameter():
    module = nn.Linear(3, 5)
    assert mark_leaves(module, EngineConfig(zero_stage=3)) == 0
    assert model_sizes(module) == ModelSizes(parameters=(15, 5), largest_block=15)
