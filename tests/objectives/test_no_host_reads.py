"""Forward and backward of SimMIM read nothing back to the host, in any form of attention that a GPU may take."""

import pytest
import torch

from simmim_scale.config.schema import ObjectiveConfig, SwinConfig, SwinV2Config
from simmim_scale.objectives.simmim import build_simmim
from tests.host_reads import HostReads

SMALL = {"image_size": (64, 64), "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "drop_path": 0.2}


def batch(generator):
    return {
        "image": torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8),
        "mask": torch.rand(2, 8, 8, generator=generator) < 0.6,
        "flip": torch.tensor([True, False]),
        "position": torch.tensor([3, 4]),
    }


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("norm_window", [None, 7])
@pytest.mark.parametrize("model", [SwinV2Config(**SMALL), SwinConfig(**SMALL)], ids=["swin_v2", "swin"])
def test_forward_and_backward_never_wait(model, norm_window, attention, generator):
    objective = ObjectiveConfig(norm_target_window=norm_window)
    module = build_simmim(model, objective, mean=(0.4,) * 3, std=(0.2,) * 3, seed=0, attention=attention)
    module(batch(generator))["loss"].backward()  # fills the caches of tables: once, not once per step
    found = batch(generator)
    with HostReads() as reads:
        module(found)["loss"].backward()
    assert not reads.found


def test_the_counter_sees_what_waits():
    values = torch.tensor([1.0, 0.0], requires_grad=True)
    with HostReads() as reads:
        float(values.detach().sum())
        values[values > 0].sum().backward()
        torch.tensor([1.0])
        values.detach().nonzero()
        torch.equal(values, values)
    assert set(reads.found) == {"_local_scalar_dense", "index by a mask", "lift_fresh", "nonzero", "equal"}
