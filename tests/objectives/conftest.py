"""A tiny backbone that obeys the contract, so that the objective is tested without the Swins."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simmim_scale.objectives.heads import LinearHead
from simmim_scale.objectives.pixel_target import Pixels
from simmim_scale.objectives.simmim import HiddenCells, SimMIM


class TinyBackbone(nn.Module):
    """Patches of 4, one merge of 2x2, one residual branch: stride 8. Any image size."""

    def __init__(self, in_chans: int = 3, width: int = 8, drop_path: float = 0.0) -> None:
        super().__init__()
        self.patch_size, self.stride, self.embed_dim, self.num_features = 4, 8, width, 2 * width
        self.drop_path_rates = (drop_path,)
        self.proj = nn.Conv2d(in_chans, width, 4, 4)
        self.merge = nn.Linear(4 * width, 2 * width)
        self.branch = nn.Linear(2 * width, 2 * width)

    def init_weights(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)

    def embed(self, image: Tensor) -> Tensor:
        pad = (0, -image.shape[3] % 4, 0, -image.shape[2] % 4)
        return self.proj(F.pad(image, pad)).permute(0, 2, 3, 1)

    def encode(self, tokens: Tensor, drop_path: Tensor | None = None) -> Tensor:
        b, h, w, d = tokens.shape
        tokens = F.pad(tokens, (0, 0, 0, w % 2, 0, h % 2))
        h, w = tokens.shape[1] // 2, tokens.shape[2] // 2
        x = self.merge(tokens.view(b, h, 2, w, 2, d).transpose(2, 3).reshape(b, h, w, 4 * d))
        scale = 1.0 if drop_path is None else drop_path[0].view(-1, 1, 1, 1)
        return x + scale * torch.tanh(self.branch(x))


@pytest.fixture
def make_simmim():
    """Build a SimMIM around the tiny backbone."""

    def make(
        *,
        in_chans: int = 3,
        drop_path: float = 0.0,
        norm_window: int | None = None,
        seed: int = 0,
        scale: int = 1,
        loss: str = "l1",
        hidden_cells: HiddenCells | None = None,
    ) -> SimMIM:
        backbone = TinyBackbone(in_chans=in_chans, drop_path=drop_path)
        module = SimMIM(
            backbone=backbone,
            head=LinearHead(num_features=backbone.num_features, stride=backbone.stride // scale, channels=in_chans),
            target=Pixels(in_chans=in_chans, norm_window=norm_window, scale=scale, loss=loss),
            hidden_cells=hidden_cells,
            mean=(0.5, 0.4, 0.3, 0.2)[:in_chans],
            std=(0.2, 0.25, 0.3, 0.35)[:in_chans],
            seed=seed,
        )
        module.init_weights(torch.Generator().manual_seed(seed))
        return module

    return make
