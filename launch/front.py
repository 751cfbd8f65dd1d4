"""The front of a rank: lives as long as the rank's keeper does, and hands on the signals that DeepSpeed's launcher sends."""

import os
import select
import signal
import socket

from launch.processes import PASSED_ON, die_with_parent, read_signals, watch_signals

DONE = b"."  # the keeper's last word: the rank has ended and the supervisor knows how


def watch(keeper: socket.socket) -> int:
    """Waits for the keeper.

    Returns:
        0 when the keeper did its work, whatever the rank's own code: with any other code DeepSpeed's launcher would begin to kill
        the other ranks. 1 when the keeper itself was killed.
    """
    signals = watch_signals((*PASSED_ON, signal.SIGHUP))
    # The launcher above was killed: stop as if it had asked for it.
    die_with_parent(signal.SIGTERM, parent=os.getppid())
    while True:
        ready, _, _ = select.select([keeper, signals], [], [])
        if signals in ready:
            for number in read_signals(signals):
                _tell(keeper, number)
        if keeper in ready:
            return 0 if _last_word(keeper) == DONE else 1


def _tell(keeper: socket.socket, number: int) -> None:
    try:
        keeper.send(bytes([number]))
    except OSError:
        return  # the keeper is gone, which the next round of the loop sees


def _last_word(keeper: socket.socket) -> bytes:
    try:
        return keeper.recv(1)
    except OSError:
        return b""
