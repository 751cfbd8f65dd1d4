"""ZeRO-Offload and ZeRO-Infinity: DeepSpeed's sections for what lies in CPU memory or on a disk; whether it can run here."""

import importlib
import shutil
from pathlib import Path
from typing import Any

from simmim_scale.config.memory import LARGEST_PARAMETER, PARAMETER_BUFFERS, SUB_GROUP
from simmim_scale.config.schema import EngineConfig

# Buffers that move between disk and CPU, as DeepSpeed's own examples of ZeRO-Infinity set them.
AIO = {"block_size": 2**20, "queue_depth": 8, "single_submit": False, "overlap_events": True, "intra_op_parallelism": 1}


def offload_settings(engine: EngineConfig, *, world_size: int) -> dict[str, Any]:
    """Keys of DeepSpeed's section `zero_optimization`; {} when nothing is offloaded. Pure."""
    sections = {"offload_optimizer": engine.offload_optimizer, "offload_param": engine.offload_parameters}
    found: dict[str, Any] = {name: _section(place, engine.nvme_path) for name, place in sections.items() if place != "none"}
    if engine.offload_parameters == "nvme":
        found["offload_param"] |= {
            "max_in_cpu": 0,  # the default keeps the first 1e9 elements of a rank in CPU memory
            "buffer_count": PARAMETER_BUFFERS,
            "buffer_size": -(-LARGEST_PARAMETER // world_size),
        }
        # DeepSpeed 0.19.8 fetches a parameter ahead twice if its uses in forward and backward are close, and fails.
        found["stage3_prefetch_bucket_size"] = 0
    if engine.offload_optimizer == "nvme":
        found["sub_group_size"] = SUB_GROUP
    return found


def aio_settings(engine: EngineConfig) -> dict[str, Any]:
    """DeepSpeed's section `aio`; {} when nothing lies on a disk. Pure."""
    return {"aio": dict(AIO)} if _uses_nvme(engine) else {}


def prepare_offload(engine: EngineConfig, rank: int) -> None:
    """Check what a disk needs, and remove what an earlier start of this rank left there.

    Raises:
        ValueError: DeepSpeed's asynchronous I/O cannot be compiled, or the directory cannot be written to.
    """
    if not _uses_nvme(engine):
        return
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise ValueError(
            "engine.offload_optimizer: nvme needs DeepSpeed's async_io, which is compiled at first use and needs libaio; it was"
            " not found. Install it (Debian: apt install libaio-dev), or choose cpu."
        )

    assert engine.nvme_path is not None
    # DeepSpeed empties its directory of parameters at a start, but not that of the optimizer, whose files always get new names.
    swapped = Path(engine.nvme_path, "zero_stage_3", "optimizer", f"rank{rank}")
    try:
        shutil.rmtree(swapped, ignore_errors=True)
        swapped.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"engine.nvme_path: a directory on a local disk that this user may write to, got {engine.nvme_path}"
            f" ({error.strerror}). Choose another one."
        ) from error


def _uses_nvme(engine: EngineConfig) -> bool:
    return "nvme" in (engine.offload_optimizer, engine.offload_parameters)


def _section(place: str, path: str | None) -> dict[str, Any]:
    return {"device": place, "pin_memory": True, **({"nvme_path": path} if place == "nvme" else {})}
