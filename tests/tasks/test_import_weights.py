"""Published checkpoints imported whole: logits as timm's, configuration detected, nothing lost and nothing left over."""

import os
import pickle
import sys
import types

import pytest
import torch
from torch.nn import functional as F

import simmim_scale
from simmim_scale.models.layouts.records import Hints
from simmim_scale.models.weights import load_weights
from simmim_scale.tasks.import_weights import import_weights
from simmim_scale.tasks.pretrained import load_pretrained


@pytest.fixture
def bring(tmp_path):
    """Save a checkpoint and import it."""

    def bring(checkpoint, **options):
        torch.save(checkpoint, tmp_path / "published.pth")
        return import_weights(tmp_path / "published.pth", tmp_path / "out", **options)

    return bring


@pytest.mark.parametrize(
    ("version", "options"),
    [(1, {}), (1, {"window": 8}), (1, {"in_chans": 1}), (2, {}), (2, {"window": 8}), (2, {"pretrained": (3, 3)})],
)
def test_classification_checkpoints_give_the_logits_of_timm(published, bring, version, options):
    model, checkpoint = published(version, **options)
    imported = bring(checkpoint)
    assert imported.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    classifier = simmim_scale.load(imported.directory)
    image = torch.randn(2, options.get("in_chans", 3), 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(classifier({"image": image})["logits"], model(image), rtol=1e-4, atol=1e-4)
    assert not classifier.training
    assert [tuple(m.shape) for m in classifier.backbone.features(image)] == [(2, 16, 16, 16), (2, 32, 8, 8)]


def test_the_configuration_is_detected(published, bring):
    _, checkpoint = published(2, window=8, pretrained=(6, 5), in_chans=1)
    config = bring(checkpoint).config
    assert config.task == "classification"
    assert config.model.model_dump() == {
        "name": "swin_v2",
        "image_size": (64, 64),
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 8,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "drop_path": 0.0,
        "pretrained_window_sizes": (6, 5),
        "extra_norm_period": 0,
    }
    assert len(config.data.mean) == 1


@pytest.mark.parametrize("version", [1, 2])
def test_pretraining_checkpoints_predict_as_published(published, published_pretraining, bring, version):
    model, _ = published(version)
    checkpoint = published_pretraining(version)
    imported = bring(checkpoint, hints=Hints(norm_target_window=0))
    module = simmim_scale.load(imported.directory)
    image, mask = torch.randn(2, 3, 64, 64), torch.rand(2, 16, 16) < 0.6
    state = checkpoint["model"]
    with torch.no_grad():
        w = mask[..., None].float()
        tokens = model.patch_embed(image) * (1 - w) + state["encoder.mask_token"].view(16) * w
        features = model.norm(model.layers(tokens)).permute(0, 3, 1, 2)
        expected = F.pixel_shuffle(F.conv2d(features, state["decoder.0.weight"], state["decoder.0.bias"]), 8)
        parts = module({"image": image, "mask": mask})
    torch.testing.assert_close(parts["prediction"], expected, rtol=1e-4, atol=1e-4)
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].float()
    loss = ((image - expected).abs() * pixels).sum() / (pixels.sum() + 1e-5) / 3
    torch.testing.assert_close(parts["loss"], loss, rtol=1e-4, atol=0)


def test_every_published_tensor_arrives_unchanged(published_pretraining, bring):
    checkpoint = published_pretraining(2)
    state = load_weights(bring(checkpoint).directory).state
    published = {k: v for k, v in checkpoint["model"].items() if not k.endswith(("index", "coords_table", "attn_mask"))}
    assert len(state) == len(published)
    by_hand = {
        "encoder.mask_token": "mask_token.token",
        "decoder.0.weight": "head.proj.weight",
        "encoder.layers.1.blocks.0.attn.q_bias": "backbone.layers.1.blocks.0.attn.qkv.q_bias",
        "encoder.layers.0.blocks.1.attn.logit_scale": "backbone.layers.0.blocks.1.attn.logit_scale",
        "encoder.layers.0.blocks.1.attn.cpb_mlp.0.bias": "backbone.layers.0.blocks.1.attn.cpb_mlp.0.bias",
        "encoder.layers.0.downsample.reduction.weight": "backbone.layers.0.downsample.reduction.weight",
        "encoder.patch_embed.norm.weight": "backbone.patch_embed.norm.weight",
        "encoder.norm.bias": "backbone.norm.bias",
    }
    for theirs, ours in by_hand.items():
        assert torch.equal(state[ours].flatten(), published[theirs].flatten()), theirs


def test_older_names_data_parallel_prefix_and_the_norm_on_the_main_branch(published_pretraining, bring):
    plain = published_pretraining(2)
    expected = load_weights(bring(plain).directory).state
    state = {f"module.{name}".replace("cpb_mlp", "rpe_mlp"): value for name, value in plain["model"].items()}
    for stage, width in enumerate((16, 32)):
        for kind in ("weight", "bias"):
            state[f"module.encoder.layers.{stage}.blocks.1.enorm.{kind}"] = torch.rand(width)
    imported = bring({"model": state})
    assert imported.config.model.extra_norm_period == 2
    actual = load_weights(imported.directory).state
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    norm = state["module.encoder.layers.1.blocks.1.enorm.weight"]
    assert torch.equal(actual["backbone.layers.1.blocks.1.norm3.weight"], norm)


def test_a_bare_state_dict_and_safetensors_are_read_too(published, tmp_path):
    from safetensors.torch import save_file

    _, checkpoint = published(1)
    torch.save(checkpoint["model"], tmp_path / "bare.pt")
    save_file({k: v.contiguous() for k, v in checkpoint["model"].items()}, tmp_path / "bare.safetensors")
    first = import_weights(tmp_path / "bare.pt", tmp_path / "a")
    second = import_weights(tmp_path / "bare.safetensors", tmp_path / "b")
    assert first.config == second.config


def test_settings_stored_in_the_file_are_read_without_their_class(published_pretraining, bring, monkeypatch):
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    for name, value in (("yacs", types.ModuleType("yacs")), ("yacs.config", module)):
        monkeypatch.setitem(sys.modules, name, value)
    node = module.CfgNode
    target = node(NORM_TARGET=node(ENABLE=True, PATCH_SIZE=9))
    swin = node(WINDOW_SIZE=8, PRETRAINED_WINDOW_SIZES=[6, 6])
    settings = node(MODEL=node(DROP_PATH_RATE=0.2, SIMMIM=target, SWINV2=swin), DATA=node(IMG_SIZE=96, MASK_RATIO=0.7))
    settings.__dict__["__immutable__"] = True  # as the real class keeps it
    checkpoint = published_pretraining(2, window=8, buffers=False)
    imported = _bring_without_class(bring, {**checkpoint, "config": settings}, monkeypatch)
    config = imported.config
    assert config.model.window_size == 8
    assert config.model.pretrained_window_sizes == (6, 6)
    assert config.model.image_size == (96, 96)
    assert config.model.drop_path == 0.2
    assert config.objective.norm_target_window == 9
    assert config.mask.ratio == 0.7


def _bring_without_class(bring, checkpoint, monkeypatch):
    real_load = torch.load

    def load_without_yacs(*args, **kwargs):
        monkeypatch.delitem(sys.modules, "yacs.config")
        monkeypatch.delitem(sys.modules, "yacs")
        return real_load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load_without_yacs)
    return bring(checkpoint)


@pytest.mark.parametrize(("version", "window"), [(1, None), (2, 47)])
def test_the_target_is_that_of_the_released_configurations_unless_told(published_pretraining, bring, version, window):
    imported = bring(published_pretraining(version))
    assert imported.config.objective.norm_target_window == window
    assert any("target" in note for note in imported.notes)


def test_left_over_missing_and_misshapen_tensors_are_all_listed_and_nothing_is_written(published, bring, tmp_path):
    _, checkpoint = published(1)
    state = checkpoint["model"]
    state["absolute_offsets"] = torch.zeros(1, 256, 16)
    state["layers.0.blocks.0.mlp.norm.weight"] = torch.zeros(64)
    del state["layers.1.blocks.0.norm2.bias"]
    state["norm.weight"] = torch.zeros(31)
    with pytest.raises(ValueError, match="not supported") as error:
        bring(checkpoint)
    for part in (
        "2 left over",
        "absolute_offsets",
        "layers.0.blocks.0.mlp.norm.weight",
        "layers.1.blocks.0.norm2.bias",
        "norm.weight: got (31,), expected (32,)",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_absolute_position_embedding_is_refused_by_name(published, bring):
    _, checkpoint = published(1)
    checkpoint["model"]["absolute_pos_embed"] = torch.zeros(1, 256, 16)
    with pytest.raises(ValueError, match=r"absolute position embedding \(absolute_pos_embed\)"):
        bring(checkpoint)


def test_a_window_that_nothing_tells_is_asked_for(published, bring):
    _, checkpoint = published(2, buffers=False)
    with pytest.raises(ValueError, match="--window"):
        bring(checkpoint)
    config = bring(checkpoint, hints=Hints(window_size=4, image_size=(64, 64))).config
    assert config.model.window_size == 4
    assert config.model.image_size == (64, 64)


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        (Hints(window_size=7), "7 was asked for, but the checkpoint's own is 4"),
        (Hints(pretrained_window_sizes=(3, 4)), "3 was asked for in stage 0, but the checkpoint's own is 4"),
        (Hints(image_size=(96, 96)), "own is \\(64, 64\\)"),
    ],
)
def test_hints_that_contradict_the_tensors_are_refused(published, bring, hints, message):
    _, checkpoint = published(2)
    with pytest.raises(ValueError, match=message):
        bring(checkpoint, hints=hints)


def test_other_models_are_refused_with_a_reason(bring):
    with pytest.raises(ValueError, match="neither a pre-training"):
        bring({"model": {"blocks.0.attn.qkv.weight": torch.zeros(2, 2)}})
    with pytest.raises(ValueError, match="no Swin"):
        bring({"model": {"blocks.0.attn.qkv.weight": torch.zeros(2, 2), "head.weight": torch.zeros(2, 2)}})


class Malicious:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_files_that_would_run_code_are_not_loaded(published, bring, tmp_path):
    with pytest.raises(ValueError, match="not loaded for safety"):
        bring({**published(1)[1], "config": Malicious()})
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Malicious()}))
    with pytest.raises(ValueError, match="checkpoint"):
        import_weights(tmp_path / "plain.pth", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all"])
def test_damaged_files_are_clear_errors(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint"):
        import_weights(tmp_path / "x.pth", tmp_path / "out")


def test_a_truncated_file_is_a_clear_error(published, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(published(1)[1], path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated"):
        import_weights(path, tmp_path / "out")
    with pytest.raises(ValueError, match="no file"):
        import_weights(tmp_path / "nowhere.pth", tmp_path / "out")


def test_where_the_weights_are_from_is_kept(published, bring):
    extra = load_pretrained(bring(published(1)[1]).directory).extra
    assert extra == {"imported_from": "published.pth", "layout": "microsoft"}
