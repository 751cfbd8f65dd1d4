"""Backbones: `build_backbone` makes the one a configuration names. Start reading at `hierarchy.py`, then `swin_v2.py`."""

import importlib
from collections.abc import Callable, Mapping

import torch
from torch import nn

from simmim_scale.config.schema import CustomModelConfig, ModelConfig

# name in the configuration -> "module:attribute" of a callable (config, *, attention) -> backbone; imported on use.
BACKBONES: Mapping[str, str] = {
    "swin": "simmim_scale.models.swin:Swin",
    "swin_v2": "simmim_scale.models.swin_v2:SwinV2",
    "resnet": "simmim_scale.models.resnet:ResNet",
    "vit": "simmim_scale.models.vit:ViT",
}


def build_backbone(config: ModelConfig, *, attention: str = "auto", seed: int | None = 0) -> nn.Module:
    """The backbone of the configuration's model section.

    Args:
        config: `name` is a key of `BACKBONES`, or "module:attribute" of a function that takes image_size, patch_size, in_chans
            and the section's `options` as keywords and returns a module with embed, encode, stride and num_features.
        attention: implementation of window attention, see `kernels/dispatch.py`.
        seed: of the initial weights; None: the parameters of the built-in backbones stay NaN until the caller loads them or
            calls `init_weights(generator)`, which saves drawing them twice.

    Raises:
        ValueError: unknown name, or a module or attribute that does not exist.
    """
    if isinstance(config, CustomModelConfig):
        sizes = {"image_size": config.image_size, "patch_size": config.patch_size, "in_chans": config.in_chans}
        return resolve(config.name)(**sizes, **config.options)
    if config.name not in BACKBONES:
        raise ValueError(f"model.name: unknown backbone {config.name!r}. Known: {', '.join(BACKBONES)}, or 'module:attribute'.")
    backbone = resolve(BACKBONES[config.name])(config, attention=attention)
    if seed is not None:
        backbone.init_weights(torch.Generator().manual_seed(seed))
    return backbone


def resolve(address: str) -> Callable[..., nn.Module]:
    """The object that 'module:attribute' names.

    Raises:
        ValueError: the address has another form, the module cannot be found, or it has no such attribute.
    """
    module_name, separator, attribute = address.partition(":")
    if not (module_name and separator and attribute):
        raise ValueError(f"model.name: expected 'module:attribute', got {address!r}. Known names: {', '.join(BACKBONES)}.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the module exists but lacks a dependency of its own: that message is the useful one
        raise ValueError(f"model.name: no module {module_name!r} ({error}). Put its directory on PYTHONPATH.") from error
    if not hasattr(module, attribute):
        raise ValueError(f"model.name: module {module_name!r} has no attribute {attribute!r}. Check the name after the colon.")
    return getattr(module, attribute)
