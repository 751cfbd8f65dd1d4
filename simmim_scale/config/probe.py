"""Probes: how well frozen features tell classes apart, while a network is pre-trained or afterwards."""

from pydantic import PositiveInt

from simmim_scale.config.section import Section, setting


class ProbeConfig(Section):
    """k nearest neighbours and a linear classifier on frozen features of labelled shards."""

    fit: str | None = setting(None, "Labelled shards whose features the probes are fitted to; null: no probing while training.")
    test: str | None = setting(None, "Labelled shards of the same classes that the probes are tested on.")
    every_steps: PositiveInt | None = setting(None, "Probe every so many steps; null: at the end only.", unit="steps")
    fit_samples: PositiveInt | None = setting(
        20000, "Fit to at most so many samples, a random choice of the seed; null: all.", unit="samples", source="choice"
    )
    test_samples: PositiveInt | None = setting(
        5000, "Test on at most so many samples; null: all.", unit="samples", source="choice"
    )
    stage: int = setting(-1, "Stage whose pooled map is used, from 0; negative numbers count from the last.", source="choice")
    neighbours: PositiveInt = setting(20, "Neighbours that vote.", unit="samples", source="DINO, arXiv 2104.14294")
    temperature: float = setting(
        0.07, "A neighbour's vote weighs exp(cosine / temperature).", source="DINO, arXiv 2104.14294", gt=0
    )
    linear: bool = setting(True, "Also fit a linear classifier.", source="choice")
