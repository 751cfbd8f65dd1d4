"""Names of microsoft/SimMIM and microsoft/Swin-Transformer: Swin V1 and V2, pre-training and classification.

    encoder.<backbone>  encoder.mask_token  decoder.0.{weight,bias}       pre-training
    <backbone>  head.{weight,bias}                                        classification

Buffers (index and coordinate tables, shift masks) only tell windows and sizes; every other tensor becomes one of ours.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from simmim_scale.models.layouts.microsoft_shapes import detect_model
from simmim_scale.models.layouts.records import CheckpointFile, Hints, Imported

BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")

# Renames inside the backbone, as (pattern, replacement). `rpe_mlp` and `enorm` are older names of the position-bias MLP and of
# the norm on the main branch of SwinV2-H and G.
BACKBONE_RENAMES = (
    (re.compile(r"\.attn\.rpe_mlp\."), ".attn.cpb_mlp."),
    (re.compile(r"\.attn\.([qv])_bias$"), r".attn.qkv.\1_bias"),
    (re.compile(r"\.enorm\.(weight|bias)$"), r".norm3.\1"),
)

PUBLISHED_V2_NORM_TARGET = 47  # R: the one released SwinV2 pre-training normalises its target by this window


def convert(file: CheckpointFile, hints: Hints) -> Imported:
    """Rename every tensor and find out the configuration.

    Raises:
        ValueError: neither a pre-training nor a classification checkpoint of a Swin, or facts that the file does not tell and
            that no hint gives.
    """
    state = _unwrapped(file.state)
    _refuse_absolute_positions(state, file)
    task = _task(state, file)
    buffers = {name: value for name, value in state.items() if name.endswith(BUFFERS)}
    published = {name: value for name, value in state.items() if name not in buffers}
    renamed = {_rename(name, task): (name, _reshape(name, value)) for name, value in published.items()}
    backbone = {name.removeprefix("encoder."): value for name, value in published.items()}
    detected = detect_model(
        {published_backbone_name(name): value for name, value in backbone.items()},
        {name.removeprefix("encoder."): value for name, value in buffers.items()},
        file,
        hints,
    )
    sections, notes = {"model": detected.section}, list(detected.notes)
    if task == "pretrain":
        sections["objective"], note = _objective(detected.section["name"], file, hints)
        sections["mask"] = _mask(file)
        notes.append(note)
    return Imported(
        task=task,
        state={name: value for name, (_, value) in renamed.items()},
        origins={name: origin for name, (origin, _) in renamed.items()},
        sections=sections,
        notes=notes,
    )


def to_microsoft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by published names: a classifier's; a pre-training's with encoder, mask token and decoder; or a backbone's."""
    pretraining = "mask_token.token" in state
    prefix = "encoder." if pretraining else ""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "mask_token.token":
            renamed["encoder.mask_token"] = value[None, None]
        elif name.startswith("head.proj."):
            renamed[f"decoder.0.{name.removeprefix('head.proj.')}"] = value[..., None, None] if value.ndim == 2 else value
        elif name.startswith("head."):
            renamed[name] = value
        else:
            inner = re.sub(r"\.attn\.qkv\.([qv]_bias)$", r".attn.\1", name.removeprefix("backbone."))
            renamed[prefix + inner] = value
    return renamed


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the `module.` that data-parallel training puts before every name."""
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _refuse_absolute_positions(state: Mapping[str, Tensor], file: CheckpointFile) -> None:
    names = [name for name in state if name.endswith("absolute_pos_embed")]
    if names:
        raise ValueError(
            f"checkpoint: {file.path} has an absolute position embedding ({names[0]}). No model here has one, and none that was"
            " published with SimMIM, so it cannot be imported; nothing was written."
        )


def _task(state: dict[str, Tensor], file: CheckpointFile) -> str:
    if any(name.startswith("encoder.") for name in state):
        return "pretrain"
    if "head.weight" in state:
        return "classification"
    shown = ", ".join(list(state)[:5])
    raise ValueError(
        f"checkpoint: {file.path} is neither a pre-training (encoder.*) nor a classification (head.weight) checkpoint of"
        f" microsoft/SimMIM or microsoft/Swin-Transformer; it begins with {shown}. Give another file, or another layout."
    )


def _rename(name: str, task: str) -> str:
    if task == "classification":
        return name if name.startswith("head.") else f"backbone.{published_backbone_name(name)}"
    if name == "encoder.mask_token":
        return "mask_token.token"
    if name.startswith("decoder.0."):
        return f"head.proj.{name.removeprefix('decoder.0.')}"
    if name.startswith("encoder."):
        return f"backbone.{published_backbone_name(name.removeprefix('encoder.'))}"
    return name  # nothing of ours has such a name: it is reported as left over


def published_backbone_name(name: str) -> str:
    """Our name, without prefix, of a backbone's published tensor."""
    for pattern, replacement in BACKBONE_RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _reshape(name: str, value: Tensor) -> Tensor:
    """Tensors in fp32; a 1x1 convolution as a matrix, the mask token as a vector."""
    value = value.float() if value.is_floating_point() else value
    if name == "decoder.0.weight" and value.ndim == 4 and value.shape[2:] == (1, 1):
        return value.flatten(1)
    return value.flatten() if name == "encoder.mask_token" else value


def _objective(model: str, file: CheckpointFile, hints: Hints) -> tuple[dict[str, int | None], str]:
    """The normalising window of the target: said by the caller, else stored in the file, else as in the released
    configurations."""
    if hints.norm_target_window is not None:
        window, origin = hints.norm_target_window or None, "as asked for"
    elif (enabled := file.setting("MODEL.SIMMIM.NORM_TARGET.ENABLE")) is not None:
        window = file.setting("MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE") if enabled else None
        origin = "stored in the file"
    else:
        window = PUBLISHED_V2_NORM_TARGET if model == "swin_v2" else None
        origin = "as in the released configuration; tensors do not tell"
    return {
        "norm_target_window": window
    }, f"target: {'plain pixels' if window is None else f'normalised, window {window}'} ({origin})"


def _mask(file: CheckpointFile) -> dict[str, int | float]:
    stored = {"cell": file.setting("DATA.MASK_PATCH_SIZE"), "ratio": file.setting("DATA.MASK_RATIO")}
    return {key: value for key, value in stored.items() if value is not None}
