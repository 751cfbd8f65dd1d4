"""Every shipped sweep in its reduced form: each run describes itself and takes optimizer steps on made-up pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from simmim_scale.config.load import load_config
from simmim_scale.data.mask_distance import mask_grid
from simmim_scale.data.masks import sample_mask
from simmim_scale.models.dvae import Sizes, initial_state
from simmim_scale.objectives.simmim import build_simmim
from simmim_scale.sweeps.expand import expand
from simmim_scale.sweeps.spec import load_sweep
from simmim_scale.tasks.model_facts import describe_model

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "ablation"
SWEEPS = sorted(path for path in FOLDER.glob("*.yaml") if not path.name.startswith("_"))
# Narrower than the reduced form: this is about what a run is made of, not about what it learns.
NARROW = ("model.embed_dim=16", "model.num_heads=[1, 1, 2, 2]")


def reduced_runs():
    for path in SWEEPS:
        sweep = load_sweep(path)
        for run in expand(sweep, path, reduced=True):
            if path.stem != "figure1" or run.labels[1] == ".6":
                yield pytest.param(run, id=f"{sweep.sweep}: {run.label}")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The overrides that name a palette and a tokenizer, where a run needs them."""
    folder = tmp_path_factory.mktemp("files")
    np.save(folder / "centres.npy", np.random.default_rng(0).uniform(-1, 1, (16, 3)).astype(np.float32))
    sizes = Sizes(codes=10, hidden=4, blocks=1, first=4)
    save_file(initial_state(sizes, torch.Generator().manual_seed(0)), folder / "tokenizer.safetensors")
    return {
        "clusters": f"objective.centres={folder}/centres.npy",
        "tokens": f"objective.tokenizer={folder}/tokenizer.safetensors",
    }


def make_batch(config) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    height, width = config.model.image_size
    coarse = rng.integers(0, 256, (2, 3, 6, 6), dtype=np.uint8)
    image = torch.from_numpy(coarse.repeat(height // 6, axis=2).repeat(width // 6, axis=3))
    grid = mask_grid((height, width), config.mask.cell)
    masks = [sample_mask(rng, grid=grid, ratio=config.mask.ratio, sampler=config.mask.sampler) for _ in range(2)]
    batch = {"image": image, "mask": torch.from_numpy(np.stack(masks))}
    second = config.objective.second_size(config.model.image_size)
    if second is not None:
        batch["view"] = torch.nn.functional.interpolate(image, second, mode="nearest")
    return batch


@pytest.mark.parametrize("run", list(reduced_runs()))
def test_a_reduced_run_describes_itself_and_learns(run, files):
    (stage,) = run.stages
    config = load_config(stage.config, stage.overrides)
    extra = [files[config.objective.target]] if config.objective.target in files else []
    config = load_config(stage.config, [*stage.overrides, *(NARROW if config.model.name == "swin" else ()), *extra])
    described = describe_model(config)
    assert described["parameters"] > 10_000
    assert described["avg_dist"] > 0
    module = build_simmim(config.model, config.objective, mean=config.data.mean, std=config.data.std, seed=0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    batch = make_batch(config)
    losses = []
    for _ in range(7):
        loss = module(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert min(losses[3:]) < losses[0]


def test_every_table_of_the_supplement_is_there():
    names = {load_sweep(path).sweep for path in SWEEPS}
    assert names == {"table2", "table3", "table4", "table6", "figure1", "section5"}


def test_published_figures_belong_to_runs():
    for path in SWEEPS:
        sweep = load_sweep(path)
        labels = {run.label for run in expand(sweep, path)}
        assert set(sweep.published.values) <= labels, path
        if sweep.published.columns:
            assert len(sweep.published.values) >= len(labels) - 1, path
