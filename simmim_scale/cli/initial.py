"""Weights to start from: which they are, what the model section takes from them, and how they are fitted to another window."""

from dataclasses import replace

from simmim_scale.config.load import load_config
from simmim_scale.config.schema import Config, SwinV2Config
from simmim_scale.models.resizing import complete_model, parse_model, resize_state
from simmim_scale.models.weights import Weights, load_weights, read_weights_config
from simmim_scale.tasks.pretrained import find_weights
from simmim_scale.train.run_directory import RunDirectory


def with_pretrained_windows(config: Config, directory: RunDirectory) -> Config:
    """The configuration with the pre-training windows that SwinV2 takes from `init_from`; see `models/resizing.py`.

    A run that has trained keeps what it began with, so that it can go on when the weights are gone.

    Raises:
        ValueError: no weights there, of another architecture, or pre-trained at other windows than the configuration says.
    """
    if not config.init_from:
        return config
    if directory.has_trained() and directory.config.exists():
        began = load_config(directory.config).model
        model = config.model
        if isinstance(model, SwinV2Config) and isinstance(began, SwinV2Config) and not model.pretrained_window_sizes:
            model = model.model_copy(update={"pretrained_window_sizes": began.pretrained_window_sizes})
        return config.model_copy(update={"model": model})
    source = parse_model(read_weights_config(find_weights(config.init_from))["model"])
    return config.model_copy(update={"model": complete_model(source, config.model)})


def load_initial_weights(config: Config) -> tuple[Weights | None, list[str]]:
    """What `init_from` names, fitted to the model's window and image size, and what was changed, one line each.

    Raises:
        ValueError: no weights there, truncated ones, or ones of another architecture.
    """
    if not config.init_from:
        return None, []
    weights = load_weights(find_weights(config.init_from))
    resized = resize_state(weights.state, parse_model(weights.config["model"]), config.model, method=config.init_resize)
    return replace(weights, state=resized.state), resized.notes
