"""A directory that transformers' `from_pretrained` loads: Swin or Swinv2 to classify, for masked image modeling, or bare."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

from simmim_scale.config.schema import SwinBaseConfig, SwinV2Config
from simmim_scale.models.layouts.huggingface import to_huggingface
from simmim_scale.models.resizing import stage_windows
from simmim_scale.tasks.export.records import Agreement, Source, Target, Written, compare

BICUBIC = 3  # PIL's number, as transformers stores it


def write(source: Source, out: Path) -> Written:
    """model.safetensors, config.json and preprocessor_config.json. Raises ValueError for what their models do not have."""
    model = source.swin("huggingface")
    _check_huggingface_has(source, model)
    kind = _class_name(source, model)
    state = source.known_state()
    tensors = to_huggingface(state, version_2=model.name == "swin_v2")
    if kind.endswith("Model"):  # files of the bare model have no prefix
        tensors = {name.partition(".")[2]: value for name, value in tensors.items()}
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    _write_json(out / "config.json", _config(source, model, kind))
    _write_json(out / "preprocessor_config.json", _processor(source))
    notes = [f"loads as {kind}"]
    if source.config.task == "pretrain":
        notes += _pretraining_notes(source)
    return Written(usage=USAGE.replace("KIND", kind), notes=notes)


def _pretraining_notes(source: Source) -> list[str]:
    objective = source.config.objective
    if not source.has_published_decoder:
        return [f"the {objective.head} head onto {objective.target} has no place there and is left out"]
    if objective.norm_target_window:
        return ["its prediction is of normalised pixels; the loss that transformers computes compares it with plain ones"]
    return []


def _class_name(source: Source, model: SwinBaseConfig) -> str:
    prefix = "Swin" if model.name == "swin" else "Swinv2"
    if source.config.task == "classification":
        return f"{prefix}ForImageClassification"
    return f"{prefix}ForMaskedImageModeling" if source.has_published_decoder else f"{prefix}Model"


def _check_huggingface_has(source: Source, model: SwinBaseConfig) -> None:
    if getattr(model, "extra_norm_period", 0):
        raise ValueError("--to huggingface: Swinv2 has no norm on the main branch (model.extra_norm_period). Try --to onnx.")
    windows = stage_windows(model)
    if model.name == "swin" and any(window != (model.window_size,) * 2 for window in windows):
        raise ValueError(
            f"--to huggingface: its Swin has one window in all stages, this model has {_listed(windows)}: at"
            f" {model.image_size[0]}x{model.image_size[1]} pixels a stage is smaller than the window {model.window_size}."
            " Fine-tune at a larger image or a smaller window, or use --to timm."
        )
    references = getattr(model, "pretrained_window_sizes", ())
    if any(height != width for height, width in windows) or any(not isinstance(window, int) for window in references):
        raise ValueError(f"--to huggingface: its windows are squares, this model has {_listed(windows)}. Try --to timm.")
    height, width = model.image_size
    if source.has_published_decoder and height != width:
        raise ValueError(
            f"--to huggingface: its masked image modeling takes squares, got {height}x{width}. Try --to timm for the backbone."
        )


def _config(source: Source, model: SwinBaseConfig, kind: str) -> dict[str, Any]:
    height, width = model.image_size
    config: dict[str, Any] = {
        "architectures": [kind],
        "model_type": "swin" if model.name == "swin" else "swinv2",
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "num_channels": model.in_chans,
        "embed_dim": model.embed_dim,
        "depths": list(model.depths),
        "num_heads": list(model.num_heads),
        "window_size": model.window_size,
        "mlp_ratio": model.mlp_ratio,
        "qkv_bias": model.qkv_bias,
        "drop_path_rate": model.drop_path,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "use_absolute_embeddings": False,
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "encoder_stride": model.stride,
        "hidden_size": model.embed_dim * 2 ** (len(model.depths) - 1),
        "num_layers": len(model.depths),
        "dtype": "float32",
    }
    if isinstance(model, SwinV2Config):
        config["pretrained_window_sizes"] = list(model.pretrained_window_sizes or (0,) * len(model.depths))
    if source.config.task == "classification":
        classes = source.state["head.weight"].shape[0]
        stored = source.pretrained.class_names
        names = [stored[number] if number < len(stored) else f"LABEL_{number}" for number in range(classes)]
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
    return config


def _processor(source: Source) -> dict[str, Any]:
    height, width = source.config.model.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(source.config.data.mean),
        "image_std": list(source.config.data.std),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _listed(windows: list[tuple[int, int]]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in windows)


def verify(source: Source, out: Path) -> list[Agreement]:
    import transformers

    kind = _class_name(source, source.swin("huggingface"))
    with _without_bars(transformers.utils.logging):
        theirs, info = getattr(transformers, kind).from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    wrong = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]
    if wrong:
        raise ValueError(f"--to huggingface: {kind} did not take all tensors: {', '.join(map(str, wrong[:5]))}.")
    image, module, theirs = source.picture(), source.module, theirs.eval()
    body = theirs if kind.endswith("Model") else getattr(theirs, theirs.base_model_prefix)
    agreements = [compare("final tokens", module.backbone(image).flatten(1, 2), body(image).last_hidden_state)]
    if source.config.task == "classification":
        agreements.append(compare("logits", module({"image": image})["logits"], theirs(image).logits))
    elif source.has_published_decoder:
        mask = source.mask()
        prediction = theirs(image, bool_masked_pos=mask.flatten(1)).reconstruction
        agreements.append(compare("prediction under a mask", module({"image": image, "mask": mask})["prediction"], prediction))
    return agreements


@contextmanager
def _without_bars(logging: ModuleType) -> Iterator[None]:
    """Loading takes a moment; its progress bar would stand in the middle of what the command says."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


USAGE = """```python
from transformers import AutoImageProcessor, KIND

model = KIND.from_pretrained("DIR").eval()
images = AutoImageProcessor.from_pretrained("DIR")  # resizes the whole picture; crop its centre first for test accuracy
```"""


def target() -> Target:
    """The target, for the table."""
    return Target(libraries=("transformers",), install="pip install 'simmim-scale[huggingface]'", write=write, verify=verify)
