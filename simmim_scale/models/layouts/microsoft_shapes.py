"""The model section of the configuration, read off the shapes of a published Swin checkpoint.

Windows come from V1's bias tables and V2's buffers, the image size from shift masks or from stages smaller than the window.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from simmim_scale.models.layouts.records import CheckpointFile, Hints
from simmim_scale.models.windows import stage_sides

BLOCK = re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\.(.+)$")
SETTINGS_SECTION = {"swin": "MODEL.SWIN", "swin_v2": "MODEL.SWINV2"}


@dataclass(frozen=True)
class DetectedModel:
    """A model section as plain values, and one line per fact that tensors do not tell by themselves."""

    section: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class Windows:
    """Window of each stage and of its pre-training (0: the same), in tokens."""

    stages: tuple[int, ...]
    pretrained: tuple[int, ...]
    origin: str


def detect_model(
    parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], file: CheckpointFile, hints: Hints
) -> DetectedModel:
    """The model section of a checkpoint whose backbone parameters carry our names, without prefix.

    Raises:
        ValueError: no Swin, inconsistent shapes, a hint that contradicts the tensors, or a window that nothing tells.
    """
    name = _version(parameters, file)
    patch_width, in_chans, patch_size = _embedding(parameters, file)
    depths = _depths(parameters)
    windows = _windows(name, parameters, buffers, depths, file, hints)
    image_size, size_origin = _image_size(windows, buffers, patch_size, file, hints)
    _check_windows(windows, image_size, patch_size)
    fc1 = parameters.get("layers.0.blocks.0.mlp.fc1.weight")
    section = {
        "name": name,
        "image_size": list(image_size),
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": patch_width,
        "depths": list(depths),
        "num_heads": _heads(name, parameters, depths),
        "window_size": max(windows.stages),
        "mlp_ratio": 4.0 if fc1 is None else fc1.shape[0] / patch_width,
        "qkv_bias": any(key.endswith((".qkv.bias", ".qkv.q_bias")) for key in parameters),
        "drop_path": file.setting("MODEL.DROP_PATH_RATE") or 0.0,
    }
    if name == "swin_v2":
        section["pretrained_window_sizes"] = list(windows.pretrained) if any(windows.pretrained) else []
        section["extra_norm_period"] = _extra_norm_period(parameters, depths)
    notes = [f"windows: {', '.join(map(str, windows.stages))} ({windows.origin})", f"image size: {image_size} ({size_origin})"]
    return DetectedModel(section=section, notes=notes)


def _version(parameters: Mapping[str, Tensor], file: CheckpointFile) -> str:
    if any(name.endswith(".attn.logit_scale") for name in parameters):
        return "swin_v2"
    if any(name.endswith(".attn.relative_position_bias_table") for name in parameters):
        return "swin"
    raise ValueError(
        f"checkpoint: {file.path} is no Swin: no attn.logit_scale (V2) and no attn.relative_position_bias_table (V1) among its"
        f" {len(parameters)} tensors. Give a Swin checkpoint."
    )


def _embedding(parameters: Mapping[str, Tensor], file: CheckpointFile) -> tuple[int, int, int]:
    """Width, channels and patch size."""
    weight = parameters.get("patch_embed.proj.weight")
    if weight is None or weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        got = "none" if weight is None else tuple(weight.shape)
        raise ValueError(
            f"checkpoint: patch_embed.proj.weight in {file.path}: expected (width, channels, patch, patch), got {got}."
        )
    return weight.shape[0], weight.shape[1], weight.shape[2]


def _depths(parameters: Mapping[str, Tensor]) -> tuple[int, ...]:
    blocks = {(int(match[1]), int(match[2])) for match in map(BLOCK.match, parameters) if match}
    if not blocks:
        raise ValueError("checkpoint: no names like layers.0.blocks.0.attn.*, which published Swins have. Give another layout.")
    depths = tuple(sum(stage == wanted for stage, _ in blocks) for wanted in range(max(stage for stage, _ in blocks) + 1))
    missing = {(stage, block) for stage, depth in enumerate(depths) for block in range(depth)} - blocks
    if missing or 0 in depths:
        gaps = [f"layers.{stage}.blocks.{block}" for stage, block in sorted(missing)] or ["a whole stage"]
        raise ValueError(f"checkpoint: incomplete: {', '.join(gaps)} is missing. Download it again.")
    return depths


def _of_stage(tensors: Mapping[str, Tensor], stage: int, suffix: str) -> Iterator[Tensor]:
    for name, tensor in tensors.items():
        match = BLOCK.match(name)
        if match and int(match[1]) == stage and match[3] == suffix:
            yield tensor


def _single(values: Iterable[int], what: str) -> int | None:
    """The one value that all blocks of a stage share; None where there are none."""
    distinct = sorted(set(values))
    if len(distinct) > 1:
        raise ValueError(f"checkpoint: {what} differs between the blocks of one stage: {distinct}. That is no published Swin.")
    return distinct[0] if distinct else None


def _heads(name: str, parameters: Mapping[str, Tensor], depths: tuple[int, ...]) -> list[int | None]:
    suffix = "attn.logit_scale" if name == "swin_v2" else "attn.relative_position_bias_table"
    return [
        _single(
            (t.numel() if name == "swin_v2" else t.shape[1] for t in _of_stage(parameters, stage, suffix)), "the number of heads"
        )
        for stage in range(len(depths))
    ]


def _extra_norm_period(parameters: Mapping[str, Tensor], depths: tuple[int, ...]) -> int:
    normed = {(int(m[1]), int(m[2]) + 1) for m in map(BLOCK.match, parameters) if m and m[3] == "norm3.weight"}
    if not normed:
        return 0
    period = min(number for _, number in normed)
    expected = {(stage, number) for stage, depth in enumerate(depths) for number in range(period, depth + 1, period)}
    if normed != expected:
        raise ValueError(f"checkpoint: norms on the main branch after blocks {sorted(normed)} (stage, block) follow no period.")
    return period


# -------------------------------------------------------------------------------------------------------------- windows


def _windows(
    name: str,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    depths: tuple[int, ...],
    file: CheckpointFile,
    hints: Hints,
) -> Windows:
    stages = range(len(depths))
    found = [_table_window(parameters, stage) if name == "swin" else _buffer_window(buffers, stage) for stage in stages]
    told = [_pretrained_window(buffers, stage) for stage in stages]
    _check_pretrained_hint(hints.pretrained_window_sizes, found, told)
    pretrained = hints.pretrained_window_sizes or tuple(window or 0 for window in told)
    if None not in found:
        if hints.window_size not in (None, max(found)):
            raise ValueError(
                f"window: {hints.window_size} was asked for, but the checkpoint's own is {max(found)}. Leave it out."
            )
        return Windows(tuple(found), pretrained, "from the bias tables" if name == "swin" else "from the buffers")
    stored = file.setting(f"{SETTINGS_SECTION[name]}.WINDOW_SIZE")
    window = hints.window_size or stored
    if not window:
        raise ValueError(
            f"window: {file.path} has no buffers that tell the window, got no option either. Give it with --window"
            " (12 for pre-trainings at 192 pixels; else as in the name of the file)."
        )
    origin = "as asked for" if hints.window_size else "stored in the file"
    stored_pretrained = file.setting(f"{SETTINGS_SECTION[name]}.PRETRAINED_WINDOW_SIZES")
    if hints.pretrained_window_sizes is None and stored_pretrained:
        pretrained = tuple(stored_pretrained)
    return Windows((window,) * len(depths), pretrained, origin)


def _table_window(parameters: Mapping[str, Tensor], stage: int) -> int | None:
    """V1: a table of (2w - 1)^2 rows."""
    rows = _single((t.shape[0] for t in _of_stage(parameters, stage, "attn.relative_position_bias_table")), "the bias table")
    if rows is None:
        return None
    side = math.isqrt(rows)
    if side * side != rows or side % 2 == 0:
        raise ValueError(f"checkpoint: a bias table of {rows} rows in stage {stage}, expected (2w - 1)^2 for a square window.")
    return (side + 1) // 2


def _buffer_window(buffers: Mapping[str, Tensor], stage: int) -> int | None:
    """V2: coordinates (1, 2w - 1, 2w - 1, 2), indices (w^2, w^2), shift masks (windows, w^2, w^2)."""
    from_tables = [(t.shape[1] + 1) // 2 for t in _of_stage(buffers, stage, "attn.relative_coords_table")]
    from_indices = [math.isqrt(t.shape[-1]) for t in _of_stage(buffers, stage, "attn.relative_position_index")]
    from_masks = [math.isqrt(t.shape[-1]) for t in _of_stage(buffers, stage, "attn_mask")]
    return _single(from_tables + from_indices + from_masks, "the window")


def _check_pretrained_hint(asked: tuple[int, ...] | None, found: Sequence[int | None], told: Sequence[int | None]) -> None:
    """Refuse pre-training windows that the coordinates contradict; a stage's own window and 0 mean the same."""
    for stage, (want, window, own) in enumerate(zip(asked or (), found, told, strict=False)):
        if own is not None and (want or window) != (own or window):
            raise ValueError(
                f"pre-training window: {want} was asked for in stage {stage}, but the checkpoint's own is {own or window}."
                " Leave the option out."
            )


def _pretrained_window(buffers: Mapping[str, Tensor], stage: int) -> int | None:
    """V2: from the largest coordinate log2(1 + 8 (w - 1) / (w_pre - 1)) / 3; 0: the window itself; None: not told."""
    table = next(_of_stage(buffers, stage, "attn.relative_coords_table"), None)
    if table is None or table.shape[1] < 3:
        return None
    window = (table.shape[1] + 1) // 2
    pretrained = 1 + 8 * (window - 1) / (2 ** (3 * table.abs().max().item()) - 1)
    if abs(pretrained - round(pretrained)) > 0.02:
        raise ValueError(
            f"checkpoint: the coordinates of stage {stage} belong to a pre-training window of {pretrained:.2f}, expected a whole"
            " number. Its position bias uses another formula than the published one."
        )
    return 0 if round(pretrained) == window else round(pretrained)


# ----------------------------------------------------------------------------------------------------------- image size


def _image_size(
    windows: Windows, buffers: Mapping[str, Tensor], patch_size: int, file: CheckpointFile, hints: Hints
) -> tuple[tuple[int, int], str]:
    """(height, width) in pixels and where it is from."""
    told = _size_from_tensors(windows, buffers, patch_size)
    if hints.image_size is not None:
        square = (told, told) if told else hints.image_size
        if hints.image_size != square:
            raise ValueError(f"image size: {hints.image_size} was asked for, but the checkpoint's own is {square}. Leave it out.")
        return hints.image_size, "as asked for"
    if told is not None:
        return (told, told), "from the tensors"
    stored = file.setting("DATA.IMG_SIZE")
    if isinstance(stored, int):
        return (stored, stored), "stored in the file"
    if isinstance(stored, list | tuple) and len(stored) == 2:
        return (stored[0], stored[1]), "stored in the file"
    # Released models: windows 12, 14, 16, 24 span the last stage but one (192, 224, 256, 384 px), windows 7 and 8 the last.
    spanned = len(windows.stages) - (2 if max(windows.stages) >= 12 and len(windows.stages) > 1 else 1)
    side = max(windows.stages) * patch_size * 2**spanned
    return (side, side), "as released models have it at this window; tensors do not tell"


def _size_from_tensors(windows: Windows, buffers: Mapping[str, Tensor], patch_size: int) -> int | None:
    """Side of a square image: from the number of windows in a shift mask, or from a stage smaller than the window."""
    for stage, window in enumerate(windows.stages):
        for mask in _of_stage(buffers, stage, "attn_mask"):
            per_side = math.isqrt(mask.shape[0])
            if per_side**2 == mask.shape[0]:
                return window * per_side * patch_size * 2**stage
    for stage, window in enumerate(windows.stages):
        if window < max(windows.stages):
            return window * patch_size * 2**stage
    return None


def _check_windows(windows: Windows, image_size: tuple[int, int], patch_size: int) -> None:
    """Each stage's window must be what an image of this size gives it. Told windows of stages are compared, guessed ones not."""
    if windows.origin in ("as asked for", "stored in the file"):
        return
    sides = [min(side) for side in stage_sides(image_size, patch_size, len(windows.stages))]
    expected = tuple(min(side, max(windows.stages)) for side in sides)
    if expected != windows.stages:
        raise ValueError(
            f"image size: {image_size} gives windows {expected} per stage, the checkpoint has {windows.stages}."
            " Give the size it was trained at with --image-size."
        )
