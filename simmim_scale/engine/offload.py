"""ZeRO-Offload and ZeRO-Infinity: DeepSpeed's sections for what lies in CPU memory or on a disk; whether it can run here."""

import importlib
from typing import Any

from simmim_scale.config.schema import EngineConfig

# Buffers that move between disk and CPU, as DeepSpeed's own examples of ZeRO-Infinity set them.
AIO = {"block_size": 2**20, "queue_depth": 8, "single_submit": False, "overlap_events": True, "intra_op_parallelism": 1}


def offload_settings(engine: EngineConfig) -> dict[str, Any]:
    """Keys of DeepSpeed's section `zero_optimization`; {} when nothing is offloaded. Pure."""
    sections = {"offload_optimizer": engine.offload_optimizer, "offload_param": engine.offload_parameters}
    return {name: _section(place, engine.nvme_path) for name, place in sections.items() if place != "none"}


def aio_settings(engine: EngineConfig) -> dict[str, Any]:
    """DeepSpeed's section `aio`; {} when nothing lies on a disk. Pure."""
    return {"aio": dict(AIO)} if _uses_nvme(engine) else {}


def require_offload(engine: EngineConfig) -> None:
    """Raise ValueError where a disk was asked for and DeepSpeed's asynchronous I/O cannot be compiled."""
    if not _uses_nvme(engine):
        return
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise ValueError(
            "engine.offload_optimizer: nvme needs DeepSpeed's async_io, which is compiled at first use and needs libaio; it was"
            " not found. Install it (Debian: apt install libaio-dev), or choose cpu."
        )


def _uses_nvme(engine: EngineConfig) -> bool:
    return "nvme" in (engine.offload_optimizer, engine.offload_parameters)


def _section(place: str, path: str | None) -> dict[str, Any]:
    return {"device": place, "pin_memory": True, **({"nvme_path": path} if place == "nvme" else {})}
