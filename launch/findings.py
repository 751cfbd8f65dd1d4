"""What `python -m launch check` concludes from the answers of the nodes: pure functions from numbers to findings with advice."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from launch.outcome import count
from launch.versions import differences

GIB = 1 << 30
CLOCK_WARNS, CLOCK_FAILS = 1.0, 60.0  # seconds; object stores refuse requests that are some minutes off
DISK_WARNS, DISK_FAILS = 30 * GIB, GIB  # a save of SwinV2-H takes 8 GiB (12 bytes a parameter), and three lie there at times
TMP_FAILS = GIB
SHM_FAILS = 256 << 20  # data workers hand over batches in shared memory; containers often have 64 MiB of it
SLOW_COMPUTE = 1.2  # times the median: one slow device sets the pace of all
SLOW_LINK = 0.5  # times the median
BUSY_GPU = 0.9  # share of its memory that must be free


class Verdict(Enum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Args:
        check: what was looked at.
        verdict: whether training can start.
        found: what was found, with the nodes that it concerns.
        advice: what to do about it; empty if nothing.
    """

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check, Verdict.OK, found)


def warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check, Verdict.WARNING, found, advice)


def failure(check: str, found: str, advice: str) -> Finding:
    return Finding(check, Verdict.FAILED, found, advice)


Answers = Mapping[str, Mapping[str, Any]]  # node name -> its answer


def errors(check: str, answers: Answers, advice: str) -> list[Finding]:
    """A failure for every node that could not answer."""
    return [failure(check, f"{name}: {answer['error']}", advice) for name, answer in answers.items() if "error" in answer]


def good(answers: Answers) -> Answers:
    return {name: answer for name, answer in answers.items() if "error" not in answer}


def judge_versions(here: Mapping[str, str], versions: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    found = []
    for name, there in versions.items():
        for difference in differences(here, there):
            check = "code" if difference.startswith("code ") else "packages"
            advice = "git pull (or copy the checkout) there" if check == "code" else "make setup there, or share one environment"
            found.append(failure(check, f"{name}: {difference}", advice))
    for check in ("code", "packages"):
        if not any(finding.check == check for finding in found):
            what = (
                f"source {here['source']}" if check == "code" else f"torch {here.get('torch')}, deepspeed {here.get('deepspeed')}"
            )
            found.append(ok(check, f"the same on {count(len(versions), 'node')}: {what}"))
    return found


def judge_gpus(answers: Answers, slots: Mapping[str, Sequence[int]]) -> list[Finding]:
    found = errors("GPUs", answers, "Try `python -c 'import torch; torch.cuda.init()'` there.")
    known = good(answers)
    without = [name for name, answer in known.items() if not answer["gpus"]]
    if len(without) == len(known):
        return [*found, ok("GPUs", "none on any node: ranks run on the CPU")]
    for name in without:
        advice = "Repair its driver, or leave it out: --exclude " + name
        found.append(failure("GPUs", f"{name}: no GPU, others have some", advice))
    kinds = Counter((gpu["name"], round(gpu["total"] / GIB)) for answer in known.values() for gpu in answer["gpus"])
    usual = kinds.most_common(1)[0][0]
    for name, answer in known.items():
        if answer["gpus"]:
            found += _judge_node_gpus(name, answer, slots[name], usual)
    if not found:
        total = sum(kinds.values())
        found.append(ok("GPUs", f"{total} x {usual[0]}, {usual[1]} GiB, CUDA {_cuda(known)}"))
    return found


def _judge_node_gpus(name: str, answer: Mapping[str, Any], slots: Sequence[int], usual: tuple[str, int]) -> list[Finding]:
    found = []
    if answer["count"] <= max(slots):
        text = f"{name}: {count(answer['count'], 'GPU')}, the hostfile wants slot {max(slots)}"
        advice = f"Write slots={answer['count']}, or find the missing one (nvidia-smi)."
        found.append(failure("GPUs", text, advice))
    for gpu in answer["gpus"]:
        kind = (gpu["name"], round(gpu["total"] / GIB))
        if kind != usual:
            text = f"{name}:{gpu['slot']}: {kind[0]}, {kind[1]} GiB; most are {usual[0]}, {usual[1]} GiB"
            advice = "The smallest memory and the slowest device set the pace of all."
            found.append(warning("GPUs", text, advice))
        if gpu["free"] < BUSY_GPU * gpu["total"]:
            text = f"{name}:{gpu['slot']}: {gpu['free'] / GIB:.1f} of {kind[1]} GiB free"
            found.append(warning("GPUs", text, "Somebody else uses it: nvidia-smi shows who."))
    return found


def _cuda(answers: Answers) -> str:
    return ", ".join(sorted({str(answer.get("cuda")) for answer in answers.values()}))


def judge_apex(answers: Answers, *, on_gpu: bool) -> list[Finding]:
    found = errors("apex", answers, "")
    kinds = {name: answer["kind"] for name, answer in good(answers).items()}
    for name, kind in kinds.items():
        if kind == "other":
            text = f"{name}: {answers[name]['place']} is PyPI's apex, which is not NVIDIA's"
            advice = "pip uninstall apex, then build github.com/NVIDIA/apex, or do without: Triton and PyTorch do its work."
            found.append(failure("apex", text, advice))
        elif kind == "nvidia" and on_gpu and not answers[name]["extensions"]:
            advice = "Build it with --cpp_ext --cuda_ext, or uninstall it."
            text = f"{name}: NVIDIA's, built without its CUDA extensions"
            found.append(warning("apex", text, advice))
    if not found and len(set(kinds.values())) > 1:
        advice = "Install the same on all: ranks must compute alike."
        found.append(failure("apex", f"differs: {_listed(kinds)}", advice))
    if not found:
        kind = next(iter(kinds.values()), "none")
        words = {"none": "not installed: Triton or PyTorch do its work", "nvidia": "NVIDIA's"}[kind]
        found.append(ok("apex", words))
    return found


def judge_clocks(skews: Mapping[str, float]) -> list[Finding]:
    """Args:
    skews: seconds by which each node's clock is ahead of this one.
    """
    advice = "Synchronise it: chronyc makestep, or timedatectl set-ntp true. Logs are merged by time, object stores check it."
    found = []
    for name, skew in skews.items():
        if abs(skew) > CLOCK_WARNS:
            verdict = Verdict.FAILED if abs(skew) > CLOCK_FAILS else Verdict.WARNING
            found.append(Finding("clock", verdict, f"{name}: {skew:+.1f} s", advice))
    if not found:
        most = max((abs(skew) for skew in skews.values()), default=0.0)
        found.append(ok("clock", f"at most {most:.2f} s apart"))
    return found


def judge_disks(answers: Answers) -> list[Finding]:
    found = errors("disk", answers, "")
    for name, answer in good(answers).items():
        free = answer["free"]
        if not answer["writable"]:
            text = f"{name}: {answer['place']} cannot be written to"
            found.append(failure("disk", text, "Choose another run_dir, or its owner."))
        rules = (
            ("run_dir", DISK_FAILS, Verdict.FAILED, f"run directory ({answer['place']})", "Make room: no save would fit."),
            (
                "run_dir",
                DISK_WARNS,
                Verdict.WARNING,
                f"run directory ({answer['place']})",
                "A save of SwinV2-H takes about 8 GiB.",
            ),
            ("tmp", TMP_FAILS, Verdict.FAILED, "temporary files", "Make room, or set TMPDIR."),
            ("shm", SHM_FAILS, Verdict.FAILED, "/dev/shm", "Data workers need it: docker run --ipc=host, or --shm-size=8g."),
        )
        seen = set()
        for place, least, verdict, words, advice in rules:
            if place in free and free[place] < least and place not in seen:
                seen.add(place)
                text = f"{name}: {free[place] / GIB:.2f} GiB free for {words}"
                found.append(Finding("disk", verdict, text, advice))
    if not found:
        least = min(answer["free"]["run_dir"] for answer in answers.values())
        found.append(ok("disk", f"at least {least / GIB:.0f} GiB free for the run directory"))
    return found


def judge_sharing(run_dir: str, written: str | None, answers: Answers) -> list[Finding]:
    """Args:
    written: what the first node wrote; None if it could not.
    answers: what the other nodes read.
    """
    blind = [name for name, answer in answers.items() if written is None or answer.get("content") != written]
    if not blind and written is not None:
        return [ok("run directory", f"{run_dir}: the same on {count(len(answers) + 1, 'node')}")]
    advice = "Mount the same file system (NFS, Lustre, ...) there, or choose a run_dir on one: all ranks save into it."
    return [
        failure(
            "run directory",
            f"{name}: does not see what the first node wrote to {run_dir}",
            advice,
        )
        for name in blind
    ]


def judge_data(answers: Answers, urls: Sequence[str]) -> list[Finding]:
    found = errors("data", answers, "")
    found += [ok("data", f"{url}: a URL, read by every node itself; not tried here") for url in urls]
    known = good(answers)
    for directory in dict.fromkeys(place for answer in known.values() for place in answer):
        seen = {name: answer[directory] for name, answer in known.items()}
        wrong = {name: one["error"] for name, one in seen.items() if "error" in one}
        advice = "Copy or mount the set there, at the same path."
        found += [failure("data", f"{name}: {text}", advice) for name, text in wrong.items()]
        digests = {name: one["digest"] for name, one in seen.items() if "digest" in one}
        if len(set(digests.values())) > 1:
            text = f"{directory} differs: {_listed(digests)}"
            found.append(failure("data", text, "Ranks would read different samples. " + advice))
        elif not wrong and digests:
            samples = next(iter(seen.values()))["samples"]
            text = f"{directory}: {samples:,} samples, the same on {count(len(digests), 'node')}"
            found.append(ok("data", text))
    return found


def judge_compute(answers: Answers) -> list[Finding]:
    found = errors("compute", answers, "Try a matrix product there by hand.")
    seconds = {f"{name} {device}": value for name, answer in good(answers).items() for device, value in answer["seconds"].items()}
    if not seconds:
        return found
    usual = statistics.median_low(list(seconds.values()))
    slow = {name: value for name, value in seconds.items() if value > SLOW_COMPUTE * usual}
    advice = "It sets the pace of all. Look for other jobs (nvidia-smi, top), heat and power caps (nvidia-smi -q -d PERFORMANCE)."
    for name, value in slow.items():
        text = f"{name}: {1e3 * value:.1f} ms for a matrix product, {value / usual:.1f} times the median"
        found.append(warning("compute", text, advice))
    if not slow:
        found.append(ok("compute", f"{count(len(seconds), 'device')}, {1e3 * usual:.1f} ms for a matrix product"))
    return found


def judge_links(results: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[Finding]:
    """Args:
    results: for each pair of nodes `bytes_per_second` and `backend`, or an `error`.
    """
    advice = "Name the card to use: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME (see ip addr); NCCL_DEBUG=INFO says more."
    found = [
        failure("network", f"{one} - {two}: {answer['error']}", advice)
        for (one, two), answer in results.items()
        if "error" in answer
    ]
    speeds = {pair: answer["bytes_per_second"] for pair, answer in results.items() if "error" not in answer}
    if not speeds:
        return found
    usual = statistics.median(speeds.values())
    slow = {pair: speed for pair, speed in speeds.items() if speed < SLOW_LINK * usual}
    for (one, two), speed in slow.items():
        text = f"{one} - {two}: {speed / 1e9:.2f} GB/s, the median is {usual / 1e9:.2f}"
        named = "Look at the cable, the port of the switch, and ethtool or ibstat on both."
        found.append(warning("network", text, named))
    if not slow and not found:
        backend = next(answer["backend"] for answer in results.values() if "backend" in answer)
        low, high = min(speeds.values()) / 1e9, max(speeds.values()) / 1e9
        text = f"{count(len(speeds), 'pair')}, {low:.2f} to {high:.2f} GB/s all-reduce over {backend}"
        found.append(ok("network", text))
    return found


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())
