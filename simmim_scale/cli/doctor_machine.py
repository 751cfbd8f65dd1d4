"""What `simmim doctor` looks at without computing: packages, devices, compilers, limits, disks, tools for several nodes."""

import os
import platform
import re
import resource
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from simmim_scale.cli.doctor import Row, Wanted
from simmim_scale.reports.records import GIB

DISTRIBUTION = "simmim-scale"
PYTHONS = ((3, 11), (3, 14))  # first supported, first not supported
OPEN_FILES = 4096  # descriptors: a rank keeps its shards mapped, its workers' pipes and NCCL's sockets open
SHARED_MEMORY_GIB = 1.0  # batches travel from the workers to the rank through it; a container has 64 MB unless told otherwise
# Parts of Apex that an op uses, and the compiled modules that they load.
APEX_PARTS = {"normalization": "fused_layer_norm_cuda", "optimizers": "amp_C"}
FREE_DISK_GIB = 20.0  # one save of SwinV2-H is about 8 GB, and the new one is complete before the old one goes


def check_python(_: Wanted) -> Iterator[Row]:
    """The interpreter, and the headers with which Triton and DeepSpeed compile for it."""
    low, high = PYTHONS
    inside = low <= sys.version_info[:2] < high
    yield Row(
        "python",
        "ok" if inside else "fail",
        platform.python_version(),
        "" if inside else f"Use Python {low[0]}.{low[1]} or newer, below {high[0]}.{high[1]}.",
    )
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler and header.is_file():
        yield Row("C compiler", "ok", compiler)
    else:
        missing = "no C compiler" if not compiler else f"no {header}"
        advice = "Install gcc and the headers of this Python (Debian: apt install gcc python3-dev): Triton compiles its launcher."
        yield Row("C compiler", "note", missing, advice)


def check_packages(_: Wanted) -> Iterator[Row]:
    """Every package that the project needs, in the version that it needs."""
    required = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    core = [requirement for requirement in required if requirement.marker is None or requirement.marker.evaluate({"extra": ""})]
    wrong = [text for text in map(_fault, core) if text]
    if wrong:
        yield Row("packages", "fail", "; ".join(wrong), "Install again: pip install -c constraints.txt -e .")
    else:
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed", "timm", "webdataset"))
        yield Row("packages", "ok", f"{len(core)} as required: {versions}")


def check_devices(wanted: Wanted) -> Iterator[Row]:
    """GPUs, their memory and precision, and whether PyTorch was built for them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < wanted.gpus:
        advice = "Check nvidia-smi, CUDA_VISIBLE_DEVICES, and that the container was started with GPUs (docker run --gpus all)."
        yield Row("GPUs", "fail", f"{count} visible, {wanted.gpus} expected", advice)
    elif not count:
        advice = "Fine for trying things; SwinV2-B and larger need a GPU."
        yield Row("GPUs", "note", f"none; {torch.get_num_threads()} CPU threads", advice)
    for index in range(count):
        yield _device_row(index)


def check_compiled_parts(wanted: Wanted) -> Iterator[Row]:
    """NVIDIA Apex, and the engine's extensions: built already, or compiled at the first use."""
    from simmim_scale.kernels import apex

    reasons = [apex.unavailable(part, extension) for part, extension in APEX_PARTS.items()]
    reason = next((text for text in reasons if text is not None), None)
    advice = "" if reason is None else "Optional: the same ops run on Triton or PyTorch. docker/install/apex.sh builds it."
    yield Row("apex", "ok" if reason is None else "fail" if wanted.apex else "note", reason or "NVIDIA Apex", advice)
    from deepspeed.git_version_info import installed_ops

    built = sorted(name for name, there in installed_ops.items() if there)
    if built:
        yield Row("DeepSpeed ops", "ok", f"prebuilt: {', '.join(built)}")
    else:
        advice = "Nothing to do: the derived configuration needs none. Offloading compiles its op at the first start (minutes)."
        yield Row("DeepSpeed ops", "ok" if not wanted.gpus else "note", "none prebuilt", "" if not wanted.gpus else advice)


def check_limits(_: Wanted) -> Iterator[Row]:
    """Open files, shared memory, free disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft >= OPEN_FILES or soft == resource.RLIM_INFINITY
    advice = "" if enough else f"Raise it: ulimit -n {min(hard, 65536)}, or nofile in the container's ulimits."
    yield Row("open files", "ok" if enough else "note", f"limit {soft}", advice)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / GIB
        fits = free >= SHARED_MEMORY_GIB
        advice = "" if fits else "Start the container with --shm-size=16g or --ipc=host, or set data.workers=0."
        yield Row("shared memory", "ok" if fits else "note", f"{free:.1f} GiB free in {shared}", advice)
    free = shutil.disk_usage(Path.cwd()).free / GIB
    fits = free >= FREE_DISK_GIB
    advice = "" if fits else f"Run states of SwinV2-H need {FREE_DISK_GIB:.0f} GiB: put run_dir on a larger disk."
    yield Row("disk", "ok" if fits else "note", f"{free:.0f} GiB free in the working directory", advice)


def check_tools_for_several_nodes(wanted: Wanted) -> Iterator[Row]:
    """ssh and its server, by which a hostfile's nodes are reached."""
    missing = [name for name in ("ssh", "sshd") if not (shutil.which(name) or Path("/usr/sbin", name).exists())]
    if missing:
        advice = "Debian: apt install openssh-client openssh-server. Slurm and Kubernetes start the ranks without ssh."
        yield Row("ssh", "fail" if wanted.nodes else "note", f"missing: {', '.join(missing)}", advice)
    else:
        pdsh = "pdsh too" if shutil.which("pdsh") else "no pdsh, which is not needed"
        yield Row("ssh", "ok", f"client and server; {pdsh}")


CHECKS: tuple[Callable[[Wanted], Iterable[Row]], ...] = (
    check_python,
    check_packages,
    check_devices,
    check_compiled_parts,
    check_limits,
    check_tools_for_several_nodes,
)


def _fault(requirement: Requirement) -> str | None:
    """What is wrong with a requirement here, or None."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    # Local labels such as +cu130 are no part of the comparison.
    plain = re.sub(r"\+.*", "", version)
    fits = requirement.specifier.contains(plain, prereleases=True)
    return None if fits else f"{requirement.name} {version} is not {requirement}"


def _device_row(index: int) -> Row:
    import torch

    properties = torch.cuda.get_device_properties(index)
    major, minor = properties.major, properties.minor
    text = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, compute capability {major}.{minor}"
    built = torch.cuda.get_arch_list()
    newest_built = max((int(re.sub(r"\D", "", name)) for name in built if name.startswith("sm_")), default=0)
    if not any(name in built for name in (f"sm_{major}{minor}", f"compute_{major}{minor}")) and newest_built < 10 * major:
        return Row(f"GPU {index}", "fail", text, f"This PyTorch was built for {', '.join(built)}: install one for this GPU.")
    if major < 8:
        return Row(f"GPU {index}", "note", text, "It has no bf16 arithmetic: set engine.precision=fp16.")
    return Row(f"GPU {index}", "ok", text)
