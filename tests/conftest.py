"""What holds for every test: shapes are checked, one thread per process, no accidental use of a GPU or of the network.

Environment variables are set before torch or DeepSpeed are imported anywhere, so that processes started by tests inherit them.
"""

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

# Two cores are the smallest machine the tests run on, and several processes run at once.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
for _variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_variable, None)

import jaxtyping  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Annotated shapes are checked at every call of these packages. Triton compiles its kernels from their source, which the checks'
# decorators would hide, so modules of that name are left alone.
CHECKED_PACKAGES = ["simmim_scale.data", "simmim_scale.kernels", "simmim_scale.models", "simmim_scale.objectives"]


def _check_shapes() -> None:
    hook = install_import_hook(CHECKED_PACKAGES, "beartype.beartype").hook
    chosen = hook.should_instrument
    hook.should_instrument = lambda name: chosen(name) and not name.rpartition(".")[2].startswith("triton")


_check_shapes()

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# No deadline for single cases: other processes of the test run may take the cores at any moment.
settings.register_profile("shared-cores", deadline=None)
settings.load_profile("shared-cores")

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Tests that stay in one xdist worker, one after another, by their files: those that start ranks, that share a Debian root, and
# that compile or interpret kernels, of which two at once would only slow each other down. (pytest-xdist 3.8's own marker,
# xdist_group, is without effect under pytest 9.2, which keeps the ids of tests elsewhere.)
GROUPS = {
    "tests/multiprocess/*": "processes",
    "tests/launch/*": "processes",
    "tests/docker/test_debian_root.py": "debian_root",
    "tests/kernels/test_*_triton.py": "interpreter",
    "tests/engine/test_compilation.py": "compiler",
}


def group_of(nodeid: str) -> str:
    """The group of a test; one that is in none is a group of its own."""
    file = nodeid.partition("::")[0]
    return next((group for pattern, group in GROUPS.items() if fnmatch(file, pattern)), nodeid)


@pytest.hookimpl(tryfirst=True)  # before xdist chooses
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest -n 2` keeps groups together like `make test`: no two ranks' tests at once, one Debian root and not one a worker."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadgroup"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's scheduler of groups, with ours."""
    from xdist.scheduler import LoadGroupScheduling

    class GroupScheduling(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return GroupScheduling(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, this machine has none")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository: for tests that run commands as a person would."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed: tests never draw from the global one."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def shapes_unchecked() -> Iterator[None]:
    """For tests of torch.compile: it would trace the shape checks too, and compile anew for every shape that they saw."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
