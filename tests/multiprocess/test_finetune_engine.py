"""Layer decay and averaged weights survive DeepSpeed: every parameter learns at its own rate in stages 0 to 3, on two ranks."""

import json

import pytest

from simmim_scale.models.layer_decay import layer_scales
from tests.multiprocess import finetune_worker as worker
from tests.multiprocess.engine_ranks import run_ranks

CASES = [f"{stage}-{precision}" for stage, precision in worker.CASES]


@pytest.fixture(scope="module")
def found() -> dict:
    output = run_ranks("finetune_worker.py", 2)[0]
    return json.loads(next(line for line in output.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_moves_at_its_own_rate(found, case):
    expected = layer_scales(worker.build(), worker.DECAY)
    assert set(expected.values()) == {0.5**4, 0.5**3, 0.5**2, 0.5, 1.0}, "the model must have all layers for this to show much"
    assert found[case]["rates"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_there_is_one_group_for_each_rate_and_weight_decay(found, case):
    assert found[case]["groups"] == 2 * 5


@pytest.mark.parametrize("case", CASES)
def test_the_averaged_weights_are_those_of_whole_weights_and_go_on_after_a_resume(found, case):
    assert found[case]["ema"] == dict.fromkeys(("average", "weights untouched", "resumed"), True)
