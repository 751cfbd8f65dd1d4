"""`simmim plan`: what is counted on shapes alone is what a real forward saves, and what a person sees and may get wrong."""

import json

import pytest
import torch
from typer.testing import CliRunner

from simmim_scale.cli.activation_count import count_configured
from simmim_scale.cli.app import app
from simmim_scale.config.load import load_config
from simmim_scale.engine.activation_checkpointing import apply_activation_checkpointing
from simmim_scale.engine.sequential_attention import apply_sequential_attention
from simmim_scale.objectives.simmim import build_simmim

TINY = "configs/debug/tiny_swinv2.yaml"


class Saved:
    """Bytes that autograd saves, each storage once, without those of the module itself."""

    def __init__(self, module):
        self.held = {}
        self.own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}

    def __call__(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.held[storage.data_ptr()] = storage
        return tensor

    @property
    def nbytes(self):
        return sum(storage.nbytes() for storage in self.held.values())


@pytest.mark.parametrize(("policy", "rows"), [("none", 0), ("block", 0), ("stage", 0), ("none", 1), ("stage", 1)])
@pytest.mark.parametrize("samples", [1, 5])
def test_the_count_is_what_a_real_forward_saves(repository, policy, rows, samples):
    config = load_config(repository / TINY, [f"engine.sequential_attention={rows}"])
    module = build_simmim(config.model, config.objective, mean=config.data.mean, std=config.data.std, seed=0).train()
    apply_sequential_attention(module, rows)
    apply_activation_checkpointing(module, policy)
    side, cells = config.model.image_size[0], config.model.image_size[0] // config.mask.cell
    batch = {
        "image": torch.zeros(samples, 3, side, side, dtype=torch.uint8),
        "mask": torch.ones(samples, cells, cells, dtype=torch.bool),
        "position": torch.arange(samples),
        "flip": torch.zeros(samples, dtype=torch.bool),
    }
    saved = Saved(module)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        loss = module(batch)["loss"]
    assert loss.requires_grad
    model = count_configured(config, on_gpu=False)
    assert model.kept_by_forward(policy, samples) == pytest.approx(saved.nbytes, rel=0.15)
    assert model.parameters == sum(parameter.numel() for parameter in module.parameters())


def test_attention_in_turn_spares_memory_and_repeats_its_products(repository):
    whole, turns, rows = (
        count_configured(load_config(repository / TINY, [f"engine.sequential_attention={n}", "model.window_size=4"]), on_gpu=True)
        for n in (0, 1, 4)
    )
    early = [number for number, block in enumerate(whole.blocks) if block.stage < 2]
    for number, (plain, turn, four) in enumerate(zip(whole.blocks, turns.blocks, rows.blocks, strict=True)):
        # Attention has two products of n x n; the other products of a block are not repeated.
        assert (turn.again > 0) == (number in early)
        assert turn.saved.at(3) + turn.in_turn.at(3) == plain.saved.at(3)
        if number in early:
            assert 0 < turn.at_once(3) < four.at_once(3) <= turn.in_turn.at(1)
    assert turns.multiply_adds == whole.multiply_adds
    assert turns.recomputed("none") == sum(block.again for block in turns.blocks) / whole.multiply_adds
    assert turns.activations("none", 8) < whole.activations("none", 8)


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_json_has_every_way_and_overrides_that_load(repository):
    result = run(repository / TINY, "--gpus-per-node", 1, "--json", "data.train_samples=1000")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert {(row["zero_stage"], row["offload_optimizer"], row["offload_parameters"]) for row in found["options"]} == {
        *((stage, "none", "none") for stage in range(4)),
        *((stage, "cpu", "none") for stage in (1, 2, 3)),
        *((3, *places) for places in (("cpu", "cpu"), ("nvme", "none"), ("nvme", "nvme"))),
    }
    chosen = found["recommended"]
    config = load_config(repository / TINY, chosen["overrides"])
    assert config.engine.zero_stage == chosen["zero_stage"]
    assert config.train.micro_batch == chosen["micro_batch"]
    assert chosen["days"] == pytest.approx(chosen["steps"] * chosen["step"]["seconds"] / 86400, abs=1e-3)
    activations = found["activations_per_sample_gib"]
    assert activations["none"] > activations["selective"] > activations["block"] >= activations["offload"]


def test_fine_tuning_is_planned_with_its_classifier(repository):
    recipe = repository / "configs/finetune/classification/swinv2_b_224_800ep.yaml"
    sizes = []
    for classes in (10, 1000):
        result = run(recipe, "--json", f"classification.num_classes={classes}")
        assert result.exit_code == 0, result.output
        sizes.append(json.loads(result.output)["model"]["parameters"])
    assert sizes[1] - sizes[0] == 990 * (1024 + 1)


def test_attention_in_turn_is_named(repository):
    result = run(repository / TINY, "--gpus-per-node", 1, "engine.sequential_attention=2")
    assert result.exit_code == 0, result.output
    assert "2 rows of windows at once" in " ".join(result.output.split())


def test_the_largest_recipe_is_planned_without_its_memory(repository):
    result = run(repository / "configs/pretrain/swinv2_g_800ep.yaml", "--nodes", 2, "--gpu", "a100", "--gpu-memory", 40)
    assert result.exit_code == 0, result.output
    assert "3010.4M parameters" in result.output
    assert "GPU-hours" in result.output
    assert "Set: engine.zero_stage=" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes", 0), "--nodes: a number of more than 0, got 0"),
        (("--gpu-memory", -1), "--gpu-memory: GiB of more than 0, got -1"),
        (("--gpu-memory", "nan"), "--gpu-memory: GiB of more than 0, got nan"),
        (("--cpu-memory", "inf"), "--cpu-memory: GiB of more than 0, got inf"),
        (("task=backbone",), "task: simmim plan knows pretrain and classification, got 'backbone'"),
        (("--gpu", "TPU"), "--gpu: one of B200, H200, H100"),
        (("--interconnect", "string"), "--interconnect: nvlink, pcie"),
        (("--gpus-per-node", 7), "multiple of the number of ranks"),
        (("--gpu-memory", 1), "nothing fits"),
    ],
)
def test_wrong_input_ends_with_advice_and_code_2(repository, arguments, message):
    result = run(repository / TINY, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
