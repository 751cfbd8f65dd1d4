"""Names of Hugging Face's Swin and Swinv2 (transformers), both ways: ForImageClassification, ForMaskedImageModeling, bare model.

    {swin|swinv2}.embeddings.*  .encoder.*  .layernorm.*    classifier.*  or  decoder.0.*    mask token: embeddings.mask_token

q, k and v are three maps there and one here. Names that transformers 5 uses inside its Swin are understood too, although its
files keep the older ones. Sizes come from config.json beside the file.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from simmim_scale.models.layouts.checkpoint_file import read_settings
from simmim_scale.models.layouts.microsoft_shapes import detect_model
from simmim_scale.models.layouts.records import CheckpointFile, Hints, Imported, merge_hints

PREFIXES = ("swinv2.", "swin.")
BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
EMBEDDING = {"embeddings.patch_embeddings.projection.": "patch_embed.proj.", "embeddings.norm.": "patch_embed.norm."}
# Inside a block, theirs -> ours; q, k, v apart. The order matters: attention.output.dense before output.dense.
BLOCK = (
    ("attention.output.dense.", "attn.proj."),
    ("attention.self.relative_position_bias_table", "attn.relative_position_bias_table"),
    ("attention.self.logit_scale", "attn.logit_scale"),
    ("attention.self.continuous_position_bias_mlp.", "attn.cpb_mlp."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
)
NEWER = (
    ("attention.o_proj.", "attention.output.dense."),
    ("attention.relative_position_bias.relative_position_bias_table", "attention.self.relative_position_bias_table"),
    ("attention.q_proj.", "attention.self.query."),
    ("attention.k_proj.", "attention.self.key."),
    ("attention.v_proj.", "attention.self.value."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)
QKV = re.compile(r"^(.*\.)attention\.self\.(query|key|value)\.(weight|bias)$")
PARTS = ("query", "key", "value")


# ------------------------------------------------------------------------------------------------------------------- in


def convert(file: CheckpointFile, hints: Hints) -> Imported:
    """Rename every tensor, join q, k and v, and find out the configuration.

    Raises:
        ValueError: no Swin of transformers, an absolute position embedding, or facts that neither config.json nor a hint gives.
    """
    settings = read_settings(file)
    _check_settings(settings, file)
    originals = {_older(name): name for name in file.state if not name.endswith(BUFFERS)}
    kept = {name: file.state[original] for name, original in originals.items()}
    _check_names(kept, file)
    plain, parts = {}, {}
    for name, value in kept.items():
        value = value.float() if value.is_floating_point() else value
        found = QKV.match(name)
        (parts if found else plain)[name] = value
    origins = {_from_huggingface(name): originals[name] for name in plain}
    state = {_from_huggingface(name): _reshaped(name, value) for name, value in plain.items()}
    version_2 = any(name.endswith(".attn.logit_scale") for name in state)
    joined, joined_origins = _join(parts, version_2=version_2, source=str(file.path))
    state, origins = state | joined, origins | joined_origins
    task = "classification" if "head.weight" in state else "pretrain" if "head.proj.weight" in state else "backbone"
    if task == "backbone" and "mask_token.token" in state:
        del state["mask_token.token"]  # the bare model of a pre-training: a token without a decoder serves nothing
    backbone = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    detected = detect_model(backbone, {}, file, merge_hints(hints, _told(settings, version_2)))
    sections: dict[str, dict[str, Any]] = {"model": detected.section}
    notes = list(detected.notes)
    if task == "pretrain":
        window = (hints.norm_target_window or None) if hints.norm_target_window is not None else None
        sections["objective"] = {"norm_target_window": window}
        notes.append(f"target: {'plain pixels, as transformers computes its loss' if window is None else f'window {window}'}")
    pictures = read_settings(file, "preprocessor_config.json")
    if pictures.get("image_mean") and pictures.get("image_std"):
        sections["data"] = {"mean": list(pictures["image_mean"]), "std": list(pictures["image_std"])}
    return Imported(task=task, state=state, origins=origins, sections=sections, notes=notes, class_names=_class_names(settings))


def _check_settings(settings: Mapping[str, Any], file: CheckpointFile) -> None:
    kind = settings.get("model_type", "swin")
    if kind not in ("swin", "swinv2"):
        raise ValueError(f"checkpoint: config.json beside {file.path} says model_type {kind!r}, expected 'swin' or 'swinv2'.")
    if settings.get("use_absolute_embeddings"):
        raise ValueError(
            f"checkpoint: {file.path} has an absolute position embedding. No model here has one, and none that was published with"
            " SimMIM, so it cannot be imported."
        )


def _check_names(state: Mapping[str, Tensor], file: CheckpointFile) -> None:
    if not any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in state):
        shown = ", ".join(list(state)[:5])
        raise ValueError(
            f"checkpoint: {file.path} is no Swin or Swinv2 of transformers (no embeddings.patch_embeddings); it begins with"
            f" {shown}. Give another file, or another layout."
        )


def _older(name: str) -> str:
    """Without `swin.` or `swinv2.` before it, and by the names that files keep."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    for newer, older in NEWER:
        name = name.replace(newer, older)
    return name


def _from_huggingface(name: str) -> str:
    if name.startswith("classifier."):
        return f"head.{name.removeprefix('classifier.')}"
    if name.startswith("decoder.0."):
        return f"head.proj.{name.removeprefix('decoder.0.')}"
    if name == "embeddings.mask_token":
        return "mask_token.token"
    for theirs, ours in EMBEDDING.items():
        name = name.replace(theirs, ours)
    if name.startswith("layernorm."):
        name = f"norm.{name.removeprefix('layernorm.')}"
    name = name.removeprefix("encoder.")
    for theirs, ours in BLOCK:
        name = name.replace(theirs, ours)
    return f"backbone.{name}"


def _reshaped(name: str, value: Tensor) -> Tensor:
    if name == "decoder.0.weight":
        return value.flatten(1)
    return value.flatten() if name == "embeddings.mask_token" else value


def _join(parts: Mapping[str, Tensor], *, version_2: bool, source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """q, k, v of each block as one matrix, V1's biases as one vector and V2's as q's and v's."""
    state, origins = {}, {}
    for prefix in dict.fromkeys(QKV.match(name)[1] for name in parts):
        names = {(part, kind): f"{prefix}attention.self.{part}.{kind}" for part in PARTS for kind in ("weight", "bias")}
        missing = [names[part, "weight"] for part in PARTS if names[part, "weight"] not in parts]
        if missing:
            raise ValueError(f"checkpoint: {source} lacks {', '.join(missing)}. Download it again.")
        ours = f"backbone.{prefix.removeprefix('encoder.')}attn.qkv."
        biases = {part: parts[names[part, "bias"]] for part in PARTS if names[part, "bias"] in parts}
        state[f"{ours}weight"] = torch.cat([parts[names[part, "weight"]] for part in PARTS])
        if version_2:
            state |= {f"{ours}{part[0]}_bias": value for part, value in biases.items()}  # k has none; one would be left over
        elif len(biases) == len(PARTS):
            state[f"{ours}bias"] = torch.cat([biases[part] for part in PARTS])
        origins |= {name: f"{prefix}attention.self.*" for name in state if name.startswith(ours)}
    return state, origins


def _told(settings: Mapping[str, Any], version_2: bool) -> Hints:
    size, pretrained = settings.get("image_size"), settings.get("pretrained_window_sizes")
    return Hints(
        window_size=settings.get("window_size") if version_2 else None,
        pretrained_window_sizes=tuple(pretrained) if version_2 and pretrained and any(pretrained) else None,
        image_size=None if not size else (size, size) if isinstance(size, int) else (size[0], size[1]),
    )


def _class_names(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels, unless they are those that transformers makes up."""
    labels = settings.get("id2label") or {}
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    return () if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


# ------------------------------------------------------------------------------------------------------------------ out


def to_huggingface(state: Mapping[str, Tensor], *, version_2: bool) -> dict[str, Tensor]:
    """Our tensors by the names of transformers' files: a classifier's, a pre-training's, or a backbone's alone."""
    prefix = "swinv2." if version_2 else "swin."
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("head.proj."):
            renamed[f"decoder.0.{name.removeprefix('head.proj.')}"] = value[..., None, None] if value.ndim == 2 else value
        elif name.startswith("head."):
            renamed[f"classifier.{name.removeprefix('head.')}"] = value
        elif name == "mask_token.token":
            renamed[f"{prefix}embeddings.mask_token"] = value[None, None]
        else:
            for theirs, part in _split(name.removeprefix("backbone."), value).items():
                renamed[prefix + theirs] = part
    return renamed


def _split(name: str, value: Tensor) -> dict[str, Tensor]:
    """A backbone's tensor by their name without prefix; q, k and v apart."""
    before, separator, kind = name.partition(".attn.qkv.")
    if separator:
        own = f"encoder.{before}.attention.self."
        if kind in ("q_bias", "v_bias"):
            return {f"{own}{'query' if kind == 'q_bias' else 'value'}.bias": value}
        return {f"{own}{part}.{kind}": chunk for part, chunk in zip(PARTS, value.chunk(3), strict=True)}
    for theirs, ours in EMBEDDING.items():
        if name.startswith(ours):
            return {theirs + name.removeprefix(ours): value}
    if name.startswith("norm."):
        return {f"layernorm.{name.removeprefix('norm.')}": value}
    for theirs, ours in BLOCK:
        name = name.replace(f".{ours}", f".{theirs}") if ".blocks." in name else name
    return {f"encoder.{name}": value}
