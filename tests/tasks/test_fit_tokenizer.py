"""A small tokenizer is trained on shards, and its file is one that the target takes."""

import pytest
import torch

from simmim_scale.models.dvae import Sizes, Tokenizer, initial_state
from simmim_scale.tasks.fit_tokenizer import TokenizerOptions, fit_tokenizer, relaxed_loss
from tests.data.conftest import encode, picture, write_shards

OPTIONS = TokenizerOptions(codes=8, hidden=8, size=16, steps=6, batch=4, learning_rate=3e-3)


@pytest.fixture
def shards(tmp_path):
    return str(write_shards(tmp_path / "set", [encode(picture(number)) for number in range(6)]).directory)


def test_it_learns_and_its_file_is_a_tokenizer(shards, tmp_path):
    losses, out = [], tmp_path / "new" / "tokenizer.safetensors"
    fitted = fit_tokenizer(shards, out, OPTIONS, device=torch.device("cpu"), progress=lambda step, loss: losses.append(loss))
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    tokenizer = Tokenizer(out)
    assert (tokenizer.sizes, tokenizer.has_decoder) == (Sizes(codes=8, hidden=8, blocks=1, first=8), True)
    codes = tokenizer.codes(torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8))
    assert codes.shape == (1, 4, 4)
    assert 1 <= fitted.used <= 8
    with pytest.raises(ValueError, match="is there already"):
        fit_tokenizer(shards, out, OPTIONS, device=torch.device("cpu"), progress=lambda step, loss: None)


def test_gradients_reach_the_encoder_through_the_codes(generator):
    state = {name: tensor.requires_grad_() for name, tensor in initial_state(Sizes(8, 8, 1, 8), generator).items()}
    relaxed_loss(state, torch.rand(1, 3, 16, 16), temperature=0.5, generator=generator).backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in state.values())
    assert state["encoder.blocks.input.w"].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        (TokenizerOptions(size=20), "t.safetensors", "a multiple of 8 pixels, got 20"),
        (TokenizerOptions(hidden=6), "t.safetensors", "a multiple of 4"),
        (TokenizerOptions(), "t.pt", "a file named"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, options, name, message):
    with pytest.raises(ValueError, match=message):
        fit_tokenizer("nowhere", tmp_path / name, options, device=torch.device("cpu"), progress=lambda step, loss: None)
