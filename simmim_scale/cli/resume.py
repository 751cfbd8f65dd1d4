"""What a resumed run goes on from, and what is different from the start that saved it, in a line for the run's header."""

from collections.abc import Mapping
from typing import Any

from simmim_scale.config.plan import Plan
from simmim_scale.config.schema import EngineConfig
from simmim_scale.engine.checkpoint import SavedState

RANKS, STAGE, SPLIT = "ranks", "ZeRO stage", "micro-batch x rounds"


def resume_facts(plan: Plan, engine: EngineConfig) -> dict[str, Any]:
    """What a save says about the start that made it."""
    return {
        "world_size": plan.world_size,
        "zero_stage": engine.zero_stage,
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
    }


def describe_resume(saved: SavedState, plan: Plan, engine: EngineConfig) -> str:
    """Step and sample to go on from; and each of ranks, ZeRO stage and split of the batch that changed, with what stays."""
    place = f"after step {saved.step:,}, at sample {saved.client_state.get('position', plan.position_at(saved.step)):,}"
    changes = _changes(saved.client_state, resume_facts(plan, engine))
    if not changes:
        return f"{place}; nothing changed"
    return f"{place}; changed: {', '.join(changes)}; the global batch stays {plan.global_batch:,}"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    def split(facts: Mapping[str, Any]) -> str | None:
        return f"{facts['micro_batch']} x {facts['accumulation']}" if "accumulation" in facts else None

    rows = [
        (RANKS, before.get("world_size"), now["world_size"]),
        (STAGE, before.get("zero_stage"), now["zero_stage"]),
        (SPLIT, split(before), split(now)),
    ]
    return [f"{what} {was} -> {is_now}" for what, was, is_now in rows if was is not None and was != is_now]
