"""Where samples come from, how they are read, and how an image becomes the model's input."""

from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from simmim_scale.config.section import IMAGENET_MEAN, IMAGENET_STD, Section, setting


class RemoteConfig(Section):
    """How shards at a URL are read: through fsspec, whole, into a bounded cache on every node."""

    cache_dir: str = setting("~/.cache/simmim_scale", "Directory of the cache, on a local disk; all ranks of a node share it.")
    cache_gb: float = setting(
        200.0, "Most that cached shards take; those used longest ago are dropped.", unit="GB", source="choice", gt=0
    )
    downloads: int = setting(
        2, "Shards that a rank fetches ahead at the same time; 0: none is fetched ahead.", unit="shards", source="choice", ge=0
    )
    attempts: PositiveInt = setting(
        8, "How often a piece of a file is asked for, with pauses from .25 s that double.", unit="times", source="choice"
    )
    timeout_s: float = setting(60.0, "A piece (16 MB) that takes longer is asked for again.", unit="s", source="choice", gt=0)
    options: dict[str, Any] = setting(
        {}, "Passed to fsspec's file system, e.g. endpoint_url. Keep credentials in the environment, not here."
    )


class DataConfig(Section):
    """Where samples come from and how an image becomes the model's input."""

    train: str = setting(
        "", "Shards (made by `python -m data_tools shard`) to train on: a directory, or a URL (s3://, https:// ...)."
    )
    validation: str | None = setting(None, "Shards held out for validation: a directory, or a URL; null: none.")
    remote: RemoteConfig = setting(RemoteConfig(), "Reading shards at a URL.")
    train_samples: PositiveInt | None = setting(
        None,
        "Number of samples to plan with while the shards are not there (describe, plan). A run counts them itself.",
        unit="samples",
    )
    crop_scale: tuple[float, float] = setting(
        (0.67, 1.0), "RandomResizedCrop: range of the crop's share of the area.", unit="share", source="R"
    )
    crop_ratio: tuple[float, float] = setting(
        (0.75, 4 / 3), "RandomResizedCrop: range of width over height.", unit="ratio", source="R"
    )
    flip: float = setting(0.5, "Probability of a horizontal flip.", unit="probability", source="R", ge=0, le=1)
    interpolation: Literal["bilinear", "bicubic"] = setting("bilinear", "Resampling of the crop, anti-aliased.", source="R")
    mean: tuple[float, ...] = setting(
        IMAGENET_MEAN, "Mean of the channels, subtracted on the device.", unit="share of 255", source="R"
    )
    std: tuple[float, ...] = setting(IMAGENET_STD, "Standard deviation of the channels.", unit="share of 255", source="R")
    band_range: tuple[float, float] | None = setting(
        None,
        "Values of NPY and multi-band TIFF files that become 0 and 255; null: those of 8 or 16 bits.",
        unit="value in the file",
    )
    decoder: Literal["cpu", "gpu"] = setting(
        "cpu",
        "Where JPEGs are decoded and resampled: by the workers, or by the rank's GPU (nvJPEG), whose time training then lacks.",
        source="choice",
    )
    workers: int = setting(
        4, "Processes that decode images, per rank; 0: the rank itself does it.", unit="processes", source="choice", ge=0
    )
    prefetch: PositiveInt = setting(4, "Micro-batches that each worker keeps ready.", unit="micro-batches", source="choice")
    mixed_shards: PositiveInt = setting(
        256,
        "Shards' worth of samples that are mixed at any time, over all nodes; sets with fewer shards are mixed as a whole.",
        unit="shards",
        source="choice",
    )

    @model_validator(mode="after")
    def _ranges(self) -> "DataConfig":
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if not 0 < low <= high:
                raise ValueError(
                    f"{name}: a range (low, high) with 0 < low <= high, got ({low}, {high}). Swap or raise the bounds."
                )
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale: shares of the image's area, at most 1, got {self.crop_scale[1]}.")
        if self.band_range is not None and self.band_range[0] >= self.band_range[1]:
            raise ValueError(f"band_range: (low, high) with low < high, got {self.band_range}. Swap the values.")
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"std: one value per channel as in mean ({len(self.mean)}), got {len(self.std)}. Make both lists equally long."
            )
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std: positive values, got {list(self.std)}.")
        return self
