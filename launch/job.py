"""One start of a run on this node: the command line of DeepSpeed's launcher and the environment it begins with."""

import base64
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.machine import threads_per_rank
from launch.settings import RankSettings

# DeepSpeed's launcher and the ranks' fronts write here what they have to say of themselves: nothing, normally.
LAUNCHER_LOG = "launcher.log"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to start.

    Args:
        program: what follows `python -u` in every rank: a script, or -m and a module, and its arguments.
        devices: the device of each rank, as CUDA_VISIBLE_DEVICES names it.
        on_gpu: whether these are GPUs; if not, they are only counted.
        log_dir: directory of the log files.
        master_port: TCP port at which the ranks meet.
        grace: seconds that ranks get to save once they are asked to stop.
    """

    program: tuple[str, ...]
    devices: tuple[str, ...]
    on_gpu: bool
    log_dir: Path
    master_port: int
    grace: float

    @property
    def ranks(self) -> int:
        return len(self.devices)

    def command(self, socket: str) -> list[str]:
        """DeepSpeed's launcher for one node, which gives each rank its environment and starts `launch.rank` for it.

        It is called without the `deepspeed` runner, which adds nothing on one node and dies of SIGTERM without telling anybody.
        """
        world = base64.urlsafe_b64encode(json.dumps({"localhost": self.devices}).encode()).decode()
        settings = RankSettings(socket=socket, log_dir=str(self.log_dir), grace=self.grace, program=self.program)
        return [
            *(sys.executable, "-u", "-m", "deepspeed.launcher.launch"),
            *(f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={self.master_port}"),
            *("--quiet", "--no_local_rank", "--module", "launch.rank"),
            *settings.arguments(),
        ]

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """What the ranks find besides what DeepSpeed's launcher sets; a person's own settings win."""
        chosen = dict(inherited)
        if not self.on_gpu:
            chosen.setdefault("DS_ACCELERATOR", "cpu")
        chosen.setdefault("OMP_NUM_THREADS", str(threads_per_rank(self.ranks)))
        # Ninja of the virtual environment, which torch looks up by name when it compiles an extension
        own = str(Path(sys.executable).parent)
        if own not in chosen.get("PATH", "").split(os.pathsep):
            chosen["PATH"] = os.pathsep.join(filter(None, [own, chosen.get("PATH")]))
        return chosen
