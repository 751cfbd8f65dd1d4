"""What goes into an export and what comes out of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from simmim_scale.config.schema import Config, SwinBaseConfig
from simmim_scale.models.weights import load_into
from simmim_scale.tasks.pretrained import Pretrained, assemble

TOLERANCE = 1e-5  # largest difference of an output, as a share of its largest value where that exceeds 1; fp32


@dataclass(frozen=True)
class Source:
    """The model to export: a trained module in eval mode on the CPU, its configuration, its tensors and facts about it.

    Attributes:
        metrics: name -> last value, of the run it is from.
    """

    pretrained: Pretrained
    state: Mapping[str, Tensor]
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        return self.pretrained.module

    @property
    def config(self) -> Config:
        return self.pretrained.config

    @property
    def backbone_state(self) -> dict[str, Tensor]:
        """The backbone's tensors, `backbone.` before each name."""
        return {name: value for name, value in self.state.items() if name.startswith("backbone.")}

    @property
    def has_published_decoder(self) -> bool:
        """Whether this is a pre-training whose head is the published linear one onto pixels, which other programs know."""
        objective, weight = self.config.objective, self.state.get("head.proj.weight")
        if self.config.task != "pretrain" or (objective.head, objective.target) != ("linear", "pixels") or weight is None:
            return False
        return weight.shape[0] == self.config.model.in_chans * self.config.model.stride**2

    def swin(self, to: str) -> SwinBaseConfig:
        """The model section. Raises ValueError for a network of one's own, which no other library has."""
        if not isinstance(self.config.model, SwinBaseConfig):
            raise ValueError(f"--to {to}: only Swin V1 and V2 can be converted, this is {self.config.model.name}. Try --to onnx.")
        return self.config.model

    def known_state(self) -> dict[str, Tensor]:
        """The tensors that other programs have a place for: all, or the backbone's where the head is of another kind."""
        if self.config.task == "classification" or self.has_published_decoder:
            return dict(self.state)
        return self.backbone_state

    def rebuilt(self, attention: str) -> nn.Module:
        """The same module around another implementation of window attention."""
        module = assemble(self.config, self.state, attention=attention)
        load_into(module, self.state, source="the weights to export")
        return module.eval()

    def picture(self, batch: int = 2) -> Tensor:
        """Random normalised pictures, (batch, channels, h, w) fp32; always the same ones."""
        model = self.config.model
        return torch.randn(batch, model.in_chans, *model.image_size, generator=torch.Generator().manual_seed(0))

    def mask(self, batch: int = 2) -> Tensor:
        """A random mask of tokens, (batch, th, tw) bool; always the same one."""
        height, width = (-(-side // self.config.model.patch_size) for side in self.config.model.image_size)
        return torch.rand(batch, height, width, generator=torch.Generator().manual_seed(1)) < 0.6


@dataclass(frozen=True)
class Written:
    """What a target wrote: how to load it (Markdown, DIR stands for the directory), and what to know about it."""

    usage: str
    notes: list[str]


@dataclass(frozen=True)
class Agreement:
    """Largest difference of one output, as a share of the output's largest value where that exceeds 1."""

    output: str
    difference: float


@dataclass(frozen=True)
class Target:
    """A program to export for.

    Attributes:
        libraries: Python packages that the verification imports.
        install: what installs them.
        write: writes into a directory.
        verify: loads what was written with the library and compares outputs.
    """

    libraries: tuple[str, ...]
    install: str
    write: Callable[[Source, Path], Written]
    verify: Callable[[Source, Path], list[Agreement]]


def compare(output: str, ours: Tensor, theirs: Tensor) -> Agreement:
    """How far two tensors of one output are apart. Raises ValueError for different shapes."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{output}: expected shape {tuple(ours.shape)}, the loaded model gives {tuple(theirs.shape)}.")
    largest = max(1.0, float(ours.abs().max()))
    return Agreement(output, float((ours.double() - theirs.double()).abs().max()) / largest)
