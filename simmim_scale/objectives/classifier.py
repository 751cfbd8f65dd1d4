"""Classification: mean over the last stage's tokens, one linear map to classes. Names follow the published checkpoints.

Letters: b batch, c channels, h w image height and width, k classes, d width of the last stage, n residual branches.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simmim_scale.config.schema import ModelConfig
from simmim_scale.models import build_backbone
from simmim_scale.models.drop_path import sample_drop_path
from simmim_scale.models.initialization import assign, constant, trunc_normal
from simmim_scale.models.layers import Linear
from simmim_scale.objectives.features import pooled_features, wants_features
from simmim_scale.objectives.mixing import mix_images, smoothed_cross_entropy
from simmim_scale.objectives.pixels import PixelNorm, check_image

MIX_PLAN = ("partner", "mix_lam", "mix_box")


class Classifier(nn.Module):
    """A backbone, mean pooling and a linear head.

    Args:
        backbone: `encode(embed(image), drop_path)` -> (b, th, tw, num_features), normed.
        num_classes: k.
        mean, std: of the channels, as shares of 255.
        label_smoothing: share of the training target that is spread over all classes.
        seed: of the drop-path draws, which depend on it and on the sample's position in the stream.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        label_smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = Linear(backbone.num_features, num_classes)
        self.pixel_norm = PixelNorm(tuple(mean), tuple(std))
        self.in_chans = len(tuple(mean))
        self.label_smoothing = label_smoothing
        self.seed = seed

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    def init_weights(self, generator: torch.Generator) -> None:
        """Set every parameter from a CPU generator; the head as published: N(0, .02) and biases 0."""
        if hasattr(self.backbone, "init_weights"):  # a backbone of one's own may initialise itself when it is built
            self.backbone.init_weights(generator)
        assign(self.head.weight, trunc_normal(), generator)
        assign(self.head.bias, constant(0.0), generator)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits, and with labels the loss.

        Args:
            batch: "image" (b, c, h, w), uint8, or floating and normalised; "label" (b,) int64, needed in training; optional
                "position" (b,) int64 (seeds drop path in training), "valid" (b,) bool (False: no part of the loss), and in
                training the plan of mixing: "partner" (b,), "mix_lam" (b,), "mix_box" (b, 4).

        Returns:
            In training "loss" () alone: smoothed, mixed cross-entropy, fp32. In eval mode "logits" (b, k) and, with labels,
            "loss" () and "loss_per_sample" (b,): plain cross-entropy, 0 where not valid; with the key "probe" nothing but the
            pooled features of every stage, see `objectives/features.py`.
        """
        check_image(batch["image"], self.in_chans)
        image = self.pixel_norm(batch["image"])
        if wants_features(batch) and not self.training:
            return pooled_features(self.backbone, image.to(self.head.weight.dtype))
        if not self.training:
            return self._tested(self.head(self.pool(image)), batch)
        if "label" not in batch:
            raise ValueError(f"batch: training needs the key 'label', got {sorted(batch)}. Add the classes, or call eval().")
        plan = {name: batch[name] for name in MIX_PLAN if name in batch}
        if plan:
            image = mix_images(image, plan)
        logits = self.head(self.pool(image, drop_path=self._drop_path(batch)))
        per_sample = smoothed_cross_entropy(logits, batch["label"], plan, smoothing=self.label_smoothing)
        return {"loss": _mean_of_valid(per_sample, batch)}

    def pool(self, image: Float[Tensor, "b c h w"], *, drop_path: Float[Tensor, "n b"] | None = None) -> Float[Tensor, "b d"]:
        """Mean of the normed tokens of a normalised image."""
        tokens = self.backbone.embed(image.to(self.head.weight.dtype))
        return self.backbone.encode(tokens, drop_path).mean((1, 2))

    def _tested(self, logits: Float[Tensor, "b k"], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "label" not in batch:
            return {"logits": logits}
        per_sample = smoothed_cross_entropy(logits, batch["label"], {}, smoothing=0.0)
        if "valid" in batch:
            per_sample = torch.where(batch["valid"], per_sample, 0.0)
        return {"logits": logits, "loss": _mean_of_valid(per_sample, batch), "loss_per_sample": per_sample}

    def _drop_path(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        rates = getattr(self.backbone, "drop_path_rates", ())
        if "position" not in batch or not any(rate > 0 for rate in rates):
            return None
        return sample_drop_path(rates, self.seed, batch["position"])


def _mean_of_valid(per_sample: Float[Tensor, " b"], batch: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    if "valid" not in batch:
        return per_sample.mean()
    valid = batch["valid"].to(per_sample.dtype)
    return (per_sample * valid).sum() / valid.sum().clamp(min=1)


def build_classifier(
    model: ModelConfig,
    *,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    label_smoothing: float = 0.0,
    attention: str = "auto",
    initialise: bool = True,
) -> Classifier:
    """Build a classifier; `initialise=False` leaves its parameters as constructed, to load weights into them."""
    with torch.random.fork_rng(devices=[]):  # a backbone of one's own may draw its weights from the global generator
        torch.manual_seed(seed)
        backbone = build_backbone(model, attention=attention, seed=None)
    module = Classifier(
        backbone=backbone, num_classes=num_classes, mean=mean, std=std, label_smoothing=label_smoothing, seed=seed
    )
    if initialise:
        module.init_weights(torch.Generator().manual_seed(seed))
    return module
