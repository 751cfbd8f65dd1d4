"""What the check concludes from the nodes' answers."""

import itertools

import pytest

from launch.check import make_table, pairs_by_round
from launch.findings import (
    GIB,
    Finding,
    Verdict,
    judge_apex,
    judge_clocks,
    judge_compute,
    judge_data,
    judge_disks,
    judge_gpus,
    judge_links,
    judge_sharing,
    judge_versions,
)

H100 = {"name": "NVIDIA H100", "total": 80 * GIB, "free": 79 * GIB}


def gpus(*found: dict) -> dict:
    return {"gpus": [{"slot": slot, **gpu} for slot, gpu in enumerate(found)], "count": len(found), "cuda": "12.8"}


def only(findings: list[Finding], verdict: Verdict) -> Finding:
    (one,) = [finding for finding in findings if finding.verdict is not Verdict.OK]
    assert one.verdict is verdict
    assert one.advice
    return one


def all_ok(findings: list[Finding]) -> bool:
    return bool(findings) and all(finding.verdict is Verdict.OK for finding in findings)


def test_versions():
    here = {"commit": "abc", "source": "1", "torch": "2.14.1", "python": "3.11.7"}
    assert all_ok(judge_versions(here, {"a": here, "b": {**here, "commit": "other name of the same"}}))
    code = only(judge_versions(here, {"a": here, "b": {**here, "source": "2", "commit": "abd-dirty"}}), Verdict.FAILED)
    assert code.found == "b: code abd-dirty (source 2) instead of abc (source 1)"
    packages = only(judge_versions(here, {"a": {**here, "torch": "2.13.0"}}), Verdict.FAILED)
    assert packages.found == "a: torch 2.13.0 instead of 2.14.1"
    missing = only(judge_versions(here, {"a": {name: here[name] for name in here if name != "torch"}}), Verdict.FAILED)
    assert missing.found == "a: torch missing instead of 2.14.1"


def test_gpus():
    slots = {"a": (0, 1), "b": (0, 1)}
    assert all_ok(judge_gpus({"a": gpus(H100, H100), "b": gpus(H100, H100)}, slots))
    assert all_ok(judge_gpus({"a": gpus(), "b": gpus()}, slots))
    assert "b: no GPU" in only(judge_gpus({"a": gpus(H100, H100), "b": gpus()}, slots), Verdict.FAILED).found
    few = only(judge_gpus({"a": gpus(H100, H100), "b": gpus(H100)}, slots), Verdict.FAILED)
    assert few.found == "b: 1 GPU, the hostfile wants slot 1"
    small = {**H100, "name": "NVIDIA A100", "total": 40 * GIB, "free": 40 * GIB}
    other = only(judge_gpus({"a": gpus(H100, H100), "b": gpus(H100, small)}, slots), Verdict.WARNING)
    assert other.found == "b:1: NVIDIA A100, 40 GiB; most are NVIDIA H100, 80 GiB"
    busy = only(judge_gpus({"a": gpus(H100, H100), "b": gpus({**H100, "free": 30 * GIB}, H100)}, slots), Verdict.WARNING)
    assert busy.found == "b:0: 30.0 of 80 GiB free"
    assert (
        "b: broken" in only(judge_gpus({"a": gpus(H100), "b": {"error": "broken"}}, {"a": (0,), "b": (0,)}), Verdict.FAILED).found
    )


def test_apex_of_pypi_is_named():
    fine, other = {"kind": "nvidia", "extensions": True}, {"kind": "other", "place": "/venv/apex"}
    assert all_ok(judge_apex({"a": fine, "b": fine}, on_gpu=True))
    assert all_ok(judge_apex({"a": {"kind": "none"}}, on_gpu=True))
    found = only(judge_apex({"a": fine, "b": other}, on_gpu=True), Verdict.FAILED)
    assert found.found == "b: /venv/apex is PyPI's apex, which is not NVIDIA's"
    assert "pip uninstall apex" in found.advice
    assert "differs" in only(judge_apex({"a": fine, "b": {"kind": "none"}}, on_gpu=True), Verdict.FAILED).found
    bare = {"kind": "nvidia", "extensions": False}
    assert "without its CUDA extensions" in only(judge_apex({"a": bare}, on_gpu=True), Verdict.WARNING).found
    assert all_ok(judge_apex({"a": bare}, on_gpu=False))


def test_clocks():
    assert all_ok(judge_clocks({"a": 0.01, "b": -0.4}))
    assert only(judge_clocks({"a": 0.0, "b": -2.5}), Verdict.WARNING).found == "b: -2.5 s"
    assert only(judge_clocks({"a": 90.0, "b": 0.0}), Verdict.FAILED).found == "a: +90.0 s"


def test_disks():
    plenty = {"run_dir": 500 * GIB, "tmp": 50 * GIB, "shm": 8 * GIB}
    answer = {"free": plenty, "place": "/runs", "writable": True}
    assert all_ok(judge_disks({"a": answer, "b": answer}))
    cases = [("run_dir", GIB // 2, Verdict.FAILED), ("run_dir", 5 * GIB, Verdict.WARNING)]
    cases += [("tmp", GIB // 2, Verdict.FAILED), ("shm", 64 << 20, Verdict.FAILED)]
    for place, free, verdict in cases:
        short = {**answer, "free": {**plenty, place: free}}
        assert only(judge_disks({"a": answer, "b": short}), verdict).found.startswith("b: ")
    assert "cannot be written" in only(judge_disks({"a": {**answer, "writable": False}}), Verdict.FAILED).found


def test_a_run_directory_that_is_not_shared():
    assert all_ok(judge_sharing("/r", "x", {"b": {"content": "x"}}))
    assert (
        "b: does not see" in only(judge_sharing("/r", "x", {"b": {"content": None}, "c": {"content": "x"}}), Verdict.FAILED).found
    )


def test_data():
    good = {"/data": {"digest": "d", "samples": 1000}}
    assert all_ok(judge_data({"a": good, "b": good}, urls=["s3://set"]))
    assert only(judge_data({"a": good, "b": {"/data": {"error": "/data is not there"}}}, []), Verdict.FAILED).found.startswith(
        "b: "
    )
    differs = only(judge_data({"a": good, "b": {"/data": {"digest": "e", "samples": 1}}}, []), Verdict.FAILED)
    assert differs.found == "/data differs: a: d, b: e"


def test_a_straggler_is_named():
    def seconds(*values: float) -> dict:
        return {"seconds": {f"cuda:{slot}": value for slot, value in enumerate(values)}}

    assert all_ok(judge_compute({"a": seconds(0.010, 0.011), "b": seconds(0.010, 0.0105)}))
    slow = only(judge_compute({"a": seconds(0.010, 0.011), "b": seconds(0.010, 0.015)}), Verdict.WARNING)
    assert slow.found == "b cuda:1: 15.0 ms for a matrix product, 1.5 times the median"
    assert "b cpu" in only(judge_compute({"a": {"seconds": {"cpu": 1.0}}, "b": {"seconds": {"cpu": 2.0}}}), Verdict.WARNING).found


def test_links():
    def speed(value: float) -> dict:
        return {"bytes_per_second": value, "backend": "nccl"}

    good = {("a", "b"): speed(10e9), ("a", "c"): speed(11e9), ("b", "c"): speed(10e9)}
    assert all_ok(judge_links(good))
    assert only(judge_links({**good, ("a", "c"): speed(2e9)}), Verdict.WARNING).found == "a - c: 2.00 GB/s, the median is 10.00"
    broken = only(judge_links({**good, ("b", "c"): {"error": "timed out"}}), Verdict.FAILED)
    assert broken.found == "b - c: timed out"
    assert "NCCL_SOCKET_IFNAME" in broken.advice


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 9, 16, 33])
def test_pairs_are_measured_without_a_node_in_two_at_once(count):
    rounds = pairs_by_round(count)
    pairs = list(itertools.chain.from_iterable(rounds))
    for one in rounds:
        nodes = list(itertools.chain.from_iterable(one))
        assert len(set(nodes)) == len(nodes)
    assert len(set(pairs)) == len(pairs)
    assert all(0 <= first < second < count for first, second in pairs)
    if count <= 8:
        assert len(pairs) == count * (count - 1) // 2
    else:
        assert set(itertools.chain.from_iterable(pairs)) == set(range(count))
        assert len(rounds) <= 2 * count.bit_length()


def test_the_table_takes_any_text():
    table = make_table([Finding("x", Verdict.FAILED, "[b] - [/c]: odd", "[red]")])
    assert table.row_count == 1
