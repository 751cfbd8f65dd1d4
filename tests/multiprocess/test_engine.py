"""The engine on one and two ranks: the same numbers everywhere, bad steps skipped, saves that survive SIGKILL.

Three jobs are started in all; engine_worker.py holds what they run.
"""

import json
import math
import signal

import pytest

from tests.multiprocess import engine_standin as standin
from tests.multiprocess.engine_ranks import finish_ranks, run_ranks, start_ranks

WORKER = "engine_worker.py"
STAGES = ["0", "1", "2", "3"]
CLIP = 0.4  # as in the worker


def results(outputs: list[str]) -> list[dict]:
    """Per rank: scenario name -> what it found."""
    lines = [[line.split(" ", 2) for line in output.splitlines() if line.startswith("RESULT ")] for output in outputs]
    return [{name: json.loads(text) for _, name, text in rank} for rank in lines]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return results(run_ranks(WORKER, 1, str(tmp_path_factory.mktemp("one")), "collectives", "curves", "host_reads", "gathered"))[
        0
    ]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Both ranks' results, and the directory of saves that the job left when it was killed."""
    directory = tmp_path_factory.mktemp("two")
    names = ["collectives", "curves", "nonfinite", "late", "gathered", "gives_up", "disk_full", "saves"]
    outputs = finish_ranks(killed_together(start_ranks(WORKER, 2, str(directory), *names)), expected=-signal.SIGKILL)
    return results(outputs), directory


def killed_together(processes):
    """The main rank kills itself inside a save; what waits for it is killed too, as when a node dies."""
    main, other = processes
    try:
        main.wait(timeout=600)
    except Exception:
        main.kill()
        raise
    finally:
        other.kill()
    return processes


@pytest.fixture(scope="module")
def resumed(two_ranks):
    _, directory = two_ranks
    return results(run_ranks(WORKER, 2, str(directory), "resumes", "fp16", "consolidates"))


@pytest.fixture(scope="module")
def reference():
    return standin.reference_losses(20, CLIP)


def test_collectives_tell_every_rank_the_same(one_rank, two_ranks):
    assert one_rank["collectives"]["world"] == [0, 1, 0]
    for rank, found in enumerate(two_ranks[0]):
        found = found["collectives"]
        assert found["world"] == [rank, 2, rank]
        assert found["any"] == [True, False]
        assert found["sum"] == 3
        assert found["bounds"] == [0, 1]
        assert found["broadcast"] == {"from": 0}
        assert found["gathered"] == ["rank 0", "rank 1"]
        assert found["memory"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_way_to_cut_the_work_gives_plain_pytorch(one_rank, two_ranks, reference, ranks, stage, accumulation):
    found = (one_rank if ranks == 1 else two_ranks[0][0])["curves"][f"{stage}-{accumulation}"]
    losses, norms = reference
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    assert found["norms"] == pytest.approx(norms, rel=1e-4)
    assert found["lrs"] == [standin.lr_at(step) for step in range(20)]
    assert max(norms) > CLIP, "clipping must matter in this test"


def test_the_full_state_is_whole_and_the_same_in_every_stage(one_rank, two_ranks):
    expected = one_rank["curves"]["0-1"]["weights"]
    assert set(expected) == set(standin.build().state_dict())
    for found in (one_rank, two_ranks[0][0]):
        for curve in found["curves"].values():
            assert curve["weights"] == pytest.approx(expected, rel=1e-4)
            assert curve["shapes"]
    assert all(curve["weights"] == {} for curve in two_ranks[0][1]["curves"].values()), "only the main rank holds the weights"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_step_is_skipped_as_if_it_had_not_been(two_ranks, stage, precision):
    for rank in two_ranks[0]:
        found = rank["nonfinite"][f"{stage}-{precision}"]
        assert found["losses"] == found["clean"]
        assert found["untouched"]
        assert found["skipped"] == [True, True]
        assert found["steps"] == [3, 4]
        assert found["counted"] == 2
        # A NaN image breaks the first module that sees it; an infinite target breaks the loss alone, its gradients are finite.
        assert found["sources"] == ["backbone.blocks.0.fc1", "loss"]


def test_a_launched_step_asks_the_device_only_what_deepspeed_must_know(one_rank):
    found = one_rank["host_reads"]
    assert all(math.isfinite(loss) for loss in found.pop("losses"))
    nothing = {}
    # Whether the norm is finite, once more for each of the two groups that DeepSpeed then clips, and a constant for each of them.
    asked = {"_local_scalar_dense": 3, "lift_fresh": 2}
    assert found == {
        "0-fp32": nothing,
        "1-fp32": asked,
        "2-fp32": asked,
        "3-fp32": {"_local_scalar_dense": 1, "lift_fresh": 2},
        "1-bf16": {"_local_scalar_dense": 2, "lift_fresh": 1},
        "2-bf16": nothing,
        "3-bf16": {"_local_scalar_dense": 1, "lift_fresh": 2},
    }


def test_one_rank_copies_no_gradients_to_sum_them(one_rank, two_ranks):
    assert one_rank["gathered"] == 0
    assert two_ranks[0][0]["gathered"] == len(list(standin.build().parameters()))


@pytest.mark.parametrize("stage", ["2", "3"])
def test_numbers_read_a_step_late_are_the_same(two_ranks, stage):
    for rank in two_ranks[0]:
        found = rank["late"][stage]
        assert found["late"] == found["at_once"]
        assert found["steps"] == [1, 2, 3, 4, 5]
        # Step 4's loss is diagnosed after step 5 moved the parameters: its recorded loss still tells where it broke.
        assert found["sources"] == [None, None, "backbone.blocks.0.fc1", "loss", None]
        assert found["counted"] == 2
        assert found["stop"] == [True] * 5


def test_too_many_bad_steps_in_a_row_stop_with_advice(two_ranks):
    for rank in two_ranks[0]:
        assert rank["gives_up"]["step"] == 6
        assert "3 steps in a row, first in backbone.blocks.0.fc1" in rank["gives_up"]["error"]
        assert "optimizer.base_lr" in rank["gives_up"]["error"]


def test_a_rank_without_disk_space_fails_the_save_on_all_and_leaves_the_older_one(two_ranks):
    for rank in two_ranks[0]:
        found = rank["disk_full"]
        assert "No space left on device" in found["message"]
        assert found["newest"] == 1
        assert found["left"] == ["latest", "step_00000001"]
        assert math.isfinite(found["loss"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_digit_for_digit(two_ranks, resumed, stage):
    uninterrupted = two_ranks[0][0]["saves"][stage]
    for rank in resumed:
        assert rank["resumes"][stage]["client_state"] == {"position": 40}
        assert rank["resumes"][stage]["losses"] == uninterrupted[5:]
        assert rank["resumes"][stage]["skipped_before"] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_files_of_a_save_hold_the_whole_state_key_by_key(resumed, stage, precision):
    assert resumed[0]["consolidates"][f"{stage}-{precision}"] == {"exact": True, "names": "the same"}


def test_the_save_that_was_killed_is_never_seen_and_cleaned_up(resumed):
    assert resumed[0]["resumes"]["3"]["left"] == ["latest", "step_00000010"]


def test_a_wrong_resume_says_what_differs(resumed):
    errors = resumed[0]["resumes"]["errors"]
    assert "head.weight is [12, 12] in the save and [5, 12] in the model" in errors["model"]
    assert "extra.bias is absent in the save and [2] in the model" in errors["model"]
    assert "saved in precision fp32, got bf16" in errors["precision"]


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_lowers_its_scale_and_trains_on(resumed, reference, stage):
    found = resumed[0]["fp16"][stage]
    applied = [step for step, skipped in enumerate(found["skipped"]) if not skipped]
    assert found["skipped"][0], "the scale starts too high for this test to show anything otherwise"
    assert found["scales"][0] == 2.0**24
    assert found["scales"][applied[0]] < found["scales"][0]
    assert max(found["scales"][applied[0] :]) > found["scales"][applied[0]], "it rises again after fp16_scale_window steps"
    assert found["sources"] == [None] * 20
    # The first applied step sees the initial weights, so its norm is known; a scale that is not taken out again would show.
    assert found["norms"][applied[0]] == pytest.approx(_norm_at_start(applied[0]), rel=0.02)
    assert found["losses"][-1] < found["losses"][applied[0]]


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_at_the_floor_stops_with_advice(resumed, stage):
    assert "loss scale of 1" in resumed[0]["fp16"][stage]["floor"]
    assert "bf16" in resumed[0]["fp16"][stage]["floor"]


def _norm_at_start(step: int) -> float:
    module = standin.build()
    module(standin.global_batch(step))["loss"].backward()
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in module.parameters()))
