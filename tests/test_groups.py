"""Tests that share a machine's only sshd, ports or cores stay in one worker, however pytest was started."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.conftest import GROUPS, group_of, pytest_cmdline_main


@pytest.mark.parametrize(
    ("workers", "asked", "chosen"), [(2, "no", "loadgroup"), (2, "loadfile", "loadfile"), (None, "no", "no"), (0, "no", "no")]
)
def test_workers_keep_groups_together_unless_somebody_chose(workers, asked, chosen):
    config = SimpleNamespace(option=SimpleNamespace(numprocesses=workers, dist=asked))
    pytest_cmdline_main(config)
    assert config.option.dist == chosen


def test_without_xdist_nothing_is_chosen():
    option = SimpleNamespace()
    pytest_cmdline_main(SimpleNamespace(option=option))
    assert not vars(option)


def test_tests_of_a_group_run_in_one_worker(repository):
    command = [sys.executable, "-m", "pytest", "-v", "-n", "2", "tests/launch/test_hostfile.py", "tests/launch/test_outcome.py"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    workers = re.findall(r"^\[(gw\d)\] .* PASSED tests/launch/(\w+)", result.stdout, re.MULTILINE)
    assert {file for _, file in workers} == {"test_hostfile", "test_outcome"}, result.stdout + result.stderr
    assert len({worker for worker, _ in workers}) == 1


def test_groups_are_those_of_existing_files(repository):
    for pattern, group in GROUPS.items():
        files = list(repository.glob(pattern))
        assert files, pattern
        assert all(group_of(f"{file.relative_to(repository)}::test_it[a::b]") == group for file in files)
    assert group_of("tests/test_groups.py::test_it[x]") == "tests/test_groups.py::test_it[x]"
