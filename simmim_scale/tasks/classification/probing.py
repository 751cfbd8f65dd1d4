"""Probing as a validation of the training loop, and as what `simmim probe` runs: labelled batches in, figures out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from simmim_scale.config.schema import Config, ProbeConfig
from simmim_scale.data.classification import build_labelled_validation_loader, class_names
from simmim_scale.data.loader import ValidationLoader
from simmim_scale.data.remote_index import open_index
from simmim_scale.data.shards import ShardIndex
from simmim_scale.objectives.features import PROBE
from simmim_scale.tasks.classification.probes import FIT, TEST, ProbeEvaluator
from simmim_scale.tasks.classification.task import check_same_classes, tested_view


@dataclass(frozen=True)
class ProbeSets:
    """The labelled shards of a probe."""

    fit: ShardIndex
    test: ShardIndex


def open_probe_sets(config: Config) -> ProbeSets | None:
    """The shards that the probe section names, or None where it names none.

    Raises:
        ValueError: only one of them is named, they have no labels, or other classes.
    """
    probe = config.probe
    if probe.fit is None and probe.test is None:
        return None
    if probe.fit is None or probe.test is None:
        missing = "fit" if probe.fit is None else "test"
        raise ValueError(f"probe.{missing}: both sets are needed, got only the other. Name labelled shards of the same classes.")
    fit, test = open_index(probe.fit, config.data.remote), open_index(probe.test, config.data.remote)
    check_same_classes(class_names(fit, "probe.fit"), class_names(test, "probe.test"), where=f"probe.test: {probe.test}")
    return ProbeSets(fit, test)


@dataclass(frozen=True, kw_only=True)
class Probing:
    """Features of both sets in centre view, and the probes on them."""

    config: Config
    sets: ProbeSets
    micro_batch: int
    rank: int
    world_size: int
    quarantine: Path | None = None

    @property
    def section(self) -> ProbeConfig:
        return self.config.probe

    def batches(self) -> Iterator[Mapping[str, Tensor]]:
        parts = ((FIT, self.sets.fit, self.section.fit_samples), (TEST, self.sets.test, self.section.test_samples))
        for part, index, samples in parts:
            for batch in self._loader(index, samples):
                yield {**batch, PROBE: torch.full_like(batch["label"], part)}

    def evaluators(self, step: int) -> Sequence[ProbeEvaluator]:
        return [ProbeEvaluator(self.section)]

    def pictures(self, step: int) -> dict[str, Image.Image]:
        """Nothing is drawn."""
        return {}

    def _loader(self, index: ShardIndex, samples: int | None) -> ValidationLoader:
        config = self.config
        return build_labelled_validation_loader(
            index,
            data=config.data,
            view=tested_view(config),
            in_chans=config.model.in_chans,
            seed=config.seed,
            samples=samples,
            micro_batch=self.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
            quarantine=self.quarantine,
        )
