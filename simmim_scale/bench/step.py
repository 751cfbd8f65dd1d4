"""`simmim bench step`: images per second, MFU, memory and time by category of one training step, on random images.

The floor of a step is its matrix products at the speed this device was measured to multiply, and its update at the speed it was
measured to copy: 30 bytes a parameter in bf16 (read gradient, master, two moments; write the latter three and the bf16 weight),
28 in fp32. `--against reference` gives the published formulation its turns in the same process, on the same weights and images.
"""

import math
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from simmim_scale.bench.kernels import DTYPES, Settings, measure_ceilings
from simmim_scale.bench.step_profile import profile_step
from simmim_scale.bench.step_sides import OURS, REFERENCE, Side, build_side, check_reference
from simmim_scale.config.schema import Config
from simmim_scale.engine.precision import require_precision
from simmim_scale.engine.runtime import Runtime, start_runtime
from simmim_scale.reports.environment import package_versions
from simmim_scale.reports.throughput import device_peak_flops, training_flops_per_image
from simmim_scale.tasks.model_facts import describe_model

STATUS = Path("/proc/self/status")
UPDATE_BYTES = {"fp32": 28, "bf16": 30, "fp16": 30}


@dataclass(frozen=True)
class StepOptions:
    """What to measure.

    Attributes:
        batch: images of a step; None: the config's micro-batch, or its global batch where it has none.
        turns: measurements of each side, in turn; the median counts.
        steps: steps of one measurement.
        warmup: steps before the first measurement, in which things are compiled and chosen.
        against: "reference", or None for this project's step alone.
        checkpointed: the reference recomputes its blocks in backward, where it would not fit otherwise.
        processor_time: on a CPU, count the seconds of processor that a step took on all threads, not those that passed: a busy
            machine disturbs them less. Give PyTorch one thread then, since waiting threads count too.
        memory: measure the peak memory; on a CPU each side then runs once more in a process of its own.
    """

    batch: int | None = None
    turns: int = 7
    steps: int = 1
    warmup: int = 2
    against: str | None = None
    checkpointed: bool = False
    processor_time: bool = False
    memory: bool = True


def bench_step(config: Config, options: StepOptions, *, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure; the result is what `simmim bench step --out` writes as JSON.

    Raises:
        ValueError: the device lacks the precision, or the reference has no such model.
    """
    if options.against not in (None, REFERENCE):
        raise ValueError(f"--against: only 'reference' is known, got {options.against!r}.")
    if options.against:
        check_reference(config)
    runtime = start_runtime()
    if options.processor_time and _on_gpu(runtime):
        raise ValueError("--processor-time: is for steps on a CPU, got a GPU. Leave it out.")
    require_precision(config.engine.precision, runtime.device)
    batch = options.batch or config.train.micro_batch or config.train.global_batch
    names = [OURS] + ([REFERENCE] if options.against else [])
    facts = _facts(config, batch, runtime)
    progress("ceilings of this device: copy, matrix product")
    # fp32 beside bf16: what the fp32 parts of a bf16 step run at is not the question, the products are.
    ceilings = measure_ceilings(Settings(runtime.device, DTYPES[config.engine.precision], turns=5))
    sides, persistent, first = {}, {}, {}
    for name in names:
        progress(f"{name}: building, {options.warmup} steps to warm up")
        before = _held(runtime)
        sides[name] = build_side(name, config, batch, runtime, checkpointed=options.checkpointed)
        first[name] = sides[name].run(1)
        persistent[name] = _held(runtime) - before
        sides[name].run(max(options.warmup - 1, 1))
    seconds = _interleaved(sides, options, runtime, progress)
    profiles = {name: profile_step(lambda side=side: side.run(1), runtime.device) for name, side in sides.items()}
    memory = {name: _gpu_peak(sides[name], persistent[name], runtime) for name in names} if _on_gpu(runtime) else {}
    for side in sides.values():
        side.close()
    if options.memory and not memory and STATUS.exists():  # Linux
        memory = {name: _cpu_peak(name, config, batch, options, progress) for name in names}
    if options.processor_time:
        progress("without shares of the ceilings: those are measured in seconds that pass")
        facts = {**facts, "peak_flops": None}
    product = math.nan if options.processor_time else ceilings.product
    floor = floor_seconds(facts, ceilings.copy, product)
    rows = [_row(name, seconds[name], facts, product, floor, profiles[name], memory.get(name), first[name]) for name in names]
    return {"environment": _environment(config, options, runtime), "facts": facts, "ceilings": asdict(ceilings), "rows": rows}


def floor_seconds(facts: dict[str, Any], copy: float, product: float) -> float:
    """The least time of a step on a device that copies `copy` bytes and does `product` floating-point operations a second."""
    return facts["flops_per_image"] * facts["batch"] / product + facts["update_bytes"] / copy


def _facts(config: Config, batch: int, runtime: Runtime) -> dict[str, Any]:
    model = describe_model(config)
    multiply_adds = model["multiply_adds"] + model["head_multiply_adds"]
    name = torch.cuda.get_device_name(runtime.device) if _on_gpu(runtime) else ""
    return {
        "backbone": model["backbone"],
        "image_size": model["image_size"],
        "parameters": model["parameters_with_head"],
        "multiply_adds": multiply_adds,
        "flops_per_image": training_flops_per_image(multiply_adds),
        "batch": batch,
        "update_bytes": UPDATE_BYTES[config.engine.precision] * model["parameters_with_head"],
        "peak_flops": device_peak_flops(name, config.engine.precision),
    }


def _interleaved(
    sides: dict[str, Side], options: StepOptions, runtime: Runtime, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds per step of each turn; in turns, so that a busy machine slows all sides."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    clock = time.process_time if options.processor_time else time.perf_counter
    for turn in range(options.turns):
        for name, side in sides.items():
            _synchronise(runtime)
            start = clock()
            side.run(options.steps)
            _synchronise(runtime)
            seconds[name].append((clock() - start) / options.steps)
        progress(f"turn {turn + 1}: " + ", ".join(f"{name} {values[-1]:.3f} s" for name, values in seconds.items()))
    return seconds


def _row(
    name: str,
    seconds: list[float],
    facts: dict[str, Any],
    product: float,
    floor: float,
    profiled: dict[str, float],
    memory: int | None,
    first_loss: float,
) -> dict[str, Any]:
    median = statistics.median(seconds)
    whole = sum(profiled.values())
    rate = facts["batch"] / median
    return {
        "side": name,
        "seconds": median,
        "all_seconds": seconds,
        "images_per_second": rate,
        "share_of_product_ceiling": _or_none(rate * facts["flops_per_image"] / product),
        "mfu": rate * facts["flops_per_image"] / facts["peak_flops"] if facts["peak_flops"] else None,
        "share_of_floor": _or_none(floor / median),
        "peak_bytes": memory,
        # Shares of a profiled step, of the time that was measured without the profiler.
        "seconds_by_category": {category: median * part / whole for category, part in profiled.items()},
        "first_loss": _or_none(first_loss),
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _environment(config: Config, options: StepOptions, runtime: Runtime) -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(runtime.device) if _on_gpu(runtime) else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        "precision": config.engine.precision,
        "zero_stage": config.engine.zero_stage,
        "activation_checkpointing": config.engine.activation_checkpointing,
        "kernels": config.kernels.model_dump(),
        "options": asdict(options),
    }


def _on_gpu(runtime: Runtime) -> bool:
    return runtime.device.type == "cuda"


def _synchronise(runtime: Runtime) -> None:
    if _on_gpu(runtime):
        torch.cuda.synchronize(runtime.device)


def _held(runtime: Runtime) -> int:
    """Bytes allocated on the GPU now; 0 on a CPU, where a process of its own tells."""
    _synchronise(runtime)
    return torch.cuda.memory_allocated(runtime.device) if _on_gpu(runtime) else 0


def _gpu_peak(side: Side, persistent: int, runtime: Runtime) -> int:
    """What a side holds between steps, and what a step adds at its peak; the other side's memory is not counted."""
    torch.cuda.reset_peak_memory_stats(runtime.device)
    before = _held(runtime)
    side.run(2)
    return persistent + torch.cuda.max_memory_allocated(runtime.device) - before


def _cpu_peak(name: str, config: Config, batch: int, options: StepOptions, progress: Callable[[str], None]) -> int:
    """Resident memory that a fresh process gained at its peak over two steps, from when everything was imported."""
    progress(f"{name}: peak memory, in a process of its own")
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    threads = torch.get_num_threads()
    child = context.Process(target=_measure_peak, args=(sender, name, config, batch, options.checkpointed, threads))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the process that measures the memory of {name} ended without a figure (out of memory?)") from None
    finally:
        child.join()


def _measure_peak(sender: Any, name: str, config: Config, batch: int, checkpointed: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    runtime = start_runtime()
    before = _resident("VmRSS")
    side = build_side(name, config, batch, runtime, checkpointed=checkpointed)
    side.run(2)
    sender.send(_resident("VmHWM") - before)
    sender.close()
    side.close()
    runtime.close()


def _resident(field: str) -> int:
    """Bytes of resident memory of this process, now (VmRSS) or at its peak (VmHWM); getrusage keeps the parent's peak."""
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found, f"{STATUS} has no {field}"
    return int(found[1]) * 1024
