"""How many cores of loading a GPU needs to be kept busy by a model: an estimate from FLOPs, or from a rate that was measured."""

from dataclasses import dataclass
from typing import Any

from simmim_scale.config.schema import Config
from simmim_scale.reports.throughput import device_peak_flops, training_flops_per_image
from simmim_scale.tasks.model_facts import describe_model

# What the kernels are built for: 60 % of the 798 TFLOP/s that an H100 was measured to reach in bf16 matrix products.
DESIGN_MFU = 0.48


@dataclass(frozen=True)
class Demand:
    """Images per second of one GPU that trains the model, and where the number comes from."""

    images_per_second: float
    source: str

    def as_json(self, *, images_per_core_second: float) -> dict[str, Any]:
        return {
            "gpu_images_per_second": self.images_per_second,
            "source": self.source,
            "cores_per_gpu": self.images_per_second / images_per_core_second,
        }


def estimate_demand(config: Config, *, gpu: str, measured: float | None = None) -> Demand:
    """What one GPU consumes.

    Args:
        config: The model.
        gpu: Name of a device whose peak is known, e.g. "H100"; used unless `measured` is given.
        measured: Images per second of one GPU, from a run.

    Raises:
        ValueError: A GPU whose peak is not known.
    """
    if measured is not None:
        return Demand(measured, "given")
    peak = config.report.peak_tflops * 1e12 if config.report.peak_tflops else device_peak_flops(gpu, config.engine.precision)
    if peak is None:
        raise ValueError(
            f"--gpu: no peak is known for {gpu!r}. Set report.peak_tflops, or give --gpu-images-per-second from a run."
        )
    flops = training_flops_per_image(describe_model(config)["multiply_adds"])
    return Demand(DESIGN_MFU * peak / flops, f"estimate: {gpu}, {peak / 1e12:.0f} TFLOP/s peak at {DESIGN_MFU:.0%} MFU")
