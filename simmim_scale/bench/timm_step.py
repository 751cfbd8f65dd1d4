"""`simmim bench timm`: forward and backward of a SwinV2 against timm's on the same weights and images, in turns.

The loss is the mean of the squared features; it and its gradients are compared before anything is timed.
"""

import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import timm
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from simmim_scale.config.schema import SwinV2Config
from simmim_scale.engine.allocator import keep_freed_memory
from simmim_scale.kernels.dispatch import choose
from simmim_scale.models import build_backbone

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Layouts of the paper at its pre-training size (SwinV2, table 1 of the supplement: T at window 12).
SIZES: Mapping[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "toy": {"embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2)},
}
BUFFERS = ("relative_coords_table", "relative_position_index", "attn_mask", "k_bias")


@dataclass(frozen=True)
class StepSettings:
    """What is timed. `turns`: steps that each side takes, in turns, after one that is not counted."""

    size: str = "tiny"
    image_size: int = 192
    window: int = 12
    batch: int = 8
    turns: int = 7

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r}. Known: {', '.join(SIZES)}.")


def names_of_timm(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's parameters (or their gradients) by our names: it keeps the merging at the start of the stage after it, and V2's
    biases beside the projection."""
    ours = {}
    for name, value in theirs.items():
        if name.startswith("head.") or name.endswith(BUFFERS):
            continue
        name = re.sub(r"layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name)
        ours[re.sub(r"attn\.([qv]_bias)", r"attn.qkv.\1", name)] = value
    return ours


def make_pair(settings: StepSettings, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Our backbone and timm's with the same random weights."""
    layout = SIZES[settings.size]
    generator = torch.Generator().manual_seed(0)
    theirs = SwinTransformerV2(
        img_size=settings.image_size, window_size=settings.window, num_classes=0, global_pool="", drop_path_rate=0.0, **layout
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator) + (1.0 if "norm" in name else 0.0))
    config = SwinV2Config(image_size=settings.image_size, window_size=settings.window, **layout)
    ours = build_backbone(config, seed=None)
    ours.load_state_dict(names_of_timm(theirs.state_dict()))
    return ours.to(device, dtype), theirs.to(device, dtype)


def bench_timm(settings: StepSettings, dtypes: Mapping[str, torch.dtype], *, progress: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of a step of both sides, and how far their losses and gradients are apart.

    Returns:
        A JSON-able record: `environment`, and one row per type with `ours`, `timm` (median seconds), `factor` (timm / ours, the
        median over the turns) and `difference` of loss and gradients, relative.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()  # for both sides, as trainings do
    rows = []
    for name, dtype in dtypes.items():
        progress(f"SwinV2-{settings.size} {settings.image_size} px, window {settings.window}, batch {settings.batch}, {name}")
        ours, theirs = make_pair(settings, dtype, device)
        generator = torch.Generator().manual_seed(1)
        shape = (settings.batch, 3, settings.image_size, settings.image_size)
        image = torch.randn(shape, generator=generator).to(device, dtype)
        times: dict[str, list[float]] = {"ours": [], "timm": []}
        losses = {side: _step(module, image) for side, module in (("ours", ours), ("timm", theirs))}  # not counted
        difference = _difference(ours, theirs, losses)
        for _ in range(settings.turns):
            for side, module in (("ours", ours), ("timm", theirs)):
                start = time.perf_counter()
                _step(module, image)
                _wait(device)
                times[side].append(time.perf_counter() - start)
        factors = [timm_ / own for own, timm_ in zip(times["ours"], times["timm"], strict=True)]
        medians = {side: statistics.median(values) for side, values in times.items()}
        spread = {"factors": sorted(round(factor, 3) for factor in factors)}
        rows.append({"dtype": name, **medians, "factor": statistics.median(factors), **spread, "difference": difference})
    return {"environment": _environment(settings, device), "rows": rows}


def _step(module: nn.Module, image: Tensor) -> float:
    module.zero_grad(set_to_none=True)
    loss = module(image).float().square().mean()
    loss.backward()
    return loss.item()


def _difference(ours: nn.Module, theirs: nn.Module, losses: Mapping[str, float]) -> dict[str, float]:
    wanted = names_of_timm({name: parameter.grad for name, parameter in theirs.named_parameters()})
    squares = {"apart": 0.0, "theirs": 0.0}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        squares["apart"] += (parameter.grad.double() - wanted[name].double()).square().sum().item()
        squares["theirs"] += wanted[name].double().square().sum().item()
    return {
        "loss": abs(losses["ours"] - losses["timm"]) / abs(losses["timm"]),
        "gradients": (squares["apart"] / squares["theirs"]) ** 0.5,
    }


def _environment(settings: StepSettings, device: torch.device) -> dict[str, Any]:
    tokens = settings.window**2
    choice = choose("window_attention", "auto", device=device, dtype=torch.float32, head_dim=32, tokens=tokens)
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "window_attention": choice.name,
        "settings": vars(settings),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
