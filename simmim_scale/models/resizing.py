"""Weights of one model for another window or image size: the same network, its position biases carried over.

`complete_model` fixes the new model section (V2 keeps the windows of pre-training), `resize_state` changes the tensors that have
to change (bias tables of V1 and of ViT). Letters: h w offsets per axis of a bias table, heads attention heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from scipy.interpolate import RectBivariateSpline
from scipy.optimize import brentq
from torch import Tensor

from simmim_scale.config.schema import ModelConfig, SwinBaseConfig, SwinV2Config, ViTConfig
from simmim_scale.models.windows import stage_sides, window_geometry

BiasResize = Literal["geometric", "bicubic"]
Window = tuple[int, int]

# What has to be equal in both models. The patch embedding belongs to them: no published recipe changes its patch or its
# channels between pre-training and fine-tuning, and what to do with new channels is the user's knowledge.
ARCHITECTURE = (
    "name",
    "patch_size",
    "in_chans",
    "embed_dim",
    "depth",
    "depths",
    "width",
    "num_heads",
    "mlp_ratio",
    "qkv_bias",
    "extra_norm_period",
)
TABLE = "attn.relative_position_bias_table"
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"  # of a ViT whose blocks share one
CLASS_ROWS = 3  # of a ViT's table, after the offsets: class token to token, token to class token, class token to itself


@dataclass(frozen=True)
class Resized:
    """A state for the new model, and one line per kind of change (none: nothing had to change)."""

    state: dict[str, Tensor]
    notes: list[str]


def parse_model(section: Mapping[str, object]) -> ModelConfig:
    """The model section of stored weights, as plain values, checked again. Raises ValueError if it does not fit."""
    try:
        return TypeAdapter(ModelConfig).validate_python(dict(section))
    except ValidationError as error:
        raise ValueError(
            f"weights: their model section does not fit this version of simmim_scale: {error}. Use the version that wrote them."
        ) from error


def complete_model(source: ModelConfig, target: ModelConfig) -> ModelConfig:
    """`target` with the pre-training windows that SwinV2 needs to go on from weights of `source`.

    The position-bias MLP reads offsets relative to the window it was trained with. Where an image or window size changes that,
    the windows of `source` are written into `pretrained_window_sizes`; where nothing changes, `target` comes back as it is.

    Raises:
        ValueError: the models differ in more than sizes, or `target` names other pre-training windows than those of `source`.
    """
    _check_architecture(source, target)
    if not (isinstance(source, SwinV2Config) and isinstance(target, SwinV2Config)):
        return target
    trained, now = reference_windows(source), reference_windows(target)
    if trained == now:
        return target
    if target.pretrained_window_sizes:
        raise ValueError(
            f"model.pretrained_window_sizes: {_plain(target.pretrained_window_sizes)} was asked for, but the weights were trained"
            f" with windows {_as_setting(trained)}. Leave it out to take theirs."
        )
    return target.model_copy(update={"pretrained_window_sizes": tuple(_as_setting(trained))})


def resize_state(
    state: Mapping[str, Tensor], source: ModelConfig, target: ModelConfig, *, method: BiasResize = "geometric"
) -> Resized:
    """The tensors of `source` for `target`, a model of the same architecture at another window or image size.

    SwinV2 has no tensor that depends on a size; the bias tables of V1 and ViT are interpolated. A ViT's shared table becomes that
    of every block where `target` has one each. Tensors that stay as they are are the same objects.

    Args:
        state: of a whole module or of a backbone; V1's tables are found by their names.
        target: as `complete_model` returns it.
        method: of V1's tables, see `resize_bias_table`.

    Raises:
        ValueError: the models differ in more than sizes, or a table is not of the size that `source` says.
    """
    _check_architecture(source, target)
    if isinstance(source, ViTConfig) and isinstance(target, ViTConfig):
        return _resize_vit(state, source, target, method)
    if not (isinstance(source, SwinBaseConfig) and isinstance(target, SwinBaseConfig)):
        return Resized(dict(state), [])
    before, after = stage_windows(source), stage_windows(target)
    notes = (
        [] if source.image_size == target.image_size else [f"image {_sides(source.image_size)} -> {_sides(target.image_size)}"]
    )
    if before != after:
        notes.append(f"windows {_listed(before)} -> {_listed(after)}")
    if isinstance(target, SwinV2Config):
        if target.pretrained_window_sizes and reference_windows(target) != after:
            notes.append(f"position bias by log-spaced offsets of windows {_listed(reference_windows(target))}")
        return Resized(dict(state), notes)
    resized = dict(state)
    tables = [name for name in state if name.endswith(TABLE)]
    for name in tables:
        stage = int(name.partition("layers.")[2].partition(".")[0])
        resized[name] = _resized_table(name, state[name], before[stage], after[stage], method)
    changed = sum(resized[name] is not state[name] for name in tables)
    return Resized(resized, [*notes, f"{changed} bias tables interpolated ({method})"] if changed else notes)


def _resize_vit(state: Mapping[str, Tensor], source: ViTConfig, target: ViTConfig, method: BiasResize) -> Resized:
    if (source.position_bias, target.position_bias) == ("per_block", "shared"):
        raise ValueError(
            "model.position_bias: the weights have a table of every block, got shared. Set model.position_bias=per_block."
        )
    before, after = vit_grid(source), vit_grid(target)
    notes = [] if before == after else [f"image {_sides(source.image_size)} -> {_sides(target.image_size)}"]
    resized = dict(state)
    tables = [name for name in state if name.endswith((TABLE, SHARED_TABLE))]
    for name in tables:
        offsets, classes = state[name][:-CLASS_ROWS], state[name][-CLASS_ROWS:]
        if before != after:
            resized[name] = torch.cat([_resized_table(name, offsets, before, after, method), classes])
    if before != after:
        notes.append(f"{len(tables)} bias tables interpolated ({method})")
    if source.position_bias != target.position_bias:
        (shared,) = tables
        table, prefix = resized.pop(shared), shared.removesuffix(SHARED_TABLE)
        resized |= {f"{prefix}blocks.{number}.{TABLE}": table.clone() for number in range(target.depth)}
        notes.append(f"the shared bias table is now that of each of {target.depth} blocks")
    return Resized(resized, notes)


def vit_grid(model: ViTConfig) -> Window:
    """Tokens per side, (height, width): a ViT is one window."""
    return model.image_size[0] // model.patch_size, model.image_size[1] // model.patch_size


def stage_windows(model: SwinBaseConfig) -> list[Window]:
    """Window of each stage, (height, width) in tokens: the configured one, or the stage's side where that is smaller."""
    sides = stage_sides(model.image_size, model.patch_size, len(model.depths))
    limit = (model.window_size, model.window_size)
    return [window_geometry(side, limit, shifted=False).window for side in sides]


def reference_windows(model: SwinV2Config) -> list[Window]:
    """Window of each stage that the position bias measures offsets by: that of pre-training, or the stage's own."""
    return [told or own for told, own in zip(model.pretrained_windows, stage_windows(model), strict=True)]


# ----------------------------------------------------------------------------------------------------------- bias tables


def resize_bias_table(
    table: Float[Tensor, "offsets heads"], before: Window, after: Window, *, method: BiasResize
) -> Float[Tensor, "new_offsets heads"]:
    """A table of relative position biases, (2h - 1)(2w - 1) rows, for another window. An unchanged window gives the table itself.

    Args:
        before, after: windows, (height, width) in tokens.
        method: "bicubic" stretches the table as an image (cubic convolution; microsoft/Swin-Transformer). "geometric" puts the
            old entries at offsets 0, 1, 1 + q, 1 + q + q^2, ... with the q that makes the outermost reach the new window's edge,
            and reads a cubic spline through them at whole offsets (BEiT; microsoft/SimMIM): near offsets keep their bias.
    """
    if before == after:
        return table
    heads = table.shape[1]
    image = table.detach().t().reshape(heads, 2 * before[0] - 1, 2 * before[1] - 1)
    size = (2 * after[0] - 1, 2 * after[1] - 1)
    resized = _bicubic(image, size) if method == "bicubic" else _geometric(image, size)
    return resized.reshape(heads, -1).t().contiguous().to(table.dtype)


def _bicubic(image: Float[Tensor, "heads h w"], size: Window) -> Float[Tensor, "heads h2 w2"]:
    return F.interpolate(image[None].float(), size=size, mode="bicubic", align_corners=False)[0]


def _geometric(image: Float[Tensor, "heads h w"], size: Window) -> Float[Tensor, "heads h2 w2"]:
    places = [geometric_offsets(old, new) for old, new in zip(image.shape[1:], size, strict=True)]
    wanted = [np.arange(-(new // 2), new // 2 + 1, dtype=np.float64) for new in size]
    maps = [_spline(head, places, wanted) for head in image.double().cpu().numpy()]
    return torch.from_numpy(np.stack(maps))


def _spline(values: np.ndarray, places: list[np.ndarray], wanted: list[np.ndarray]) -> np.ndarray:
    """(h, w) values at `places` per axis, read at `wanted` per axis; cubic, of a lower degree where there are few places."""
    for axis in (0, 1):
        if values.shape[axis] == 1:  # a window of one token has one offset: there is nothing to interpolate, it holds for all
            values = np.repeat(values, 2, axis=axis)
    places = [np.array([-1.0, 1.0]) if len(points) == 1 else points for points in places]
    degrees = [min(3, len(points) - 1) for points in places]
    return RectBivariateSpline(*places, values, kx=degrees[0], ky=degrees[1], s=0)(*wanted)


def geometric_offsets(old: int, new: int) -> Float[np.ndarray, " old"]:
    """Where the `old` (odd) entries of an axis lie among the offsets -(new // 2) ... new // 2: their gaps grow by a factor q."""
    entries, reach = old // 2, new // 2
    if entries == 0:
        return np.zeros(1)
    powers = np.arange(entries)
    if entries == reach:
        gaps = np.ones(entries)
    elif reach < 2 or entries < 2:  # no factor can do it: one offset is left, or one entry is stretched
        gaps = np.full(entries, max(reach, 1) / entries)
    else:
        factor = brentq(lambda q: (q**powers).sum() - reach, 0.0, max(2.0, float(reach)))
        gaps = factor**powers
    outward = np.cumsum(gaps)
    return np.concatenate([-outward[::-1], [0.0], outward])


def _resized_table(name: str, table: Tensor, before: Window, after: Window, method: BiasResize) -> Tensor:
    rows = (2 * before[0] - 1) * (2 * before[1] - 1)
    if table.ndim != 2 or table.shape[0] != rows:
        raise ValueError(
            f"weights: {name} has shape {tuple(table.shape)}, expected {rows} rows for the window {_sides(before)} that their"
            " configuration says. Import or write the weights again."
        )
    return resize_bias_table(table, before, after, method=method)


# ---------------------------------------------------------------------------------------------------------------- checks


def _check_architecture(source: ModelConfig, target: ModelConfig) -> None:
    differing = [
        f"{key} is {_plain(getattr(source, key, None))} in the weights and {_plain(getattr(target, key, None))} in model"
        for key in ARCHITECTURE
        if getattr(source, key, None) != getattr(target, key, None)
    ]
    if differing:
        raise ValueError(
            f"init_from: the weights are of another model: {'; '.join(differing)}. Window, image size and drop path may differ;"
            " set the rest as the weights have it."
        )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _as_setting(windows: list[Window]) -> list[int | Window]:
    """A square window as one number, as the setting is usually written."""
    return [height if height == width else (height, width) for height, width in windows]


def _sides(pair: Window) -> str:
    return f"{pair[0]}x{pair[1]}"


def _listed(windows: list[Window]) -> str:
    return ",".join(str(height) if height == width else _sides((height, width)) for height, width in windows)
