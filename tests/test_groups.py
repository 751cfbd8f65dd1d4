"""Tests that share a machine's only sshd, ports or cores stay in one worker, however pytest was started."""

from types import SimpleNamespace

import pytest

from tests.conftest import pytest_cmdline_main


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
