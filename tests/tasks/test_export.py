"""Exports, each loaded with its library by the command itself; models that the libraries made, saved, imported and compared."""

import json
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

import simmim_scale
from simmim_scale.config.load import validate
from simmim_scale.config.yaml_source import Source as Tree
from simmim_scale.models.layouts.records import Hints
from simmim_scale.models.weights import Weights, load_weights, save_weights
from simmim_scale.tasks import export as export_module
from simmim_scale.tasks.export import export_weights
from simmim_scale.tasks.export.records import TOLERANCE, Source
from simmim_scale.tasks.import_weights import import_weights
from simmim_scale.tasks.pretrained import CLASS_NAMES, as_pretrained, assemble

CLASSES = 7
SIZES = {"image_size": [64, 64], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
MODELS = {
    "v1": {"name": "swin", "window_size": 4, **SIZES},
    "v2": {"name": "swin_v2", "window_size": 4, **SIZES},
    "v2, one window, pre-trained at others": {"name": "swin_v2", "window_size": 8, "pretrained_window_sizes": [6, 3], **SIZES},
    "v1, smaller last window": {"name": "swin", "window_size": 16, **SIZES},
    "v2, grey, no biases": {"name": "swin_v2", "window_size": 4, "in_chans": 1, "qkv_bias": False, **SIZES},
    "v2, extra norms": {"name": "swin_v2", "window_size": 4, "extra_norm_period": 2, **SIZES},
    "v2, padded": {"name": "swin_v2", "window_size": 5, **SIZES},
    "v2, four stages": {
        "name": "swin_v2",
        "window_size": 4,
        "image_size": [64, 64],
        "embed_dim": 8,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 1, 2, 2],
    },
    "v1, wide": {"name": "swin", "window_size": 16, **SIZES, "image_size": [32, 64]},
}


def source(model: str, task: str, facts: dict | None = None, **sections) -> Source:
    """A model with random weights that differ from one tensor to the next."""
    section = MODELS[model]
    channels = section.get("in_chans", 3)
    tree = {"task": task, "model": section, "mask": {"cell": 8}, **sections}
    tree["data"] = {"mean": [0.4] * channels, "std": [0.2] * channels}
    config = validate(Tree(tree=tree))
    module = assemble(config, {"head.weight": torch.zeros(CLASSES, 1)})
    generator = torch.Generator().manual_seed(5)
    state = {
        name: 0.2 * torch.randn(value.shape, generator=generator) + float("norm" in name and name.endswith("weight"))
        for name, value in module.state_dict().items()
    }
    weights = Weights(path=Path(), state=state, config=config.model_dump(mode="json"), extra=facts or {"step": "12"})
    return Source(as_pretrained(weights), state, metrics={"val_loss": 0.25})


def names(count: int = CLASSES) -> dict:
    return {CLASS_NAMES: json.dumps([f"kind {number}" for number in range(count)])}


# ------------------------------------------------------------------------------------------------------------------ out


@pytest.mark.parametrize(
    ("model", "task", "to", "outputs"),
    [
        ("v1", "classification", "timm", {"logits", "final tokens", "map of stage 0", "map of stage 1"}),
        ("v1, wide", "classification", "timm", {"logits"}),
        ("v2", "classification", "timm", {"logits"}),
        ("v2, one window, pre-trained at others", "classification", "timm", {"logits"}),
        ("v2, grey, no biases", "classification", "timm", {"logits"}),
        ("v1, smaller last window", "pretrain", "timm", {"final tokens"}),
        ("v2", "pretrain", "timm", {"final tokens"}),
        ("v1", "classification", "huggingface", {"logits", "final tokens"}),
        ("v2, one window, pre-trained at others", "classification", "huggingface", {"logits", "final tokens"}),
        ("v1", "pretrain", "huggingface", {"prediction under a mask", "final tokens"}),
        ("v2", "pretrain", "huggingface", {"prediction under a mask", "final tokens"}),
        ("v2, grey, no biases", "backbone", "huggingface", {"final tokens"}),
        ("v1", "classification", "microsoft", {"logits", "tensors read back"}),
        ("v2, one window, pre-trained at others", "pretrain", "microsoft", {"final tokens", "tensors read back"}),
        ("v2, extra norms", "pretrain", "microsoft", {"tensors read back"}),
        ("v2, four stages", "classification", "torchvision-detection-backbone", {"map of stage 0", "map of stage 1"}),
    ],
)
def test_exports_compute_the_same_where_they_are_loaded(model, task, to, outputs, tmp_path):
    exported = export_weights(source(model, task), tmp_path / "out", to=to)
    assert exported.unverified is None
    differences = {agreement.output: agreement.difference for agreement in exported.agreements}
    assert outputs <= set(differences)
    assert max(differences.values()) <= TOLERANCE
    card = (tmp_path / "out/README.md").read_text()
    assert "val_loss: 0.25" in card
    assert "step 12" in card
    assert "loaded and compared" in card
    assert not list(tmp_path.glob(".*"))


def test_onnx_agrees_for_any_batch(tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a traced batch is a symbol and no int

    model_source = source("v2, extra norms", "classification", names())
    exported = export_weights(model_source, tmp_path / "out", to="onnx")
    assert max(agreement.difference for agreement in exported.agreements) <= TOLERANCE
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"])[6] == "kind 6"
    image = model_source.picture(batch=1)
    expected = model_source.module({"image": image})["logits"].detach()
    found = torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def test_a_difference_is_an_error_and_leaves_nothing(tmp_path):
    model_source = source("v1", "classification")
    with torch.no_grad():
        model_source.module.head.bias += 1e-3  # the module computes something else than the tensors that are written
    with pytest.raises(ValueError, match=r"computes something else \(logits by"):
        export_weights(model_source, tmp_path / "out", to="timm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "task", "to", "message"),
    [
        ("v2, padded", "classification", "timm", "pads after the shift"),
        ("v2, extra norms", "pretrain", "timm", "no norm on the main branch"),
        ("v2, extra norms", "pretrain", "huggingface", "no norm on the main branch"),
        ("v1, smaller last window", "pretrain", "huggingface", "one window in all stages, this model has 16x16, 8x8"),
        ("v1", "backbone", "microsoft", "no checkpoint of theirs"),
        ("v1", "pretrain", "tensorflow", "Known: timm, microsoft"),
    ],
)
def test_what_a_library_does_not_have_is_refused(model, task, to, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_weights(source(model, task), tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_said_in_the_result_and_in_the_card(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_importable", lambda name: False)
    exported = export_weights(source("v1", "classification"), tmp_path / "out", to="huggingface")
    assert "transformers cannot be imported" in exported.unverified
    assert "NOT verified: transformers" in (tmp_path / "out/README.md").read_text()


def test_a_directory_with_something_in_it_is_not_written_to(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        export_weights(source("v1", "classification"), tmp_path, to="timm")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_head_leaves_its_decoder_out_and_says_so(tmp_path):
    model_source = source("v2", "pretrain")
    config = model_source.config.model_copy(
        update={"objective": model_source.config.objective.model_copy(update={"head": "mine:head"})}
    )
    other = replace(model_source, pretrained=replace(model_source.pretrained, config=config))
    exported = export_weights(other, tmp_path / "out", to="huggingface")
    assert any("mine:head head onto pixels has no place there" in note for note in exported.notes)
    assert transformers.Swinv2Model.from_pretrained(tmp_path / "out").config.window_size == 4


# ------------------------------------------------------------------------------------------------------ out and in again


@pytest.mark.parametrize(
    ("model", "task", "layout"),
    [
        (model, task, layout)
        for model in ("v1", "v2, one window, pre-trained at others")
        for task in ("classification", "pretrain")
        for layout in ("timm", "huggingface", "microsoft")
    ],
)
def test_what_was_exported_is_imported_bit_for_bit(model, task, layout, tmp_path):
    model_source = source(model, task, names() if task == "classification" else None)
    export_weights(model_source, tmp_path / "out", to=layout)
    file = tmp_path / "out" / ("checkpoint.pth" if layout == "microsoft" else "")
    imported = import_weights(file, tmp_path / "back", layout=layout)
    back = load_weights(tmp_path / "back")
    kept = model_source.state if (task, layout) != ("pretrain", "timm") else model_source.backbone_state
    assert back.state.keys() == kept.keys()
    assert all(torch.equal(back.state[name], value) for name, value in kept.items())
    assert imported.config.model.model_dump() == model_source.config.model.model_dump()
    if layout != "microsoft":
        assert imported.config.data.mean == pytest.approx(model_source.config.data.mean)
    if task == "classification" and layout != "microsoft":
        assert json.loads(back.extra[CLASS_NAMES])[3] == "kind 3"
    assert "imported from" in (tmp_path / "back/README.md").read_text()


# ------------------------------------------------------------------------------------------- models that a library made


def randomized(model):
    """Every parameter away from its initial value, with a fixed seed."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                0.2 * torch.randn(parameter.shape, generator=generator) + float("norm" in name and name.endswith("weight"))
            )
    return model.eval()


def picture():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(9))


HF = {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "encoder_stride": 8}


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("version", ["Swin", "Swinv2"])
def test_classifiers_of_transformers_give_equal_logits(version, binary, tmp_path):
    settings = {"pretrained_window_sizes": [3, 5]} if version == "Swinv2" else {}
    labels = {number: f"bird {number}" for number in range(CLASSES)}
    config = getattr(transformers, f"{version}Config")(**HF, **settings, id2label=labels)
    theirs = randomized(getattr(transformers, f"{version}ForImageClassification")(config))
    theirs.save_pretrained(tmp_path / "saved")
    if binary:
        torch.save(load_file(tmp_path / "saved/model.safetensors"), tmp_path / "saved/pytorch_model.bin")
        (tmp_path / "saved/model.safetensors").unlink()
    imported = import_weights(tmp_path / "saved", tmp_path / "in", layout="huggingface")
    module = simmim_scale.load(tmp_path / "in")
    with torch.no_grad():
        logits, expected = module({"image": picture()})["logits"], theirs(picture()).logits
        tokens, body = module.backbone(picture()), getattr(theirs, theirs.base_model_prefix)(picture()).last_hidden_state
    assert (logits - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    assert (tokens.flatten(1, 2) - body).abs().max() <= 1e-5 * max(1, body.abs().max())
    assert json.loads(load_weights(imported.directory).extra[CLASS_NAMES])[6] == "bird 6"
    if version == "Swinv2":
        assert imported.config.model.pretrained_window_sizes == (3, 5)


@pytest.mark.parametrize("version", ["Swin", "Swinv2"])
def test_masked_image_modeling_of_transformers_gives_equal_predictions_and_loss(version, tmp_path):
    settings = {"pretrained_window_sizes": [0, 0]} if version == "Swinv2" else {}
    theirs = randomized(
        getattr(transformers, f"{version}ForMaskedImageModeling")(getattr(transformers, f"{version}Config")(**HF, **settings))
    )
    theirs.save_pretrained(tmp_path / "saved")
    import_weights(tmp_path / "saved", tmp_path / "in", layout="huggingface")
    module = simmim_scale.load(tmp_path / "in")
    mask = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    with torch.no_grad():
        ours, out = module({"image": picture(), "mask": mask}), theirs(picture(), bool_masked_pos=mask.flatten(1))
    assert (ours["prediction"] - out.reconstruction).abs().max() <= 1e-5 * max(1, out.reconstruction.abs().max())
    torch.testing.assert_close(ours["loss"], out.loss, rtol=1e-5, atol=0)


def test_names_that_transformers_uses_inside_its_swin_are_understood(tmp_path):
    theirs = randomized(transformers.SwinForImageClassification(transformers.SwinConfig(**HF, num_labels=CLASSES)))
    save_file({name: value.contiguous() for name, value in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    theirs.config.save_pretrained(tmp_path)
    import_weights(tmp_path, tmp_path / "in", layout="huggingface")
    with torch.no_grad():
        torch.testing.assert_close(
            simmim_scale.load(tmp_path / "in")({"image": picture()})["logits"], theirs(picture()).logits, rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("saved", ["for the Hub", "a state dict"])
def test_models_of_timm_give_equal_logits_and_maps(version, saved, tmp_path):
    entry = "swin_tiny_patch4_window7_224" if version == 1 else "swinv2_tiny_window8_256"
    settings = {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    theirs = randomized(timm.create_model(entry, num_classes=CLASSES, **settings))
    hints = Hints()
    if saved == "for the Hub":
        timm.models.save_for_hf(theirs, tmp_path / "saved", model_args=settings, safe_serialization=True)
    else:
        (tmp_path / "saved").mkdir()
        torch.save(theirs.state_dict(), tmp_path / "saved/pytorch_model.bin")
        hints = Hints(window_size=4 if version == 2 else None, image_size=(64, 64))
    import_weights(tmp_path / "saved", tmp_path / "in", layout="timm", hints=hints)
    module = simmim_scale.load(tmp_path / "in")
    with torch.no_grad():
        ours, expected = module({"image": picture()})["logits"], theirs(picture())
        maps, others = (
            module.backbone.features(picture(), final_norm=False),
            theirs.forward_intermediates(picture(), intermediates_only=True),
        )
    assert (ours - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    for own, other in zip(maps, others, strict=True):
        assert (own - other).abs().max() <= 1e-5 * max(1, other.abs().max())


# -------------------------------------------------------------------------------------------------------------- refused


def test_tensors_left_over_or_missing_are_listed(tmp_path):
    export_weights(source("v1", "classification"), tmp_path / "out", to="huggingface")
    state = load_file(tmp_path / "out/model.safetensors")
    state["swin.encoder.layers.0.blocks.0.gamma"] = torch.zeros(3)
    save_file(state, tmp_path / "out/model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)1 left over.*swin.encoder.layers.0.blocks.0.gamma"):
        import_weights(tmp_path / "out", tmp_path / "in", layout="huggingface")
    del state["swin.encoder.layers.0.blocks.0.gamma"], state["swin.encoder.layers.1.blocks.0.attention.self.key.weight"]
    save_file(state, tmp_path / "out/model.safetensors")
    with pytest.raises(ValueError, match=r"attention.self.key.weight"):
        import_weights(tmp_path / "out", tmp_path / "in", layout="huggingface")
    assert not (tmp_path / "in").exists()


def test_another_layout_absolute_positions_and_other_models_are_refused(tmp_path):
    export_weights(source("v1", "classification"), tmp_path / "out", to="microsoft")
    for layout, message in (("timm", r"--layout microsoft"), ("huggingface", r"no Swin or Swinv2 of transformers")):
        with pytest.raises(ValueError, match=message):
            import_weights(tmp_path / "out/checkpoint.pth", tmp_path / "in", layout=layout)
    absolute = transformers.SwinForImageClassification(transformers.SwinConfig(**HF, use_absolute_embeddings=True))
    absolute.save_pretrained(tmp_path / "absolute")
    with pytest.raises(ValueError, match="absolute position embedding"):
        import_weights(tmp_path / "absolute", tmp_path / "in", layout="huggingface")
    (tmp_path / "absolute/config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="model_type 'vit'"):
        import_weights(tmp_path / "absolute", tmp_path / "in", layout="huggingface")
    with pytest.raises(ValueError, match=r"found none"):
        import_weights(tmp_path, tmp_path / "in", layout="timm")


def test_hints_that_contradict_config_json_are_refused(tmp_path):
    export_weights(source("v2", "pretrain"), tmp_path / "out", to="huggingface")
    with pytest.raises(ValueError, match=r"image_size: \(96, 96\) was asked for"):
        import_weights(tmp_path / "out", tmp_path / "in", layout="huggingface", hints=Hints(image_size=(96, 96)))


def test_a_detector_trains_on_the_exported_backbone(tmp_path):
    from torchvision.models.detection import MaskRCNN

    from simmim_scale.models.detection_backbone import load_detection_backbone

    save_weights(tmp_path / "other", {"backbone.x": torch.zeros(1)}, source("v1", "pretrain").config.model_dump(mode="json"))
    with pytest.raises(ValueError, match="does not fit this model"):
        load_detection_backbone(tmp_path / "other")
    export_weights(source("v2, four stages", "pretrain"), tmp_path / "out", to="torchvision-detection-backbone")
    backbone = load_detection_backbone(tmp_path / "out", out_channels=16)
    maps = backbone(torch.randn(1, 3, 80, 112))
    assert [tuple(maps[key].shape[2:]) for key in ("0", "1", "2", "3", "pool")] == [(20, 28), (10, 14), (5, 7), (3, 4), (2, 2)]
    detector = MaskRCNN(backbone, num_classes=3, min_size=64, max_size=96).train()
    boxes = torch.tensor([[4.0, 4.0, 40.0, 50.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": torch.ones(1, 64, 64, dtype=torch.uint8)}
    losses = detector([torch.rand(3, 64, 64)], [target])
    sum(losses.values()).backward()
    assert backbone.body.backbone.patch_embed.proj.weight.grad.abs().sum() > 0
