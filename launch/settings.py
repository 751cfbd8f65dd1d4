"""What a rank's front and keeper are told on their command line, written by one side and read by the other."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """How to run one rank; the same for every rank of a node."""

    socket: str  # where the supervisor listens
    log_dir: str  # each rank appends everything it writes to a file here
    grace: float  # seconds from the request to stop until a rank is killed, if nobody is left to decide
    node: str = ""  # name of this node, where there are several
    program: tuple[str, ...]  # what follows `python -u`: a script, or -m and a module, and its arguments

    def arguments(self) -> list[str]:
        own = [f"--socket={self.socket}", f"--log-dir={self.log_dir}", f"--grace={self.grace}", f"--host={self.node}"]
        return [*own, "--", *self.program]

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Self:
        parser = argparse.ArgumentParser(prog="python -m launch.rank", description="Started by `python -m launch`, not by hand.")
        parser.add_argument("--socket", required=True)
        parser.add_argument("--log-dir", required=True)
        parser.add_argument("--grace", type=float, required=True)
        parser.add_argument("--host", default="")
        cut = list(arguments).index("--") if "--" in arguments else len(arguments)
        known = parser.parse_args(arguments[:cut])
        program = tuple(arguments[cut + 1 :])
        return cls(socket=known.socket, log_dir=known.log_dir, grace=known.grace, node=known.host, program=program)
