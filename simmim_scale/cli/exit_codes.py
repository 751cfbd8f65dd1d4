"""How a `simmim` command ends, as the number that a shell, a launcher or a scheduler sees."""

import contextlib
import os
import sys
from collections.abc import Iterator

FINISHED = 0
FAILED = 1  # an unexpected error; Python's own code for an uncaught exception
USER_ERROR = 2  # wrong input, found before any work
NONFINITE = 3  # training stopped: loss or gradients stayed non-finite, or the fp16 loss scale hit its floor
NO_DATA = 4  # training stopped: samples could not be read, from a disk, a server or the network; what was trained is saved
PREEMPTED = 75  # asked to stop, everything is saved: run the same command again (EX_TEMPFAIL of sysexits.h)


@contextlib.contextmanager
def user_errors(*, quiet: bool = False) -> Iterator[None]:
    """Turns a ValueError into one clear message and exit code 2.

    Args:
        quiet: end with the code alone, for ranks whose main rank says the same.

    SIMMIM_TRACEBACK=1 in the environment shows where the error came from.
    """
    try:
        yield
    except ValueError as error:
        if os.environ.get("SIMMIM_TRACEBACK") == "1":
            raise
        if not quiet:
            sys.stderr.write(f"error: {error}\n")
            sys.stderr.flush()
        raise SystemExit(USER_ERROR) from None
