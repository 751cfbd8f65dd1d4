"""The discrete VAE as functions against modules written from the released layout, and files that are none."""

from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from simmim_scale.models.dvae import RELEASED, Sizes, Tokenizer, decode, encode, initial_state, shapes

SMALL = Sizes(codes=12, hidden=8, blocks=2, first=4)


class Conv(nn.Module):
    def __init__(self, into: int, out: int, kernel: int) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(out, into, kernel, kernel)), nn.Parameter(torch.randn(out))

    def forward(self, x):
        return nn.functional.conv2d(x, self.w, self.b, padding=(self.w.shape[2] - 1) // 2)


class Block(nn.Module):
    def __init__(self, into: int, out: int, kernels: tuple[int, ...], layers: int) -> None:
        super().__init__()
        self.gain = 1 / layers**2
        self.id_path = Conv(into, out, 1) if into != out else nn.Identity()
        widths = (into, out // 4, out // 4, out // 4, out)
        steps = []
        for number, kernel in enumerate(kernels, start=1):
            steps += [(f"relu_{number}", nn.ReLU()), (f"conv_{number}", Conv(widths[number - 1], widths[number], kernel))]
        self.res_path = nn.Sequential(OrderedDict(steps))

    def forward(self, x):
        return self.id_path(x) + self.gain * self.res_path(x)


def network(into, widths, kernels, between, first, last, blocks):
    """Input, four groups of blocks with `between` after all but the last, output."""
    parts = [("input", first)]
    for number, width in enumerate(widths, start=1):
        group = []
        for block in range(1, blocks + 1):
            group.append((f"block_{block}", Block(into, width, kernels, 4 * blocks)))
            into = width
        parts.append((f"group_{number}", nn.Sequential(OrderedDict([*group, *([between] if number < 4 else [])]))))
    parts.append(("output", nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", last)]))))
    return nn.Sequential(OrderedDict(parts))


def modules(s: Sizes) -> nn.ModuleDict:
    wide = [s.hidden, 2 * s.hidden, 4 * s.hidden, 8 * s.hidden]
    pool, grow = ("pool", nn.MaxPool2d(2)), ("upsample", nn.Upsample(scale_factor=2, mode="nearest"))
    encoder = network(s.hidden, wide, (3, 3, 3, 1), pool, Conv(3, s.hidden, 7), Conv(wide[3], s.codes, 1), s.blocks)
    decoder = network(s.first, wide[::-1], (1, 3, 3, 3), grow, Conv(s.codes, s.first, 1), Conv(s.hidden, 6, 1), s.blocks)
    return nn.ModuleDict({name: nn.ModuleDict({"blocks": part}) for name, part in (("encoder", encoder), ("decoder", decoder))})


def test_functions_and_modules_agree(generator):
    reference = modules(SMALL)
    state = initial_state(SMALL, generator)
    reference.load_state_dict(state)
    image = torch.rand(2, 3, 24, 16, generator=generator)
    logits = encode(state, image)
    assert logits.shape == (2, 12, 3, 2)
    torch.testing.assert_close(logits, reference["encoder"]["blocks"](0.8 * image + 0.1))
    soft = logits.softmax(1)
    drawn = ((torch.sigmoid(reference["decoder"]["blocks"](soft)[:, :3]) - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(decode(state, soft), drawn)


def test_the_released_layout_has_its_names_and_shapes():
    with torch.device("meta"):
        reference = modules(RELEASED)
    assert {name: tuple(value.shape) for name, value in reference.state_dict().items()} == shapes(RELEASED)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("encoder_only", [False, True])
def test_a_tokenizer_from_a_file(tmp_path, generator, suffix, encoder_only):
    state = initial_state(SMALL, generator)
    path = tmp_path / f"tokenizer.{suffix}"
    kept = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    (save_file if suffix == "safetensors" else torch.save)(kept if encoder_only else state, path)
    tokenizer = Tokenizer(path)
    picture = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator)
    codes = tokenizer.codes(picture)
    assert torch.equal(codes, encode(state, picture.float() / 255).argmax(1))
    assert tokenizer.has_decoder is not encoder_only
    assert (tokenizer.sizes.codes, tokenizer.sizes.hidden, tokenizer.sizes.blocks) == (12, 8, 2)
    if not encoder_only:
        assert tokenizer.pictures(codes).shape == picture.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("encoder.blocks.group_2.block_2.res_path.conv_3.b"),
            "group_2.block_2.res_path.conv_3.b: missing",
        ),
        (
            lambda state: state.update({"encoder.blocks.input.w": torch.zeros(8, 1, 7, 7)}),
            r"\(8, 1, 7, 7\), expected \(8, 3, 7, 7\)",
        ),
        (lambda state: state.update({"encoder.blocks.extra.w": torch.zeros(1)}), "no such tensor"),
        (lambda state: state.pop("encoder.blocks.output.conv.w"), "lacks encoder"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, generator, change, message):
    state = initial_state(SMALL, generator)
    change(state)
    save_file(state, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=message):
        Tokenizer(tmp_path / "t.safetensors")


def test_what_is_no_file_of_tensors_is_refused(tmp_path):
    (tmp_path / "t.safetensors").write_bytes(b"nothing")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pkl")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    for name, message in (
        ("t.safetensors", "cannot read"),
        ("none.safetensors", "cannot read"),
        ("module.pkl", "pickled module"),
        ("other.pt", "no dictionary of a discrete"),
    ):
        with pytest.raises(ValueError, match=message):
            Tokenizer(tmp_path / name)
