"""The rig of two hosts, built once for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.launch.rig import Rig, why_not


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    built = Rig(tmp_path_factory.mktemp("rig"))
    try:
        built.build()
        yield built
    finally:
        built.remove()
