"""Peak memory of one forward and backward with attention of the early stages in turn: in_turn.py ROWS IMPLEMENTATION."""

import resource
import sys

import torch

from simmim_scale.config.schema import SwinV2Config
from simmim_scale.engine.sequential_attention import apply_sequential_attention
from simmim_scale.models import build_backbone

CONFIG = SwinV2Config(image_size=512, embed_dim=32, depths=(2, 2), num_heads=(2, 4), window_size=32)


def peak() -> float:
    """MiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    torch.set_num_threads(1)
    rows, attention = int(sys.argv[1]), sys.argv[2]
    module = build_backbone(CONFIG, attention=attention, seed=0).train()
    apply_sequential_attention(module, rows)
    image = torch.randn(2, 3, *CONFIG.image_size)
    before = peak()
    module(image).square().mean().backward()
    sys.stdout.write(f"{attention}, {rows} rows at once: {peak() - before:.0f} MiB\n")


if __name__ == "__main__":
    main()
