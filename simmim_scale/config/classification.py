"""Fine-tuning for classification: augmentation, mixing, the loss and the view that is tested."""

from typing import Literal

from pydantic import PositiveInt, field_validator

from simmim_scale.config.section import Section, setting


class ClassificationConfig(Section):
    """What classification adds to data, optimizer and schedule. Defaults are the published fine-tuning recipe."""

    num_classes: PositiveInt | None = setting(
        None, "Number of classes; null: as many as the index of the training shards names.", unit="classes"
    )
    label_smoothing: float = setting(
        0.1, "Share of the target that is spread over all classes.", unit="share", source="R", ge=0, lt=1
    )
    rand_augment: str | None = setting(
        "rand-m9-mstd0.5-inc1", "RandAugment as timm writes it: magnitude, its deviation, increasing ops; null: none.", source="R"
    )
    random_erasing: float = setting(
        0.25, "Probability that a rectangle is replaced by noise.", unit="probability", source="R", ge=0, le=1
    )
    mixup: float = setting(0.8, "Both parameters of mixup's beta distribution; 0: no mixup.", source="R", ge=0)
    cutmix: float = setting(1.0, "Both parameters of cutmix's beta distribution; 0: no cutmix.", source="R", ge=0)
    mix_probability: float = setting(
        1.0, "Probability that a group of samples is mixed.", unit="probability", source="R", ge=0, le=1
    )
    cutmix_share: float = setting(
        0.5, "Where both are on: probability of cutmix rather than mixup.", unit="probability", source="R", ge=0, le=1
    )
    mix_group: int = setting(
        128,
        "Neighbours in the order of samples that share one draw of mixing; published: the batch of one GPU.",
        unit="samples",
        source="R",
        ge=2,
    )
    test_crop: float = setting(
        0.875, "Side of the tested centre over the shorter side of the image; 1: all of it.", unit="share", source="R", gt=0, le=1
    )
    test_resize: Literal["cover", "squash"] = setting(
        "cover",
        "cover: the centre of the input's shape is tested; squash: the whole image, resized to the input whatever its shape.",
        source="R",
    )

    @field_validator("mix_group")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"mix_group: an even number, since samples are mixed in pairs, got {value}. Use {value + 1}.")
        return value

    @property
    def mixes(self) -> bool:
        """Whether any samples are mixed."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)
