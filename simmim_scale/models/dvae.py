"""The discrete VAE of DALL-E as functions of a dictionary of tensors: picture to codes and back. Names are the released ones.

No module: a frozen tokenizer is no part of the model, so nothing may shard, cast, count or save it with the model.
Letters: b batch, h w picture height and width, q codes, th tw token grid (h / 8, w / 8).
Source: arXiv 2102.12092 and the released code openai/DALL-E for the layout.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

STRIDE = 8  # pixels per token and side: three halvings
GROUPS = 4
PIXEL_MARGIN = 0.1  # pixels are squeezed into [.1, .9]: the paper's logit-Laplace epsilon
COLOURS = 3
State = Mapping[str, Tensor]


def encode(state: State, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b q th tw"]:
    """Logits of the codes for pictures as shares of 255; sides are multiples of 8."""
    x = _conv(state, "encoder.blocks.input", (1 - 2 * PIXEL_MARGIN) * image + PIXEL_MARGIN)
    for group in range(1, GROUPS + 1):
        x = _group(state, f"encoder.blocks.group_{group}", x)
        x = F.max_pool2d(x, 2) if group < GROUPS else x
    return _conv(state, "encoder.blocks.output.conv", F.relu(x))


def decode(state: State, codes: Float[Tensor, "b q th tw"]) -> Float[Tensor, "b 3 h w"]:
    """Pictures, as shares of 255, of one-hot (or soft) codes."""
    x = _conv(state, "decoder.blocks.input", codes)
    for group in range(1, GROUPS + 1):
        x = _group(state, f"decoder.blocks.group_{group}", x)
        x = F.interpolate(x, scale_factor=2, mode="nearest") if group < GROUPS else x
    mean = torch.sigmoid(_conv(state, "decoder.blocks.output.conv", F.relu(x))[:, :COLOURS])
    return ((mean - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)).clamp(0, 1)


def _group(state: State, path: str, x: Tensor) -> Tensor:
    blocks = _num_blocks(state, path)
    for block in range(1, blocks + 1):
        here = f"{path}.block_{block}"
        residual = x
        for conv in range(1, 5):
            residual = _conv(state, f"{here}.res_path.conv_{conv}", F.relu(residual))
        same = _conv(state, f"{here}.id_path", x) if f"{here}.id_path.w" in state else x
        x = same + residual / (GROUPS * blocks) ** 2
    return x


def _num_blocks(state: Mapping[str, object], path: str) -> int:
    return sum(f"{path}.block_{number}.res_path.conv_1.w" in state for number in range(1, 100))


def _conv(state: State, path: str, x: Tensor) -> Tensor:
    weight = state[f"{path}.w"]
    return F.conv2d(x, weight, state[f"{path}.b"], padding=weight.shape[-1] // 2)


@dataclass(frozen=True)
class Sizes:
    """Of a discrete VAE: codes, width of the first group, blocks of each group, width of the decoder's input."""

    codes: int
    hidden: int
    blocks: int
    first: int


RELEASED = Sizes(codes=8192, hidden=256, blocks=2, first=128)


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an encoder and a decoder."""
    wide = [sizes.hidden * 2**group for group in range(GROUPS)]
    convs: dict[str, tuple[int, int, int]] = {"encoder.blocks.input": (COLOURS, sizes.hidden, 7)}
    convs["encoder.blocks.output.conv"] = (wide[-1], sizes.codes, 1)
    convs["decoder.blocks.input"] = (sizes.codes, sizes.first, 1)
    convs["decoder.blocks.output.conv"] = (sizes.hidden, 2 * COLOURS, 1)
    kernels = {"encoder": (3, 3, 3, 1), "decoder": (1, 3, 3, 3)}
    for part, start, widths in (("encoder", sizes.hidden, wide), ("decoder", sizes.first, wide[::-1])):
        before = start
        for group, width in enumerate(widths, start=1):
            for block in range(1, sizes.blocks + 1):
                here, inner = f"{part}.blocks.group_{group}.block_{block}", width // 4
                if before != width:
                    convs[f"{here}.id_path"] = (before, width, 1)
                ends = [(before, inner), (inner, inner), (inner, inner), (inner, width)]
                for number, ((into, out), kernel) in enumerate(zip(ends, kernels[part], strict=True), start=1):
                    convs[f"{here}.res_path.conv_{number}"] = (into, out, kernel)
                before = width
    return {
        name: shape
        for path, (into, out, kernel) in convs.items()
        for name, shape in ((f"{path}.w", (out, into, kernel, kernel)), (f"{path}.b", (out,)))
    }


def initial_state(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    """Random weights as in the released code: N(0, 1 / fan in), biases 0."""
    state = {}
    for name, shape in shapes(sizes).items():
        values = torch.randn(shape, generator=generator)
        state[name] = values / float(np.prod(shape[1:])) ** 0.5 if name.endswith(".w") else torch.zeros(shape)
    return state


class Tokenizer:
    """A frozen discrete VAE from a file, read when it is first used on a device; nobody trains, shards or saves it.

    Args:
        path: .safetensors, or a torch file with a dictionary of tensors, with the released names: those of the encoder alone
            ("blocks.input.w", ...), or of both parts ("encoder.blocks.input.w", "decoder.blocks.input.w", ...).

    Raises:
        ValueError: no such file, or tensors that are no discrete VAE of this layout.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = {_full_name(name): shape for name, shape in _read_shapes(path).items()}
        self.sizes = _check(found, path)
        self.has_decoder = "decoder.blocks.input.w" in found
        self._states: dict[torch.device, dict[str, Tensor]] = {}

    @torch.no_grad()
    def codes(self, picture: UInt8[Tensor, "b 3 h w"]) -> Int[Tensor, "b th tw"]:
        """The likeliest code of each 8x8 pixels, computed in fp32."""
        with torch.autocast(picture.device.type, enabled=False):
            return encode(self.state(picture.device), picture.float() / 255).argmax(1)

    @torch.no_grad()
    def pictures(self, codes: Int[Tensor, "b th tw"]) -> Float[Tensor, "b 3 h w"]:
        """Shares of 255, by the decoder."""
        one_hot = F.one_hot(codes.long(), self.sizes.codes).permute(0, 3, 1, 2).float()
        return decode(self.state(codes.device), one_hot)

    def state(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors on a device, fp32."""
        if device not in self._states:
            with torch.inference_mode(False):
                tensors = _read_tensors(self.path)
                self._states[device] = {_full_name(name): tensor.to(device).float() for name, tensor in tensors.items()}
        return self._states[device]


def _full_name(name: str) -> str:
    return name if name.startswith(("encoder.", "decoder.")) else f"encoder.{name}"


def _check(found: Mapping[str, tuple[int, ...]], path: Path) -> Sizes:
    """Sizes as the shapes tell them; every tensor must have the shape that they ask for."""
    try:
        codes, hidden = found["encoder.blocks.output.conv.w"][0], found["encoder.blocks.input.w"][0]
        first = found.get("decoder.blocks.input.w", (RELEASED.first,))[0]
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"objective.tokenizer: {path} lacks encoder.blocks.input.w or encoder.blocks.output.conv.w. Give the state of a"
            " discrete VAE with DALL-E's names, or train one with `simmim fit-tokenizer`."
        ) from error
    sizes = Sizes(codes, hidden, max(1, _num_blocks(found, "encoder.blocks.group_1")), first)
    parts = {name.partition(".")[0] for name in found}
    wanted = {name: shape for name, shape in shapes(sizes).items() if name.partition(".")[0] in parts}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"objective.tokenizer: {len(wrong)} tensors of {path} do not fit DALL-E's layout, the first is {name}:"
            f" {found.get(name, 'missing')}, expected {wanted.get(name, 'no such tensor')}."
        )
    return sizes


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"objective.tokenizer: cannot read {path} ({error}). Give a file of weights.") from error
    return {name: tuple(tensor.shape) for name, tensor in _read_tensors(path, device="meta").items()}


def _read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return {name: torch.from_numpy(array) for name, array in load_file(path).items()}
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load documents no types of its own
        raise ValueError(
            f"objective.tokenizer: cannot read {path} as a dictionary of tensors ({type(error).__name__}). The"
            " released encoder.pkl is a pickled module: save its state_dict(), or give a .safetensors file."
        ) from error
    if not isinstance(state, dict) or not all(re.search(r"blocks\.", str(name)) for name in state):
        raise ValueError(f"objective.tokenizer: {path} is no dictionary of a discrete VAE's tensors. Save its state_dict().")
    return state
