"""Layer-wise learning rates against the published rule, written out here once more, for the published sizes."""

import pytest
import torch
from torch import nn

from simmim_scale.config.load import load_config
from simmim_scale.config.plan import make_plan
from simmim_scale.models.layer_decay import layer_scales
from simmim_scale.objectives.classifier import build_classifier

RECIPES = ("swin_b_224_800ep", "swinv2_b_224_800ep", "swinv2_h_224_800ep")


def published_scale(name: str, depths: tuple[int, ...], decay: float) -> float:
    """The released rule on the released names: layers.2.blocks.7..., layers.0.downsample..., patch_embed..., norm..."""
    last = sum(depths) + 1
    if name.startswith("patch_embed"):
        layer = 0
    elif name.startswith("layers"):
        stage = int(name.split(".")[1])
        before = sum(depths[:stage])
        layer = before + depths[stage] if "downsample" in name else before + int(name.split(".")[3]) + 1
    else:
        layer = last
    return decay ** (last - layer)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_parameter_of_a_published_model_has_the_published_scale(recipe, repository):
    config = load_config(repository / f"configs/finetune/classification/{recipe}.yaml")
    with torch.device("meta"):
        module = build_classifier(config.model, num_classes=1000, mean=(0.5,) * 3, std=(0.2,) * 3, seed=0, initialise=False)
    decay = config.optimizer.layer_decay
    found = layer_scales(module, decay)
    names = [name for name, _ in module.named_parameters()]
    assert list(found) == names
    expected = {name: published_scale(name.removeprefix("backbone."), config.model.depths, decay) for name in names}
    assert found == pytest.approx(expected, rel=1e-12)
    # 24 blocks, the embedding below them, norm and head above: some values by hand
    assert len(set(found.values())) == 26
    assert found["head.weight"] == found["backbone.norm.bias"] == 1.0
    assert found["backbone.layers.3.blocks.1.mlp.fc1.weight"] == pytest.approx(decay)
    assert found["backbone.layers.0.downsample.reduction.weight"] == found["backbone.layers.0.blocks.1.attn.qkv.weight"]
    assert found["backbone.patch_embed.proj.weight"] == pytest.approx(decay**25)


def test_vit_and_resnet_count_their_blocks(repository):
    layers = {"vit_b_224_800ep": 14, "resnet50_192_300ep": 18}
    for recipe, count in layers.items():
        config = load_config(repository / f"configs/finetune/classification/{recipe}.yaml")
        with torch.device("meta"):
            module = build_classifier(config.model, num_classes=9, mean=(0.5,) * 3, std=(0.2,) * 3, seed=0, initialise=False)
        decay = config.optimizer.layer_decay
        found = layer_scales(module, decay)
        assert len(set(found.values())) == count
        first = "cls_token.token" if "vit" in recipe else "stem.conv.conv.weight"
        assert found[f"backbone.{first}"] == pytest.approx(decay ** (count - 1))
        second = "blocks.0.attn.relative_position_bias_table" if "vit" in recipe else "layers.0.0.reduce.conv.weight"
        assert found[f"backbone.{second}"] == pytest.approx(decay ** (count - 2))
        last = "blocks.11.mlp.fc2.bias" if "vit" in recipe else "layers.3.2.expand.norm.weight"
        assert found[f"backbone.{last}"] == pytest.approx(decay)
        assert found["head.weight"] == 1.0


def test_without_decay_every_network_will_do():
    module = nn.Sequential(nn.Linear(2, 2))
    assert layer_scales(module, 1.0) == {"0.weight": 1.0, "0.bias": 1.0}


def test_a_backbone_that_does_not_know_its_layers_is_an_error():
    module = nn.Module()
    module.backbone = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Linear has no layer_id\(name\) and num_layer_ids, got a decay of 0.8"):
        layer_scales(module, 0.8)


def test_the_curve_of_fine_tuning_equals_timm_at_a_thousand_points(repository):
    """Warm-up and cosine of the released code (timm's scheduler, stepped by update), with this recipe's numbers by hand."""
    from timm.scheduler import CosineLRScheduler

    config = load_config(repository / "configs/finetune/classification/swin_b_224_800ep.yaml")
    plan = make_plan(config.train, config.optimizer, config.schedule, num_samples=1281167, world_size=16)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.25e-3 * 2048 / 512)
    per_epoch = 1281167 / 2048
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=plan.total_steps,
        lr_min=2.5e-7 * 4,
        warmup_lr_init=2.5e-7 * 4,
        warmup_t=round(20 * per_epoch),
        t_in_epochs=False,
    )
    for point in range(1000):
        step = point * (plan.total_steps - 1) // 999
        scheduler.step_update(step)
        assert plan.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
    assert plan.learning_rate.peak == pytest.approx(5e-3)
