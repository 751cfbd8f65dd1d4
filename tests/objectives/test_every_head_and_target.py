"""Every head with every target trains, evaluates and draws at a tiny size; wrong combinations are refused when they are built."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from simmim_scale.config.schema import ObjectiveConfig, SwinConfig
from simmim_scale.models.complexity import head_multiply_adds
from simmim_scale.models.dvae import Sizes, initial_state
from simmim_scale.objectives import inverse_swin
from simmim_scale.objectives.complexity import objective_sizes
from simmim_scale.objectives.heads import HEADS
from simmim_scale.objectives.inverse_swin import BASE, TINY, InverseSwin, Pyramid
from simmim_scale.objectives.simmim import HiddenCells, build_simmim
from tests.host_reads import HostReads

MODEL = {"image_size": 48, "embed_dim": 8, "depths": (1, 1, 1), "num_heads": (1, 2, 2), "window_size": 3}  # stride 16: 3x3 tokens
COLOUR = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3)}
CELLS = HiddenCells((3, 3), 5)
TARGETS = {
    "pixels": {},
    "l2": {"loss": "l2"},
    "norm": {"norm_target_window": 7},
    "pixels 3^2": {"downsample": 16, "loss": "smooth_l1"},
    "norm 12^2": {"norm_target_window": 7, "downsample": 4},
    "bins 48^2": {"target": "bins", "bins": 4},
    "bins 12^2": {"target": "bins", "bins": 256, "downsample": 4},
    "clusters": {"target": "clusters", "downsample": 4},
    "tokens split": {"target": "tokens", "second_view": 48},
    "tokens resample": {"target": "tokens", "second_view": 32, "token_grid": "resample"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A palette and a tokenizer."""
    directory = tmp_path_factory.mktemp("files")
    np.save(directory / "centres.npy", np.random.default_rng(0).uniform(-1, 1, (16, 3)).astype(np.float32))
    sizes = Sizes(codes=10, hidden=4, blocks=1, first=4)
    save_file(initial_state(sizes, torch.Generator().manual_seed(0)), directory / "tokenizer.safetensors")
    return {"centres": str(directory / "centres.npy"), "tokenizer": str(directory / "tokenizer.safetensors")}


@pytest.fixture
def small(monkeypatch):
    """Inverse Swins of the same form with few blocks."""
    monkeypatch.setattr(inverse_swin, "TINY", Pyramid(dim=16, depths=(1, 2, 1, 1), num_heads=(2, 2, 1, 1)))
    monkeypatch.setattr(inverse_swin, "BASE", Pyramid(dim=32, depths=(2, 1, 1, 1), num_heads=(4, 2, 2, 1)))


def make_batch(second_view: int | None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8, generator=generator)
    image = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)
    order = torch.rand(2, 9, generator=generator).argsort(1)
    batch = {"image": image, "mask": (order < 5).view(2, 3, 3), "flip": torch.tensor([True, False])}
    if second_view:
        batch["view"] = torch.nn.functional.interpolate(image, (second_view, second_view), mode="nearest")
    return batch


def build(head, target, files, **options):
    objective = ObjectiveConfig(head=head, **{**files, **target})
    return build_simmim(SwinConfig(**MODEL), objective, **COLOUR, seed=0, hidden_cells=CELLS, **options)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head", HEADS)
def test_it_trains_evaluates_and_draws(head, target, files):
    module = build(head, TARGETS[target], files)
    batch = make_batch(TARGETS[target].get("second_view"))
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    first = module.eval()(batch)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    module.train()
    for step in range(4):
        loss = module(batch)["loss"]
        if step == 0:  # hidden tokens alone, against all of them
            torch.testing.assert_close(loss, first["loss"], rtol=1e-5, atol=1e-6)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
        optimizer.step()
    parts = module.eval()(batch)
    assert parts["loss"] < first["loss"]
    assert parts["loss_per_sample"].shape == (2,)
    pictures, mask = module.prepare(batch)
    drawn = module.target.to_pixels(parts["prediction"], pictures)
    assert drawn.shape == batch["image"].shape
    assert torch.isfinite(drawn).all()
    baseline = module.target.baseline(pictures, module.hidden(pictures, mask))
    assert torch.equal(baseline.count, module.hidden(pictures, mask).count(torch.float32))
    assert (baseline.error > 0).all()


@pytest.mark.parametrize(("pyramid", "millions"), [(TINY, 28.3), (BASE, 86.7)])
def test_inverse_swins_reach_full_resolution(pyramid, millions):
    with torch.device("meta"):
        head = InverseSwin(num_features=1024, stride=32, channels=3, pyramid=pyramid)
    features = torch.empty(1, 6, 6, 1024, device="meta")
    assert head.trunk(features).shape == (1, 48, 48, pyramid.dim // 8)
    assert head(features).shape == (1, 3, 192, 192)
    assert sum(parameter.numel() for parameter in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(("stride", "patch", "side"), [(1, 1, 6), (2, 1, 12), (8, 1, 48), (16, 2, 48), (12, 3, 24)])
def test_inverse_swins_stop_at_the_predicted_resolution(stride, patch, side):
    head = InverseSwin(num_features=8, stride=stride, channels=1, pyramid=Pyramid(16, (1, 1, 1, 1), (1, 1, 1, 1)))
    head.init_weights(torch.Generator().manual_seed(0))
    assert head.patch == patch
    assert head.trunk(torch.randn(1, 6, 6, 8)).shape[1] == side
    assert head(torch.randn(1, 6, 6, 8)).shape == (1, 1, 6 * stride, 6 * stride)


def test_sizes_of_head_and_target(files):
    with torch.device("meta"):
        module = build("mlp2", TARGETS["tokens split"], files, initialise=False)
    sizes = objective_sizes(module, (48, 48))
    assert sizes.predicted == (10, 6, 6)
    assert sizes.patch == 2
    assert sizes.head_parameters == 32 * 32 + 32 + 32 * 40 + 40
    assert head_multiply_adds(module.head, torch.empty(1, 3, 3, 32, device="meta")) == 9 * (32 * 32 + 32 * 40)
    assert sizes.target_multiply_adds > 48 * 48 * 3 * 4 * 49


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "clusters", "centres": None}, "needs a file of RGB centres"),
        ({"target": "tokens", "tokenizer": None, "second_view": 48}, "needs the weights of a discrete VAE"),
        ({"target": "tokens"}, "needs a second view"),
        ({"target": "tokens", "second_view": 36}, "Choose a multiple of 8"),
        ({"target": "tokens", "second_view": 32}, "4x4 codes do not divide evenly among the 3x3 tokens"),
        ({"target": "bins", "norm_target_window": 47}, "norm_target_window: the target 'bins' has the cross-entropy"),
        ({"target": "clusters", "loss": "l2"}, "loss: the target 'clusters' has the cross-entropy"),
        ({"target": "tokens", "downsample": 4}, "has the resolution of second_view"),
        ({"downsample": 12}, "does not fit the backbone's stride of 16"),
        ({"target": "binns"}, "Did you mean 'bins'"),
        ({"head": "inverse_swin"}, "Did you mean 'inverse_swin_"),
    ],
)
def test_wrong_combinations_are_clear_errors(files, settings, message):
    with pytest.raises(ValueError, match=message):
        build(settings.pop("head", "linear"), {**settings}, files)


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_reads_nothing_back_to_the_host(target, files):
    module, batch = build("mlp2", TARGETS[target], files), make_batch(TARGETS[target].get("second_view"))
    module(batch)["loss"].backward()  # constants and files are read once
    with HostReads() as reads:
        module(batch)["loss"].backward()
    assert not reads.found


@pytest.mark.gpu
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss_kernel", ["one_pass", "triton"])
def test_the_device_gives_the_loss_of_the_cpu(target, loss_kernel, files):
    batch = make_batch(TARGETS[target].get("second_view"))
    expected = build("linear", TARGETS[target], files)(batch)["loss"]
    module = build("linear", TARGETS[target], files, attention="reference", masked_loss=loss_kernel).cuda()
    loss = module({name: value.cuda() for name, value in batch.items()})["loss"]
    loss.backward()
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_a_batch_without_the_second_view_says_so(files):
    module = build("linear", TARGETS["tokens split"], files)
    with pytest.raises(ValueError, match="needs 'view' of 48x48 pixels, got None"):
        module(make_batch(None))


def test_a_target_of_ones_own_as_the_readme_shows_it(files, tmp_path, monkeypatch):
    text = (Path(inverse_swin.__file__).parent / "README.md").read_text()
    (tmp_path / "mytarget.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)
    module, batch = build("linear", {"target": "mytarget:brightness"}, files), make_batch(None)
    module(batch)["loss"].backward()
    parts = module.eval()(batch)
    assert parts["prediction"].shape == (2, 1, 24, 24)
    pictures, _ = module.prepare(batch)
    assert module.target.to_pixels(parts["prediction"], pictures).shape == batch["image"].shape
    grey = torch.nn.functional.avg_pool2d(pictures.image.mean(1, keepdim=True), 2)
    torch.testing.assert_close(module.target(pictures.image), grey)


def test_a_head_is_given_the_implementation_of_attention(files):
    module = build("inverse_swin_t", {"downsample": 16}, files, attention="reference")
    assert {block.attn.attention for block in module.head.checkpointable_blocks()} == {"reference"}
