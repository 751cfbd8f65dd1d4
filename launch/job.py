"""One start of a run on one node: the command line of DeepSpeed's launcher (or torchrun) and the environment it begins with."""

import base64
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.machine import threads_per_rank
from launch.settings import RankSettings
from launch.watch import Limits

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
        world: devices of all nodes by name, in the order of ranks; this node's alone if empty.
        node: index of this node among them.
        master_addr: where the ranks meet.
        launcher: deepspeed or torchrun.
        extra_environment: variables that came from another node; they win over this node's own.
        limits: after which silence a rank counts as hung.
    """

    program: tuple[str, ...]
    devices: tuple[str, ...]
    on_gpu: bool
    log_dir: Path
    master_port: int
    grace: float
    world: Mapping[str, Sequence[str]] = field(default_factory=dict)
    node: int = 0
    master_addr: str = "127.0.0.1"
    launcher: str = "deepspeed"
    extra_environment: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)

    @property
    def name(self) -> str:
        """This node's name; empty when it is the only one."""
        return list(self.world)[self.node] if self.world else ""

    @property
    def launcher_log(self) -> Path:
        return self.log_dir / (f"launcher_{self.name}.log" if self.name else LAUNCHER_LOG)

    @property
    def ranks(self) -> int:
        return len(self.devices)

    def command(self, socket: str) -> list[str]:
        """DeepSpeed's launcher for one node, which gives each rank its environment and starts `launch.rank` for it.

        It is called without the `deepspeed` runner, which adds nothing on one node and dies of SIGTERM without telling anybody.
        """
        settings = RankSettings(
            socket=socket, log_dir=str(self.log_dir), grace=self.grace, node=self.name, program=self.program
        ).arguments()
        if self.launcher == "torchrun":
            return [sys.executable, "-u", "-m", "torch.distributed.run", *self._torchrun(), "-m", "launch.rank", *settings]
        devices = {name: list(theirs) for name, theirs in self.world.items()} or {"localhost": list(self.devices)}
        world = base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()
        return [
            *(sys.executable, "-u", "-m", "deepspeed.launcher.launch"),
            *(f"--world_info={world}", f"--node_rank={self.node}"),
            *(f"--master_addr={self.master_addr}", f"--master_port={self.master_port}"),
            *("--quiet", "--no_local_rank", "--module", "launch.rank"),
            *settings,
        ]

    def _torchrun(self) -> list[str]:
        """The static rendezvous: every node's place is known, so the order of ranks is that of the hostfile."""
        return [
            *(f"--nnodes={max(1, len(self.world))}", f"--node-rank={self.node}", f"--nproc-per-node={self.ranks}"),
            *("--rdzv-backend=static", f"--master-addr={self.master_addr}", f"--master-port={self.master_port}"),
            "--max-restarts=0",  # restarts are the supervisor's: torchrun's would go on before the others have stopped
        ]

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """What the ranks find besides what DeepSpeed's launcher sets; a person's own settings win."""
        chosen = {**inherited, **self.extra_environment}
        if self.launcher == "torchrun" and self.on_gpu:
            chosen["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices)  # DeepSpeed's launcher sets it by itself
        if not self.on_gpu:
            chosen.setdefault("DS_ACCELERATOR", "cpu")
        chosen.setdefault("OMP_NUM_THREADS", str(threads_per_rank(self.ranks)))
        # Ninja of the virtual environment, which torch looks up by name when it compiles an extension
        own = str(Path(sys.executable).parent)
        if own not in chosen.get("PATH", "").split(os.pathsep):
            chosen["PATH"] = os.pathsep.join(filter(None, [own, chosen.get("PATH")]))
        return chosen
