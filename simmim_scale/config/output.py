"""What a run validates, saves and logs."""

from typing import Any

from pydantic import PositiveInt

from simmim_scale.config.section import Section, setting


class ValidationConfig(Section):
    """Loss on held-out images under fixed masks: it predicts fine-tuning (arXiv 2206.04664)."""

    every_steps: PositiveInt | None = setting(
        None, "Validate every so many steps; null: once an epoch. Always at the end.", unit="steps"
    )
    samples: PositiveInt | None = setting(None, "Use at most this many validation samples; null: all.", unit="samples")
    micro_batch: PositiveInt | None = setting(None, "Samples one rank evaluates at once; null: as in training.", unit="samples")
    gallery: int = setting(8, "Images whose reconstruction is drawn at each validation.", unit="images", source="choice", ge=0)


class CheckpointConfig(Section):
    """Run state for resuming, in RUN_DIR/checkpoints."""

    every_steps: PositiveInt | None = setting(
        None, "Save every so many steps; null: once an epoch. Always at the end.", unit="steps"
    )
    keep: PositiveInt = setting(2, "Complete saves that are kept.", unit="saves", source="choice")
    keep_every_steps: PositiveInt | None = setting(
        None, "Also keep, for good, the saves at multiples of this step.", unit="steps"
    )
    asynchronous: bool = setting(
        False,
        "Copy the state to CPU memory (12 bytes a parameter, shared among the ranks) and write it while training goes on.",
        source="choice",
    )
    mirror: str | None = setting(
        None, "URL (s3://, gs:// ...) that each save is copied to; a run whose directory is lost goes on from there. null: none."
    )
    mirror_options: dict[str, Any] = setting(
        {}, "Passed to fsspec's file system of the mirror, e.g. endpoint_url. Keep credentials in the environment, not here."
    )


class ReportConfig(Section):
    """Where metrics go besides RUN_DIR/metrics.jsonl and the terminal."""

    terminal_every_steps: PositiveInt = setting(
        10, "Steps between two lines when output is not a terminal.", unit="steps", source="choice"
    )
    tensorboard: bool = setting(False, "Also write TensorBoard event files (needs the package tensorboard).")
    wandb: str | None = setting(None, "Also log to this Weights & Biases project (needs the package wandb); null: not.")
    peak_tflops: float | None = setting(
        None, "Dense matrix-product peak of one device, for MFU; null: from the table of known devices.", unit="TFLOP/s", gt=0
    )
