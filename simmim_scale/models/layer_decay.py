"""Layer-wise learning-rate decay: the factor of every parameter's learning rate, by the layer it belongs to."""

from torch import nn

BACKBONE = "backbone."


def layer_scales(module: nn.Module, decay: float) -> dict[str, float]:
    """Factor of each parameter by name: decay^(last layer - its layer); what is not of the backbone belongs to the last layer.

    Source: get_swin_layer of the released SimMIM fine-tuning code; there the mask token has layer 0, as here.

    Args:
        module: has a `backbone` with `layer_id(name)` and `num_layer_ids` (see `models/hierarchy.py`).
        decay: factor from a layer to the one below it; 1: every factor is 1.

    Raises:
        ValueError: the backbone does not say which layer a parameter belongs to.
    """
    names = [name for name, _ in module.named_parameters()]
    if decay == 1.0:
        return dict.fromkeys(names, 1.0)
    backbone = getattr(module, "backbone", None)
    if not (hasattr(backbone, "layer_id") and hasattr(backbone, "num_layer_ids")):
        raise ValueError(
            f"optimizer.layer_decay: {type(backbone).__name__} has no layer_id(name) and num_layer_ids, got a decay of {decay}."
            " Add them to the backbone, or set optimizer.layer_decay to 1."
        )
    last = backbone.num_layer_ids - 1

    def layer(name: str) -> int:
        if name.startswith("mask_token"):
            return 0
        return backbone.layer_id(name.removeprefix(BACKBONE)) if name.startswith(BACKBONE) else last

    return {name: decay ** (last - layer(name)) for name in names}
