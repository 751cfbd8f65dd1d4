"""What DeepSpeed's launcher starts for each rank: a front that it may kill, and a detached keeper that owns the rank."""

import os
import socket
import sys

from launch.front import watch
from launch.keeper import Keeper
from launch.settings import RankSettings


def main() -> int:
    settings = RankSettings.parse(sys.argv[1:])
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        os._exit(_detach(settings, theirs))
    theirs.close()
    os.waitpid(child, 0)
    return watch(ours)


def _detach(settings: RankSettings, front: socket.socket) -> int:
    """Forks once more and ends, so that the keeper is nobody's child in the tree that DeepSpeed's launcher walks."""
    os.setsid()
    if os.fork():
        return 0
    try:
        Keeper(settings, front).run()
    except BaseException:  # noqa: BLE001 - unwinding further would run the front's code in this forked copy
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
