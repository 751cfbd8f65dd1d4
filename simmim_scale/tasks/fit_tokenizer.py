"""`simmim fit-tokenizer`: trains a small discrete VAE of DALL-E's layout on shards, for the target "tokens".

The codes are relaxed by the Gumbel softmax, whose temperature falls from 1 to 1/16 over the run (arXiv 2102.12092, appendix A.2);
the loss is the mean squared error of the pictures and the divergence of the codes from the uniform distribution.
Letters: b batch, h w picture height and width, q codes, th tw token grid.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from simmim_scale.config.schema import DataConfig, MaskConfig
from simmim_scale.data.loader import build_training_loader
from simmim_scale.data.remote_index import open_index
from simmim_scale.models.dvae import COLOURS, STRIDE, Sizes, decode, encode, initial_state

LAST_TEMPERATURE = 1 / 16
UNIFORM_WEIGHT = 1e-3  # of the divergence; a choice that keeps small codebooks in use
CLIP = 1.0  # of the gradient's norm


@dataclass(frozen=True)
class TokenizerOptions:
    """Sizes and length; all choices for small tokenizers but the layout.

    Attributes:
        codes: number of codes. hidden: width of the first group. blocks: of each group.
        size: side of the crops, pixels, a multiple of 8.
        steps, batch: updates, and crops of each. learning_rate: of Adam, falling to 0 by a cosine.
        seed: of weights, order of samples, crops and noise.
    """

    codes: int = 512
    hidden: int = 64
    blocks: int = 1
    size: int = 64
    steps: int = 2000
    batch: int = 16
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """The mean squared error (shares of 255) of hard codes on the last batch, and how many codes it used."""

    error: float
    used: int


def fit_tokenizer(
    shards: str, out: Path, options: TokenizerOptions, *, device: torch.device, progress: Callable[[int, float], None]
) -> Fitted:
    """Train, and write encoder and decoder to `out` (safetensors, DALL-E's names).

    Args:
        progress: called with the number of each finished step and its loss.

    Raises:
        ValueError: sizes that do not fit, no shards, or too few samples for a batch.
    """
    _check(out, options)
    generator = torch.Generator().manual_seed(options.seed)
    sizes = Sizes(codes=options.codes, hidden=options.hidden, blocks=options.blocks, first=options.hidden)
    state = {name: tensor.to(device).requires_grad_() for name, tensor in initial_state(sizes, generator).items()}
    optimizer = torch.optim.Adam(state.values(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    noise = torch.Generator(device=device).manual_seed(options.seed)
    for step, picture in enumerate(_pictures(shards, options)):
        picture = picture.to(device).float() / 255
        loss = relaxed_loss(state, picture, temperature=LAST_TEMPERATURE ** (step / options.steps), generator=noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state.values(), CLIP)
        optimizer.step()
        schedule.step()
        progress(step + 1, loss.item())
    with torch.no_grad():
        codes = encode(state, picture).argmax(1)
        drawn = decode(state, F.one_hot(codes, options.codes).permute(0, 3, 1, 2).float())
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, out)
    return Fitted(error=F.mse_loss(drawn, picture).item(), used=len(codes.unique()))


def relaxed_loss(state: dict[str, Tensor], picture: Tensor, *, temperature: float, generator: torch.Generator) -> Tensor:
    """Error of the picture through relaxed codes, and the divergence of the codes from the uniform distribution."""
    logits = encode(state, picture)
    uniform = torch.rand(logits.shape, device=logits.device, generator=generator).clamp(1e-9, 1 - 1e-7)
    codes = ((logits - (-uniform.log()).log()) / temperature).softmax(1)
    logs = logits.log_softmax(1)
    divergence = (logs.exp() * logs).sum(1).mean() + torch.log(torch.tensor(float(logits.shape[1])))
    return F.mse_loss(decode(state, codes), picture) + UNIFORM_WEIGHT * divergence


def _pictures(shards: str, options: TokenizerOptions) -> Iterator[Tensor]:
    """(b, 3, size, size) uint8 crops, drawn as those of pre-training."""
    data = DataConfig(workers=0)
    loader = build_training_loader(
        open_index(shards, data.remote),
        data=data,
        mask=MaskConfig(cell=options.size, ratio=0.5),  # not looked at
        image_size=(options.size, options.size),
        in_chans=COLOURS,
        seed=options.seed,
        global_batch=options.batch,
        micro_batch=options.batch,
        accumulation=1,
    )
    with loader:
        for _ in range(options.steps):
            yield next(loader)["image"]


def _check(out: Path, options: TokenizerOptions) -> None:
    if options.size % STRIDE:
        raise ValueError(
            f"--size: a multiple of {STRIDE} pixels, got {options.size}: a code stands for {STRIDE}x{STRIDE} of them."
        )
    if options.hidden % 4:
        raise ValueError(f"--hidden: a multiple of 4, got {options.hidden}: blocks work at a quarter of their width.")
    if out.suffix != ".safetensors":
        raise ValueError(f"--out: a file named *.safetensors, got {out}.")
    if out.exists():
        raise ValueError(f"--out: {out} is there already. Remove it, or choose another name.")
