"""Opening a checkpoint from elsewhere without running code that is in it: weights_only loading, or safetensors."""

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from simmim_scale.models.layouts.records import CheckpointFile

DIRECTORY_FILES = ("model.safetensors", "pytorch_model.bin")
STATE_KEYS = ("model", "state_dict")  # where checkpoints keep the tensors, besides the top level


def _harmless() -> list[tuple[Callable[..., Any] | type, str]]:
    """Classes that published checkpoints hold besides tensors: settings, and numpy numbers (accuracies). None of them can run
    code."""
    scalar = np._core.multiarray.scalar if hasattr(np, "_core") else np.core.multiarray.scalar
    numbers = [(getattr(np.dtypes, name), f"numpy.dtypes.{name}") for name in ("Float64DType", "Float32DType", "Int64DType")]
    return [
        (OrderedDict, "yacs.config.CfgNode"),
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        (np.dtype, "numpy.dtype"),
        *numbers,
    ]


def read_checkpoint(path: str | Path) -> CheckpointFile:
    """Read a .pth, .pt, .bin or .safetensors file, or the one in a directory that timm or transformers saved, onto the CPU.

    Raises:
        ValueError: no such file, damaged, no tensors in it, or objects in it that cannot be loaded safely.
    """
    path = _find_file(Path(path))
    if not path.is_file():
        raise ValueError(f"checkpoint: no file {path}. Give the path of a downloaded checkpoint.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint: {path} holds a {type(content).__name__}, expected a dictionary of tensors.")
    inner = next((content[key] for key in STATE_KEYS if isinstance(content.get(key), Mapping)), content)
    state = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(
            f"checkpoint: no tensors in {path}; its keys are {sorted(map(str, content))[:8]}. Expected 'model' or tensors."
        )
    settings = content.get("config")
    return CheckpointFile(path=path, state=state, settings=settings if isinstance(settings, Mapping) else {})


def read_settings(file: CheckpointFile, name: str = "config.json") -> dict[str, Any]:
    """A JSON file beside the tensors' file, as timm and transformers write it; {} where there is none.

    Raises:
        ValueError: it is there and no JSON object.
    """
    path = file.path.with_name(name)
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"checkpoint: {path} is no JSON ({error}). Download it again.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"checkpoint: {path} holds a {type(settings).__name__}, expected an object. Download it again.")
    return settings


def _find_file(path: Path) -> Path:
    """The file itself, or the one tensors' file of a directory as other programs save them."""
    if not path.is_dir():
        return path
    found = [path / name for name in DIRECTORY_FILES if (path / name).is_file()]
    if not found:
        raise ValueError(f"checkpoint: expected one of {', '.join(DIRECTORY_FILES)} in {path}, found none. Give the file itself.")
    return found[0]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: {path} is truncated or no safetensors file ({error}). Download it again.") from error


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_harmless()):
            # Mapped, so that optimizer states beside the model are never read; only files in the zip format can be.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint: {path} is damaged, or holds more than tensors and is not loaded for safety ({_cause(error)})."
            " Save its state dict alone with a program you trust."
        ) from error
    except Exception as error:  # on damaged files the unpickler raises nearly anything: KeyError, EOFError, struct.error ...
        raise ValueError(f"checkpoint: {path} is truncated or no PyTorch file ({error!r:.200}). Download it again.") from error


def _cause(error: Exception) -> str:
    """The sentence of torch's long message that names the reason; its advice to load unsafely is left out."""
    sentences = [line.strip() for line in str(error).splitlines()]
    named = [line for line in sentences if line.startswith(("WeightsUnpickler error", "Unsupported", "Can only", "Trying to"))]
    text = (named or sentences)[-1] if sentences else "no message"
    return text.partition(" Please use")[0].removeprefix("WeightsUnpickler error: ")[:200]
