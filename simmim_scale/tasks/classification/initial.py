"""What fine-tuning takes from weights: the backbone, and the head where it fits."""

import logging

from torch import Tensor, nn

from simmim_scale.config.schema import ModelConfig
from simmim_scale.models.weights import Weights, load_into

log = logging.getLogger(__name__)


def load_initial(module: nn.Module, weights: Weights, *, model: ModelConfig) -> None:
    """Put the backbone of `weights` into a classifier. A head for other classes, or of pre-training, is left out: it starts anew.

    Args:
        module: a classifier, whole or partitioned.
        weights: of pre-training or of a classifier.
        model: the section that `module` was built from.

    Raises:
        ValueError: a backbone of another architecture; names what differs.
    """
    state = {name: value for name, value in weights.state.items() if name.startswith("backbone.")}
    if not state:
        raise ValueError(
            f"init_from: {weights.path} holds no backbone. Give a run, or weights that `simmim import-weights` wrote."
        )
    head = _fitting_head(module, weights)
    if not head and weights.config.get("task") == "classification":
        log.info("init_from: the head of %s is for other classes and starts anew.", weights.path)
    load_into(module, {**state, **head}, source=str(weights.path), optional=() if head else ("head.",))


def _fitting_head(module: nn.Module, weights: Weights) -> dict[str, Tensor]:
    if weights.config.get("task") != "classification":
        return {}
    head = {name: value for name, value in weights.state.items() if name.startswith("head.")}
    expected = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters() if name.startswith("head.")}
    return head if {name: tuple(value.shape) for name, value in head.items()} == expected else {}
