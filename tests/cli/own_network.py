"""A backbone, a head and a mask sampler of one's own, as the README shows them."""

import numpy as np
import torch
from torch import nn


class ConvNet(nn.Module):
    patch_size, stride, embed_dim, num_features = 4, 16, 24, 48

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_chans, self.embed_dim, kernel_size=4, stride=4)
        self.body = nn.Sequential(
            nn.Conv2d(self.embed_dim, self.num_features, kernel_size=3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(self.num_features, self.num_features, kernel_size=3, stride=2, padding=1),
        )

    def embed(self, image: torch.Tensor) -> torch.Tensor:  # (b, c, h, w) -> (b, h/4, w/4, 24): channels last
        return self.stem(image).permute(0, 2, 3, 1)

    def encode(self, tokens: torch.Tensor, drop_path=None) -> torch.Tensor:  # -> (b, h/16, w/16, 48)
        return self.body(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def backbone(*, image_size: tuple[int, int], patch_size: int, in_chans: int) -> nn.Module:
    return ConvNet(in_chans)


class Head(nn.Module):
    def __init__(self, num_features: int, stride: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, channels * stride**2)
        self.shuffle = nn.PixelShuffle(stride)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.shuffle(self.linear(features).permute(0, 3, 1, 2))


def head(*, num_features: int, stride: int, channels: int) -> nn.Module:
    return Head(num_features, stride, channels)


def around(rng: np.random.Generator, grid: tuple[int, int], count: int) -> np.ndarray:
    rows, columns = np.indices(grid)
    distance = np.hypot(rows - rng.uniform(0, grid[0]), columns - rng.uniform(0, grid[1]))
    mask = np.zeros(grid, bool)
    mask.flat[np.argsort(distance, axis=None)[:count]] = True
    return mask
