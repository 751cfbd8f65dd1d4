"""Names of timm's Swin V1 and V2 (`SwinTransformer`, `SwinTransformerV2`), both ways. Weights and, beside them, config.json.

    <backbone>  head.fc.{weight,bias}        classification; without a head: a backbone alone

timm keeps the merging at the start of the stage after it; the rest has the published names. Buffers are not stored: sizes come
from config.json (`save_for_hf`, `save_model_for_hf`, files of the Hub) or from hints.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from simmim_scale.models.layouts.checkpoint_file import read_settings
from simmim_scale.models.layouts.microsoft import published_backbone_name
from simmim_scale.models.layouts.microsoft_shapes import detect_model
from simmim_scale.models.layouts.records import CheckpointFile, Hints, Imported, merge_hints

BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask", "k_bias")
MERGING = re.compile(r"^layers\.(\d+)\.downsample\.")


def from_timm(name: str) -> str:
    """Our name of one of timm's tensors."""
    if name.startswith("head.fc."):
        return f"head.{name.removeprefix('head.fc.')}"
    name = MERGING.sub(lambda found: f"layers.{int(found[1]) - 1}.downsample.", name)
    return f"backbone.{published_backbone_name(name)}"


def to_timm(name: str) -> str:
    """timm's name of one of our tensors: a backbone's, or a classifier's head."""
    if name.startswith("head."):
        return f"head.fc.{name.removeprefix('head.')}"
    name = name.removeprefix("backbone.").replace(".attn.qkv.q_bias", ".attn.q_bias").replace(".attn.qkv.v_bias", ".attn.v_bias")
    return MERGING.sub(lambda found: f"layers.{int(found[1]) + 1}.downsample.", name)


def convert(file: CheckpointFile, hints: Hints) -> Imported:
    """Rename every tensor and find out the configuration.

    Raises:
        ValueError: no Swin of timm's, or facts that neither the file, nor config.json beside it, nor a hint gives.
    """
    if "layers.0.downsample.reduction.weight" in file.state:
        raise ValueError(
            f"checkpoint: {file.path} has the merging at the end of its stages, which timm's models do not."
            " Import it with --layout microsoft."
        )
    settings = read_settings(file)
    buffers = {name: value for name, value in file.state.items() if name.endswith(BUFFERS)}
    kept = {name: value for name, value in file.state.items() if name not in buffers}
    origins = {from_timm(name): name for name in kept}
    state = {ours: kept[theirs].float() if kept[theirs].is_floating_point() else kept[theirs] for ours, theirs in origins.items()}
    task = "classification" if "head.weight" in state else "backbone"
    detected = detect_model(
        {name.removeprefix("backbone."): value for name, value in state.items()},
        {name: value for name, value in buffers.items() if not name.endswith("k_bias")},
        file,
        merge_hints(hints, _told(settings, state)),
    )
    model, data = detected.section, _data(settings)
    return Imported(
        task=task,
        state=state,
        origins=origins,
        sections={"model": model, **({"data": data} if data else {})},
        notes=detected.notes,
        class_names=_class_names(settings),
    )


def _told(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> Hints:
    """What config.json says. V1's windows are told by its tables."""
    arguments = settings.get("model_args", {})
    version_2 = any(name.endswith(".attn.logit_scale") for name in state)
    size = arguments.get("img_size") or settings.get("pretrained_cfg", {}).get("input_size", [None])[-1]
    pretrained = arguments.get("pretrained_window_sizes")
    window = arguments.get("window_size") or _window_in_name(settings.get("architecture", ""))
    return Hints(
        window_size=window if version_2 and isinstance(window, int) else None,
        pretrained_window_sizes=tuple(pretrained) if pretrained and version_2 else None,
        image_size=None if not size else (size, size) if isinstance(size, int) else (size[0], size[1]),
    )


def _window_in_name(architecture: str) -> int | None:
    """timm's names hold it: swinv2_base_window12_192."""
    found = re.search(r"window(\d+)(?:to(\d+))?", architecture)
    return int(found[2] or found[1]) if found else None


def _data(settings: Mapping[str, Any]) -> dict[str, list[float]]:
    stored = settings.get("pretrained_cfg", {})
    return {key: list(stored[key]) for key in ("mean", "std") if stored.get(key)}


def _class_names(settings: Mapping[str, Any]) -> tuple[str, ...]:
    names = settings.get("label_names") or settings.get("pretrained_cfg", {}).get("label_names") or ()
    return tuple(names) if isinstance(names, list | tuple) else ()
