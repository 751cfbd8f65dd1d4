"""The two sides of `simmim bench step`: a training step of this project's engine, and one of the published formulation.

Both hold the same weights, see the same images under the same masks, and do the same update (clipped AdamW).
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from simmim_scale.bench.published import PublishedSimMIM, check_published
from simmim_scale.config.schema import Config
from simmim_scale.data.masks import sample_mask
from simmim_scale.engine.engine import Engine, LaunchedStep, build_engine
from simmim_scale.engine.optim import parameter_groups
from simmim_scale.engine.runtime import Runtime
from simmim_scale.models.norms import use_norm_kernels
from simmim_scale.tasks.pretrain import build_module

LEARNING_RATE = 1e-4  # any: it costs nothing, and the losses of both sides move alike
OURS, REFERENCE = "simmim_scale", "reference"


class Side(Protocol):
    """Something that trains."""

    def run(self, steps: int) -> float:
        """Do so many steps and wait for the last one; its loss."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Inputs:
    """One batch in both forms: as our loader gives it, and as the published one does."""

    ours: dict[str, Tensor]
    image: Tensor
    mask: Tensor


def make_inputs(config: Config, batch: int, device: torch.device) -> Inputs:
    """Random images and masks of the configured kind, the same at every call."""
    height, width = config.model.image_size
    grid = (height // config.mask.cell, width // config.mask.cell)
    rng = np.random.Generator(np.random.PCG64(config.seed))
    masks = np.stack([sample_mask(rng, grid=grid, ratio=config.mask.ratio, sampler=config.mask.sampler) for _ in range(batch)])
    pixels = torch.from_numpy(rng.integers(0, 256, (batch, config.model.in_chans, height, width), dtype=np.uint8)).to(device)
    mask = torch.from_numpy(masks).to(device)
    shape = (1, -1, 1, 1)
    mean, std = (torch.tensor(values, device=device).view(shape) for values in (config.data.mean, config.data.std))
    patches = config.mask.cell // config.model.patch_size
    hidden = mask.repeat_interleave(patches, 1).repeat_interleave(patches, 2).float()
    ours = {"image": pixels, "mask": mask, "position": torch.arange(batch, device=device)}
    return Inputs(ours=ours, image=(pixels / 255 - mean) / std, mask=hidden)


def build_side(name: str, config: Config, batch: int, runtime: Runtime, *, checkpointed: bool = False) -> Side:
    """OURS or REFERENCE, with the weights of the config's seed."""
    inputs = make_inputs(config, batch, runtime.device)
    return OurSide(config, inputs, runtime) if name == OURS else ReferenceSide(config, inputs, runtime, checkpointed=checkpointed)


class OurSide:
    """The configured engine, module and kernels, one rank, one micro-batch a step."""

    def __init__(self, config: Config, inputs: Inputs, runtime: Runtime) -> None:
        batch = inputs.mask.shape[0]
        self._batch = inputs.ours
        self.engine: Engine = build_engine(
            lambda: _build(config),
            engine=config.engine,
            optimizer=config.optimizer,
            lr=lambda step: LEARNING_RATE,
            micro_batch=batch,
            accumulation=1,
            global_batch=batch,
            runtime=runtime,
            seed=config.seed,
            adamw=config.kernels.optimizer,
            extra=config.deepspeed,
        )

    def run(self, steps: int) -> float:
        before: LaunchedStep | None = None
        for _ in range(steps):
            launched = self.engine.launch_step([self._batch])
            if before is not None:
                self.engine.finish_step(before)  # a step late, as the loop reads on a GPU
            before = launched
        assert before is not None
        return self.engine.finish_step(before).loss

    def close(self) -> None:
        self.engine.destroy()


def check_reference(config: Config) -> None:
    """Raise ValueError where the published formulation has no counterpart of the configured step."""
    check_published(config)
    if config.engine.precision == "fp16":
        raise ValueError("--against reference: compares fp32 and bf16, got engine.precision fp16. Choose one of these.")
    drop_path = getattr(config.model, "drop_path", 0.0)
    if drop_path:
        raise ValueError(
            f"--against reference: compares without drop path, got model.drop_path {drop_path}."
            " Add model.drop_path=0 (it changes no shapes)."
        )


class ReferenceSide:
    """The published loop around the published formulation: zero, forward, backward, clip, update, read the loss."""

    def __init__(self, config: Config, inputs: Inputs, runtime: Runtime, *, checkpointed: bool) -> None:
        self._inputs, self._device, self._clip = inputs, runtime.device, config.optimizer.clip_grad
        state = dict(build_module(config).named_parameters())
        self._module: nn.Module = PublishedSimMIM(config, state, checkpointed=checkpointed).to(runtime.device)
        settings = config.optimizer
        groups = parameter_groups(self._module, settings.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=settings.betas, eps=settings.eps)
        self._half = config.engine.precision == "bf16"

    def run(self, steps: int) -> float:
        loss = 0.0
        for _ in range(steps):
            loss = self._step()
        return loss

    def close(self) -> None:
        """Nothing to release."""

    def _step(self) -> float:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._half):
            loss = self._module(self._inputs.image, self._inputs.mask)
        self._optimizer.zero_grad()
        loss.backward()
        with record_function("optimizer"):
            if self._clip is not None:
                nn.utils.clip_grad_norm_(self._module.parameters(), self._clip)
            self._optimizer.step()
        return loss.item()


def _build(config: Config) -> nn.Module:
    module = build_module(config)
    use_norm_kernels(module, config.kernels.norm)
    return module
