"""50 steps of training give the same losses whichever implementation computes norms and attention, within the precision."""

import pytest
import torch

from simmim_scale.config.schema import IMAGENET_MEAN, IMAGENET_STD, ObjectiveConfig, SwinConfig, SwinV2Config
from simmim_scale.models.norms import use_norm_kernels
from simmim_scale.objectives.simmim import build_simmim

SIZES = {"image_size": (32, 32), "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "drop_path": 0.2}
CONFIGS = {"swin": SwinConfig(**SIZES), "swin_v2": SwinV2Config(**SIZES, extra_norm_period=2)}
STEPS, BATCH = 50, 4


def losses(name: str, dtype: torch.dtype, *, norm: str, attention: str) -> list[float]:
    """Of AdamW on fp32 masters, as the engine does it: the model holds rounded copies in `dtype`."""
    module = build_simmim(
        CONFIGS[name], ObjectiveConfig(), mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0, attention=attention
    ).train()
    use_norm_kernels(module, norm)
    masters = [parameter.detach().clone() for parameter in module.parameters()]
    module = module.to(dtype)
    optimizer = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.05)
    found = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        image = torch.randint(0, 256, (BATCH, 3, 8, 8), generator=generator, dtype=torch.uint8)
        mask = torch.rand(BATCH, 4, 4, generator=generator) < 0.6
        module.zero_grad()
        positions = torch.arange(BATCH) + BATCH * step
        loss = module({"image": image.repeat_interleave(4, 2).repeat_interleave(4, 3), "mask": mask, "position": positions})[
            "loss"
        ]
        loss.backward()
        with torch.no_grad():
            for master, parameter in zip(masters, module.parameters(), strict=True):
                master.grad = parameter.grad.to(master.dtype)
            optimizer.step()
            for master, parameter in zip(masters, module.parameters(), strict=True):
                parameter.copy_(master)
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_losses_agree(name):
    exact = losses(name, torch.float64, norm="reference", attention="reference")
    for norm, attention in (("torch_native", "cpu"), ("reference", "reference")):
        # Adam turns the rounding of gradients near 0 into whole steps: after 50 of them that is some 1e-4 of the loss.
        assert losses(name, torch.float32, norm=norm, attention=attention) == pytest.approx(exact, rel=5e-4)


def test_bf16_losses_stay_as_near_to_the_exact_ones_by_any_kernel():
    exact = torch.tensor(losses("swin_v2", torch.float64, norm="reference", attention="reference"))
    for norm, attention in (("torch_native", "cpu"), ("reference", "reference")):
        found = torch.tensor(losses("swin_v2", torch.bfloat16, norm=norm, attention=attention))
        assert float(((found - exact) / exact).abs().max()) < 0.01
