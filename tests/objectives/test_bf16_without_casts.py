"""A bf16 model stays in bf16: every cast of a large tensor in forward and backward is listed and has its reason."""

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simmim_scale.config.schema import IMAGENET_MEAN, IMAGENET_STD, ObjectiveConfig, SwinConfig, SwinV2Config
from simmim_scale.objectives.simmim import build_simmim

SIZES = {"image_size": (64, 64), "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "drop_path": 0.1}
BATCH = 2
LARGE = 1024  # elements: more than any parameter of a norm or scale of a sample, fewer than any tensor of tokens
# The only places, by file: the picture, normalised in fp32, becomes bf16 for the model; the error is taken in fp32. What a kernel
# does inside (fp32 softmax on a CPU) is one operator here.
REASONS = ("objectives/simmim.py", "kernels/masked_loss/")


class Casts(TorchDispatchMode):
    """Records (from, to, elements, where) of every change between floating types."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if source.dtype != out.dtype and source.is_floating_point() and out.is_floating_point():
                self.found.append((str(source.dtype), str(out.dtype), source.numel(), caller()))
        return out


def caller() -> str:
    frames = [frame for frame in traceback.extract_stack() if "simmim_scale/" in frame.filename]
    return f"{frames[-1].filename.rpartition('simmim_scale/')[2]}:{frames[-1].lineno}" if frames else "backward"


@pytest.mark.parametrize("config", [SwinConfig(**SIZES), SwinV2Config(**SIZES, extra_norm_period=2)], ids=["swin", "swin_v2"])
def test_the_residual_stream_is_never_cast(config, generator):
    module = build_simmim(config, ObjectiveConfig(), mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0).bfloat16().train()
    batch = {
        "image": torch.randint(0, 256, (BATCH, 3, 64, 64), dtype=torch.uint8, generator=generator),
        "mask": torch.rand(BATCH, 2, 2, generator=generator) < 0.6,
        "position": torch.arange(BATCH),
    }
    with Casts() as casts:
        module(batch)["loss"].backward()
    large = [cast for cast in casts.found if cast[2] >= LARGE]
    assert len(large) >= 2, "the picture and the prediction are cast: nothing was recorded"
    hidden = [cast for cast in large if not cast[3].startswith(REASONS)]
    assert not hidden, f"large tensors change their type: {hidden}"


def test_a_cast_that_nobody_wanted_would_be_seen():
    x = torch.ones(LARGE, dtype=torch.bfloat16, requires_grad=True)
    with Casts() as casts:
        (x.float() * 2).sum().backward()
    assert [(source, target) for source, target, *_ in casts.found] == [
        ("torch.bfloat16", "torch.float32"),
        ("torch.float32", "torch.bfloat16"),
    ]
