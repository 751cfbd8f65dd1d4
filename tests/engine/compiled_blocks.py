"""Compiles blocks as `engine.compile` does and holds losses and gradients against the same blocks uncompiled.

Started by test_compilation.py as its own process, without the shape checks of the tests: torch.compile would trace them, and
compile anew for every shape that they saw. Prints the largest relative error of each case, a line each.
"""

import json
import sys

import torch
from torch import nn

from simmim_scale.config.schema import SwinConfig, SwinV2Config
from simmim_scale.engine.activation_checkpointing import apply_activation_checkpointing
from simmim_scale.engine.compilation import compile_blocks
from simmim_scale.models import build_backbone
from simmim_scale.models.norms import use_norm_kernels

SIZES = {"image_size": (32, 32), "embed_dim": 8, "depths": (2,), "num_heads": (2,), "window_size": 4, "drop_path": 0.1}
CONFIGS = {"swin": SwinConfig(**SIZES), "swin_v2": SwinV2Config(**SIZES)}


def make(case: dict) -> nn.Module:
    """A backbone of two blocks, plain and shifted, whose norms do something; `.backbone` of a module, as the engine wants it."""
    model = nn.Module()
    model.backbone = build_backbone(CONFIGS[case["model"]], attention=case.get("attention", "auto"), seed=3)
    use_norm_kernels(model, case.get("norm", "auto"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(getattr(torch, case.get("dtype", "float32")))


def results(model: nn.Module, batch: int) -> list[torch.Tensor]:
    """Features and all gradients of one batch, the first sample of which loses its branches."""
    image = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch)).to(next(model.parameters()).dtype)
    scales = torch.tensor([0.0, *[1.25] * (batch - 1)]).expand(4, batch)
    model.zero_grad()
    out = model.backbone.encode(model.backbone.embed(image), scales)
    out.float().square().mean().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def largest_error(case: dict) -> float:
    """Over three batch sizes, of which only the first may compile."""
    torch._dynamo.reset()
    torch._dynamo.config.error_on_recompile = False
    real = torch.compile
    # A break of the graph is an error. Most cases run what was traced as it is: making code of it takes long.
    strict = {"fullgraph": True} | ({} if case.get("code") else {"backend": "aot_eager"})
    torch.compile = lambda function, **options: real(function, **strict, **options)
    plain, compiled = make(case), make(case)
    assert compile_blocks(compiled, "block", torch.device("cpu")) == 2
    assert list(compiled.state_dict()) == list(plain.state_dict())
    apply_activation_checkpointing(compiled, case.get("checkpointing", "none"))
    worst = 0.0
    for batch in (3, 4, 2):
        for found, expected in zip(results(compiled, batch), results(plain, batch), strict=True):
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)))
        # The two blocks were compiled with the first batch; no other batch may compile anything.
        torch._dynamo.config.error_on_recompile = True
    torch.compile = real
    return worst


def main() -> None:
    for case in json.loads(sys.argv[1]):
        sys.stdout.write(json.dumps(largest_error(case)) + "\n")


if __name__ == "__main__":
    main()
