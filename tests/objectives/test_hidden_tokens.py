"""Asking the head for hidden tokens only gives the loss and the gradients of the whole picture."""

import pytest
import torch

from simmim_scale.objectives.prediction import Hidden, hide
from simmim_scale.objectives.simmim import HiddenCells

CELLS = HiddenCells((4, 6), 14)


def make_batch(cells: HiddenCells = CELLS, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Masks that hide exactly `cells.count` cells of 8 pixels."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(3, cells.grid[0] * cells.grid[1], generator=generator).argsort(1)
    return {
        "image": torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8, generator=generator),
        "mask": (order < cells.count).view(3, *cells.grid),
        "flip": torch.tensor([True, False, True]),
    }


def loss_and_gradients(module, batch):
    seen = []
    module.head.proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    loss = module(batch)["loss"]
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in module.named_parameters()}, seen


@pytest.mark.parametrize("options", [{}, {"norm_window": 7}, {"loss": "l2"}, {"scale": 4}, {"loss": "smooth_l1", "scale": 8}])
def test_hidden_tokens_alone_give_the_same_loss_and_gradients(make_simmim, options):
    batch = make_batch()
    loss, gradients, seen = loss_and_gradients(make_simmim(hidden_cells=CELLS, **options), batch)
    expected, dense, all_seen = loss_and_gradients(make_simmim(**options), batch)
    assert (seen, all_seen) == ([14], [24])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, dense[name], rtol=1e-5, atol=1e-7, msg=name)


def test_fewer_hidden_cells_than_known_are_no_fault(make_simmim):
    batch = make_batch(HiddenCells((4, 6), 9))
    loss, _, _ = loss_and_gradients(make_simmim(hidden_cells=CELLS), batch)
    torch.testing.assert_close(loss, loss_and_gradients(make_simmim(), batch)[0])


def test_more_hidden_cells_than_known_are_loud(make_simmim):
    with pytest.raises(RuntimeError, match="more than 9 of"):
        make_simmim(hidden_cells=HiddenCells((4, 6), 9))(make_batch())


@pytest.mark.parametrize("cells", [HiddenCells((8, 12), 50), HiddenCells((2, 3), 4)])
def test_cells_smaller_than_a_token_and_larger_ones(make_simmim, cells):
    batch = make_batch(cells)
    loss, _, seen = loss_and_gradients(make_simmim(hidden_cells=cells), batch)
    assert seen == [24 if cells.count == 50 else 16]
    torch.testing.assert_close(loss, loss_and_gradients(make_simmim(), batch)[0], rtol=1e-6, atol=0)


def test_a_mask_on_another_grid_is_taken_whole(make_simmim):
    batch = make_batch()
    finer = batch["mask"].repeat_interleave(2, 1).repeat_interleave(2, 2)
    loss, _, seen = loss_and_gradients(make_simmim(hidden_cells=CELLS), {**batch, "mask": finer})
    assert seen == [24]
    torch.testing.assert_close(loss, loss_and_gradients(make_simmim(), batch)[0])


def test_evaluation_predicts_the_whole_picture(make_simmim):
    parts = make_simmim(hidden_cells=CELLS).eval()(make_batch())
    assert parts["prediction"].shape == (3, 3, 32, 48)


@pytest.mark.parametrize(("cell", "size"), [(1, (4, 6)), (4, (13, 22)), (3, (9, 7))])
def test_the_count_is_that_of_the_pixels(cell, size, generator):
    mask = torch.rand(5, -(-size[0] // cell), -(-size[1] // cell), generator=generator) < 0.5
    hidden = Hidden(mask, cell, size)
    assert torch.equal(hidden.count(torch.float32), hidden.pixels().sum((1, 2, 3)).float())


def test_predicted_pixels_of_a_grid_are_hidden_where_their_centre_is(generator):
    mask = torch.rand(2, 6, 6, generator=generator) < 0.5  # units of 32 of 192 pixels
    hidden = hide(mask, patch_size=32, scale=1, size=(192, 192), grid=(14, 14))
    centres = ((torch.arange(14) + 0.5) * 192 / 14 // 32).long()
    assert torch.equal(hidden.mask, mask[:, centres][:, :, centres])
    assert hidden.size == (14, 14)
