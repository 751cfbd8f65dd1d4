"""A run that was saved by 2 ranks goes on on 1, and what that saved on 4, each time in another ZeRO stage.

The losses are those of the run that nobody interrupted.
"""

import json

import pytest

from tests.multiprocess.engine_ranks import run_ranks

WORKER = "elastic_worker.py"
CASES = ["fp32-0", "fp32-1", "fp32-2", "fp32-3", "bf16-1", "bf16-3", "fp16-3"]
TOLERANCE = {"fp32": 1e-6, "bf16": 3e-3, "fp16": 3e-3}  # the order of sums differs; low precisions amplify it


def found(outputs: list[str]) -> dict:
    line = next(line for line in outputs[0].splitlines() if line.startswith("RESULT elastic "))
    return json.loads(line.removeprefix("RESULT elastic "))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """What the starts on 2, 1 and 4 ranks found: steps 0-4 (and on to 12, uninterrupted), 4-8, 8-12."""
    directory = str(tmp_path_factory.mktemp("elastic"))
    return [
        found(run_ranks(WORKER, ranks, directory, *map(str, steps))) for ranks, steps in ((2, (0, 4)), (1, (4, 8)), (4, (8, 12)))
    ]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_then_one_then_four_give_the_uninterrupted_losses(chain, case):
    two, one, four = (start[case] for start in chain)
    assert len(two["rest"]) == 8
    assert one["losses"] + four["losses"] == pytest.approx(two["rest"], abs=TOLERANCE[case[:4]])
    if case.startswith("fp32"):
        assert {two["stage"], one["stage"], four["stage"]} == {int(case[-1]), (int(case[-1]) + 1) % 4, (int(case[-1]) + 2) % 4}


@pytest.mark.parametrize("case", CASES)
def test_buffers_go_on_from_where_they_were(chain, case):
    two, one, four = (start[case]["calls"] for start in chain)
    assert [two, one, four] == [4 * 2, 8 + 4 * 4, 24 + 4 * 1], "calls a step: the rounds of accumulation"


def test_the_loss_scale_of_fp16_goes_on(chain):
    scales = [start["fp16-3"]["scale"] for start in chain]
    assert scales[0] == 2.0**14
    assert scales[1] == 2.0**15, "it doubles once in steps 0-4, every 3 steps"
    assert scales[2] > scales[1]
