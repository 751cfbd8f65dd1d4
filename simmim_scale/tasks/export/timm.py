"""Weights and config.json that `timm.create_model("local-dir:DIR", pretrained=True)` loads, and the Hub too."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from simmim_scale.config.schema import Config, SwinBaseConfig, SwinV2Config
from simmim_scale.models.layouts.timm import to_timm
from simmim_scale.models.resizing import stage_windows
from simmim_scale.models.windows import stage_sides
from simmim_scale.tasks.export.records import Agreement, Source, Target, Written, compare

# Entry points of timm whose arguments the stored ones replace, all of them.
ENTRY = {"swin": "swin_base_patch4_window7_224", "swin_v2": "swinv2_base_window12_192"}


def write(source: Source, out: Path) -> Written:
    """model.safetensors and config.json. Raises ValueError for what timm's models do not have."""
    model = source.swin("timm")
    check_timm_has(model)
    classifier = source.config.task == "classification"
    state = dict(source.state) if classifier else source.backbone_state
    save_file({to_timm(name): value.contiguous() for name, value in state.items()}, out / "model.safetensors", {"format": "pt"})
    num_classes = state["head.weight"].shape[0] if classifier else 0
    (out / "config.json").write_text(json.dumps(_config(source, model, num_classes), indent=2) + "\n", encoding="utf-8")
    notes = [f"timm takes images of {model.image_size[0]}x{model.image_size[1]} alone (strict_img_size); its maps are NHWC"]
    if not classifier:
        notes.append("without a head (num_classes=0); timm has no place for the mask token and the decoder")
    return Written(usage=USAGE, notes=notes)


def check_timm_has(model: SwinBaseConfig) -> None:
    """Raise ValueError for a model that timm cannot compute: norms on the main branch, sides that a window does not divide."""
    if getattr(model, "extra_norm_period", 0):
        raise ValueError("--to timm: its SwinV2 has no norm on the main branch (model.extra_norm_period). Try --to onnx.")
    sides = stage_sides(model.image_size, model.patch_size, len(model.depths))
    for stage, (side, window) in enumerate(zip(sides, stage_windows(model), strict=True)):
        if any(tokens % size for tokens, size in zip(side, window, strict=True)):
            raise ValueError(
                f"--to timm: it pads after the shift, the published models before it, and stage {stage} needs padding: {side[0]}x"
                f"{side[1]} tokens in windows of {window[0]}x{window[1]}. Fine-tune at a size that needs none, or try --to onnx."
            )


def model_arguments(model: SwinBaseConfig, num_classes: int) -> dict[str, Any]:
    """Keyword arguments of timm's constructor."""
    arguments: dict[str, Any] = {
        "img_size": list(model.image_size),
        "patch_size": model.patch_size,
        "in_chans": model.in_chans,
        "embed_dim": model.embed_dim,
        "depths": list(model.depths),
        "num_heads": list(model.num_heads),
        "window_size": model.window_size,
        "mlp_ratio": model.mlp_ratio,
        "qkv_bias": model.qkv_bias,
        "num_classes": num_classes,
    }
    if isinstance(model, SwinV2Config):
        arguments["pretrained_window_sizes"] = list(model.pretrained_window_sizes or (0,) * len(model.depths))
    return arguments


def _config(source: Source, model: SwinBaseConfig, num_classes: int) -> dict[str, Any]:
    data = source.config.data
    stored: dict[str, Any] = {
        "input_size": [model.in_chans, *model.image_size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": test_crop(source.config),
        "mean": list(data.mean),
        "std": list(data.std),
        "num_classes": num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
    }
    if source.pretrained.class_names:
        stored["label_names"] = list(source.pretrained.class_names)
    width = model.embed_dim * 2 ** (len(model.depths) - 1)
    return {
        "architecture": ENTRY[model.name],
        "num_classes": num_classes,
        "num_features": width,
        "model_args": model_arguments(model, num_classes),
        "pretrained_cfg": stored,
    }


def test_crop(config: Config) -> float:
    """Side of the tested centre over the shorter side of the image."""
    return getattr(getattr(config, "classification", None), "test_crop", 0.875)


def verify(source: Source, out: Path) -> list[Agreement]:
    import timm

    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    return compare_with(source, theirs)


def compare_with(source: Source, theirs: nn.Module) -> list[Agreement]:
    """Final tokens, the map of every stage, and a classifier's logits."""
    image, backbone = source.picture(), source.module.backbone
    tokens, maps = theirs.forward_features(image), theirs.forward_intermediates(image, intermediates_only=True)
    agreements = [compare("final tokens", backbone(image), tokens)]
    for stage, (ours, other) in enumerate(zip(backbone.features(image, final_norm=False), maps, strict=True)):
        agreements.append(compare(f"map of stage {stage}", ours, other))
    if source.config.task == "classification":
        agreements.append(compare("logits", source.module({"image": image})["logits"], theirs(image)))
    return agreements


USAGE = """```python
import timm

model = timm.create_model("local-dir:DIR", pretrained=True).eval()  # images as timm.data.resolve_model_data_config(model) says
```"""


def target() -> Target:
    """The target, for the table."""
    return Target(libraries=("timm",), install="pip install timm", write=write, verify=verify)
