"""Activation checkpointing by every back end, and offloading, on two ranks under ZeRO: the bits of the run without them."""

import json

import pytest

from simmim_scale.config.memory import Sharding, state_bytes
from tests.multiprocess.engine_ranks import run_ranks

# selective is PyTorch's alone; stage differs from block in which blocks it takes, which no back end sees.
UNNECESSARY = {("selective", backend) for backend in ("torch_reentrant", "deepspeed", "fairscale")} | {
    ("stage", backend) for backend in ("torch_reentrant", "fairscale")
}
PLAIN = {"zero_stage": 3, "activation_checkpointing": "none"}
POLICIES = [
    {"zero_stage": 3, "activation_checkpointing": policy, "checkpointing_backend": backend}
    for policy in ("block", "stage", "selective", "offload")
    for backend in ("torch", "torch_reentrant", "deepspeed", "fairscale")
    if (policy, backend) not in UNNECESSARY
]
IN_TURN = [
    {"zero_stage": 3, "sequential_attention": 1, "activation_checkpointing": policy} for policy in ("none", "block", "selective")
]
OFFLOADED = [
    {"zero_stage": 2, "offload_optimizer": "cpu"},
    {"zero_stage": 3, "offload_optimizer": "cpu"},
    {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
]


def name(case: dict) -> str:
    return "-".join(map(str, case.values()))


SHARDED = [{"zero_stage": stage, "precision": precision} for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    directory = tmp_path_factory.mktemp("policies")
    cases = directory / "cases.json"
    cases.write_text(json.dumps([PLAIN, *POLICIES, *IN_TURN, *OFFLOADED, *SHARDED]))
    outputs = run_ranks("policies_worker.py", 2, str(directory), str(cases), "swin_v2")
    lines = [line for output in outputs for line in output.splitlines() if line.startswith("RESULT policies ")]
    return [json.loads(line.removeprefix("RESULT policies ")) for line in lines]


@pytest.mark.parametrize("case", POLICIES, ids=name)
def test_every_policy_gives_the_bits_of_none(found, case):
    for rank in found:
        assert rank[name(case)]["losses"] == rank[name(PLAIN)]["losses"]
    assert found[0][name(case)]["weights"] == found[0][name(PLAIN)]["weights"]


def test_selective_computes_no_product_again_under_zero_3_either(found):
    products = {case["activation_checkpointing"]: found[0][name(case)]["products"] for case in [PLAIN, *POLICIES[::-1]]}
    # Attention on a CPU is an op of its own, whose products nobody counts.
    assert products["none"] == products["selective"] < products["stage"] <= products["block"]


@pytest.mark.parametrize("case", IN_TURN, ids=name)
def test_attention_in_turn_trains_the_same(found, case):
    for rank in found:  # only sums of gradients over windows are taken in another order
        assert rank[name(case)]["losses"] == pytest.approx(rank[name(PLAIN)]["losses"], abs=1e-6)
        assert rank[name(case)]["losses"][0] == rank[name(PLAIN)]["losses"][0]


@pytest.mark.parametrize("case", OFFLOADED, ids=name)
def test_offloaded_state_trains_the_same_and_goes_on_from_its_save(found, case):
    rank = found[0][name(case)]
    assert rank["losses"] == pytest.approx(found[0][name(PLAIN)]["losses"], abs=1e-6)
    assert rank["resumed"] == rank["losses"][2:]


@pytest.mark.parametrize("case", SHARDED, ids=name)
def test_a_rank_holds_what_simmim_plan_says(found, case):
    parameters = found[0]["elements"]
    sharding = Sharding(case["zero_stage"], 2, case["precision"] == "bf16")
    planned = state_bytes(parameters, sharding)
    for rank in found:
        assert rank[name(case)]["held"] == pytest.approx(planned["parameters"] + planned["optimizer"], rel=0.15)
