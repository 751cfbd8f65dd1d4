"""SimMIM: embed -> swap hidden tokens for the mask token -> encode -> head -> error of the hidden pixels against the target.

Letters: b batch, c channels, h w image height and width, gh gw mask grid, th tw token grid, d token width, n residual branches,
k hidden tokens of the last stage in each image.
Source: "SimMIM: A Simple Framework for Masked Image Modeling" (arXiv 2111.09886) and its released code for the formulas.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.profiler import record_function

from simmim_scale.config.lookup import lookup
from simmim_scale.config.schema import ModelConfig, ObjectiveConfig
from simmim_scale.models import build_backbone
from simmim_scale.models.drop_path import sample_drop_path
from simmim_scale.models.initialization import assign, trunc_normal
from simmim_scale.models.layers import fill_nan
from simmim_scale.objectives.features import pooled_features, wants_features
from simmim_scale.objectives.heads import HEADS
from simmim_scale.objectives.pixels import PixelNorm, check_image, flip_where, mask_to_tokens
from simmim_scale.objectives.prediction import Hidden, Pictures, hide, meet, predict
from simmim_scale.objectives.targets import TARGETS, Target, TargetContext

MASK_TOKEN_STD = 0.02  # R
BACKBONE_API = ("embed", "encode", "stride", "patch_size", "embed_dim", "num_features")


@dataclass(frozen=True)
class HiddenCells:
    """How many cells of a mask grid (rows, columns) are hidden in every image: known before it is drawn, so that a step can take
    the hidden tokens without asking a device how many there are."""

    grid: tuple[int, int]
    count: int


class MaskToken(nn.Module):
    """The learnt vector that stands for a hidden token. A module of its own, so that ZeRO-3 gathers it when it is called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(width))
        fill_nan(self)

    def init_weights(self, generator: torch.Generator) -> None:
        assign(self.token, trunc_normal(MASK_TOKEN_STD), generator)

    def forward(self, tokens: Float[Tensor, "b th tw d"], mask: Bool[Tensor, "b th tw"]) -> Float[Tensor, "b th tw d"]:
        """Put the mask token where the mask is True."""
        return torch.where(mask[..., None], self.token.to(tokens.dtype), tokens)


class SimMIM(nn.Module):
    """Masked image modeling around any backbone with `embed`, `encode`, `stride`, `patch_size`, `embed_dim` and `num_features`.

    Args:
        backbone: see `models/__init__.py`.
        head: see `objectives/heads.py`.
        target: see `objectives/targets.py`.
        mean, std: of the channels, as shares of 255.
        hidden_cells: what every mask of training hides; None: anything, and the head is asked for all tokens.
        seed: of the drop-path draws, which depend on it and on the sample's position in the stream.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        head: nn.Module,
        target: Target,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        hidden_cells: HiddenCells | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.mask_token = MaskToken(backbone.embed_dim)
        self.head = head
        self.target = target
        self.pixel_norm = PixelNorm(tuple(mean), tuple(std))
        self.in_chans = len(tuple(mean))
        self.seed = seed
        self.hidden_cells = hidden_cells
        self.meeting = meet(stride=backbone.stride, scale=target.scale, grid=target.grid)

    def init_weights(self, generator: torch.Generator) -> None:
        """Set every parameter from `generator` (a CPU generator): the same seed gives the same weights under any engine."""
        if hasattr(self.backbone, "init_weights"):  # a backbone of one's own may initialise itself when it is built
            self.backbone.init_weights(generator)
        self.mask_token.init_weights(generator)
        if hasattr(self.head, "init_weights"):
            self.head.init_weights(generator)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch, and in eval mode the prediction.

        Args:
            batch: "image" (b, c, h, w), uint8, or floating and normalised; "mask" (b, gh, gw) bool, True = hidden, any grid
                that divides the image into cells of whole patches, in the coordinates of the (flipped) picture; optional
                "flip" (b,) bool, "position" (b,) int64 (seeds drop path in training), "valid" (b,) bool (False: padding, no part
                of the loss), "view" (b, c, vh, vw) uint8 (another view of the same crop, for targets that ask for one).

        Returns:
            "loss" (), fp32. In eval mode also "loss_per_sample" (b,), the published loss of each sample by itself (0 where not
            valid), and "prediction" (b, o, rh, rw), the target's summary of what is predicted (of pixels: all of them).
            In eval mode with the key "probe" only the pooled features of every stage, see `objectives/features.py`.
        """
        if wants_features(batch) and not self.training:
            return pooled_features(self.backbone, self.pixel_norm(batch["image"]).to(self._compute_dtype()))
        pictures, mask = self.prepare(batch)
        features = self.encode(pictures.image, mask, drop_path=self._drop_path(batch))
        tokens = self._hidden_tokens(batch["mask"], mask) if self.training else None
        prediction = predict(self.head, self.meeting.features(features), patch=self.meeting.patch, tokens=tokens)
        hidden = self.hidden(pictures, mask)
        with record_function("loss"):  # for profilers: bench/step_profile.py
            sums = self.target.sums(prediction, pictures, hidden)
        valid = batch.get("valid")
        if self.training:
            return {"loss": sums.mean(valid)}
        summary = self.target.summary(prediction, hidden.size)
        return {"loss": sums.mean(valid), "loss_per_sample": sums.per_sample(valid), "prediction": summary}

    def prepare(self, batch: Mapping[str, Tensor]) -> tuple[Pictures, Bool[Tensor, "b th tw"]]:
        """Check a batch; its pictures, and its mask on the grid of the embedding's tokens."""
        for key in ("image", "mask"):
            if key not in batch:
                raise ValueError(f"batch: expected the keys 'image' and 'mask', got {sorted(batch)}. Add {key!r}.")
        stored, mask, flip = batch["image"], batch["mask"], batch.get("flip")
        check_image(stored, self.in_chans)
        if mask.ndim != 3 or mask.shape[0] != stored.shape[0]:
            raise ValueError(
                f"mask: expected (batch, rows, columns) with the image's batch of {stored.shape[0]}, got {tuple(mask.shape)}."
                " Give one grid of cells per image."
            )
        image = self.pixel_norm(stored if flip is None else flip_where(stored, flip))
        constants = None
        if not stored.is_floating_point():
            mean, std = self.pixel_norm.constants(stored.device)
            constants = (mean.view(-1), std.view(-1))
        size = (image.shape[2], image.shape[3])
        mask = mask_to_tokens(mask.bool(), image_size=size, patch_size=self.backbone.patch_size)
        view = batch.get("view")
        view = view if view is None or flip is None else flip_where(view, flip)
        return Pictures(image=image, stored=stored, flip=flip, constants=constants, view=view), mask

    def encode(
        self,
        image: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b th tw"],
        *,
        drop_path: Float[Tensor, "n b"] | None = None,
    ) -> Float[Tensor, "b th2 tw2 d"]:
        """Tokens of the last stage for a normalised image and a mask of the embedding's tokens."""
        tokens = self.backbone.embed(image.to(self._compute_dtype()))
        tokens = self.mask_token(tokens, mask)
        return self.backbone.encode(tokens, drop_path)

    def hidden(self, pictures: Pictures, mask: Bool[Tensor, "b th tw"]) -> Hidden:
        """Which of the target's pixels are hidden."""
        target, patch_size = self.target, self.backbone.patch_size
        return hide(mask, patch_size=patch_size, scale=target.scale, size=pictures.size, grid=target.grid)

    def _hidden_tokens(self, cells: Bool[Tensor, "b gh gw"], mask: Bool[Tensor, "b th tw"]) -> Int[Tensor, "b k"] | None:
        """Numbers of the last stage's tokens that are hidden, where each is hidden as a whole and their count is known; else
        None."""
        known, step = self.hidden_cells, self.backbone.stride // self.backbone.patch_size
        if known is None or tuple(cells.shape[1:]) != known.grid or not getattr(self.head, "tokenwise", False):
            return None
        across = [tokens // count for tokens, count in zip(mask.shape[1:], known.grid, strict=True)]
        if any(tokens % step for tokens in across) or not self.meeting.one_to_one:
            return None
        last = mask[:, ::step, ::step].flatten(1)
        count = known.count * (across[0] // step) * (across[1] // step)
        # Asked of the device without waiting for it: hidden tokens that are not taken would silently be no part of the loss.
        torch._assert_async((last.sum(1) <= count).all(), f"mask: more than {known.count} of {known.grid} cells are hidden")
        return last.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]

    def _compute_dtype(self) -> torch.dtype:
        # The dtype of a parameter is right under ZeRO-3 too, where its shape is not. Autocast casts by itself.
        return self.mask_token.token.dtype

    def _drop_path(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        rates = getattr(self.backbone, "drop_path_rates", ())
        if not self.training or "position" not in batch or not any(rate > 0 for rate in rates):
            return None
        return sample_drop_path(rates, self.seed, batch["position"])


def build_simmim(
    model: ModelConfig,
    objective: ObjectiveConfig,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    attention: str = "auto",
    masked_loss: str = "auto",
    hidden_cells: HiddenCells | None = None,
    initialise: bool = True,
) -> SimMIM:
    """Build SimMIM from its sections and initialise every parameter from `seed`.

    Args:
        model: the backbone.
        objective: head and target.
        mean, std: one value per channel, as shares of 255.
        seed: of the weights and of drop path.
        attention, masked_loss: implementations of window attention and of the masked loss.
        hidden_cells: what every mask of training hides, see `SimMIM`.
        initialise: False leaves every parameter as constructed: to count it on the meta device, or to load weights.

    Raises:
        ValueError: an unknown head or target, a mean of the wrong length, or a backbone that lacks what SimMIM needs.
    """
    if not len(mean) == len(std) == model.in_chans:
        raise ValueError(
            f"data.mean and data.std: one value per input channel ({model.in_chans}), got {len(mean)} and {len(std)}."
        )
    with torch.random.fork_rng(devices=[]):  # a backbone of one's own may draw its weights from the global generator
        torch.manual_seed(seed)
        backbone = build_backbone(model, attention=attention, seed=None)
    missing = [name for name in BACKBONE_API if not hasattr(backbone, name)]
    if missing:
        raise ValueError(f"model.name: {model.name} builds a backbone without {', '.join(missing)}. Add what SimMIM calls.")
    norm = PixelNorm(tuple(mean), tuple(std))
    context = TargetContext(model.in_chans, model.image_size, backbone.stride, norm, objective, masked_loss)
    target = lookup(TARGETS, objective.target, setting="objective.target")(context)
    meeting = meet(stride=backbone.stride, scale=target.scale, grid=target.grid)
    factory = lookup(HEADS, objective.head, setting="objective.head")
    options = dict(objective.head_options)
    if "attention" in inspect.signature(factory).parameters:
        options["attention"] = attention
    head = factory(num_features=backbone.num_features, stride=meeting.patch, channels=target.channels, **options)
    module = SimMIM(backbone=backbone, head=head, target=target, mean=mean, std=std, seed=seed, hidden_cells=hidden_cells)
    if initialise:
        module.init_weights(torch.Generator().manual_seed(seed))
    return module
