"""How the head starts one process on every node: ssh, pdsh or srun, and what it makes of their complaints.

The remote command carries nothing secret: what the node is to do arrives on its standard input through ssh, and in a file that
only this user may read through pdsh and srun, which pass no input on.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launch.hostfile import Host

LAUNCHERS = ("auto", "pdsh", "ssh", "slurm", "torchrun")
MOST_AT_ONCE = 1024  # nodes that pdsh starts at the same time
SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15")

# What ssh or the remote shell says -> what to do about it
ADVICE = (
    (
        r"Could not resolve hostname|Name or service not known",
        "Correct the name in the hostfile, or give it an address in DNS or ~/.ssh/config.",
    ),
    (r"Permission denied", "Log in without a password must work: ssh-copy-id {host}, then try `ssh {host} true`."),
    (r"Host key verification failed", "Accept its key once: `ssh {host} true`, or add it to known_hosts."),
    (r"Connection refused", "No sshd listens there. Start it, or name its port with --ssh-port."),
    (
        r"timed out|No route to host|unreachable",
        "The node is down or its network is. Leave it out with --exclude {host}, or repair it.",
    ),
    (
        r"can't cd|cd: .*No such|cd: .*not exist",
        "The node must have the same checkout at the same path (a shared file system, or a copy).",
    ),
    (
        r"python\S*: (?:No such file|not found|cannot execute)|exec: .*: not found",
        "The node must have the same virtual environment at the same path.",
    ),
    (r"No module named", "The node's environment lacks it. Install the same packages there: make setup."),
)


@dataclass(frozen=True, kw_only=True)
class Remote:
    """How to reach the nodes and where to start on them.

    Args:
        kind: ssh, pdsh or slurm; local starts on this machine instead.
        ssh_port: port of sshd, None for ssh's own choice.
        directory: working directory on the nodes: this one's.
        python: the interpreter on the nodes: this one's.
    """

    kind: str
    ssh_port: int | None = None
    directory: str = field(default_factory=os.getcwd)
    python: str = field(default=sys.executable)

    @property
    def takes_input(self) -> bool:
        """Whether the order can arrive on standard input."""
        return self.kind in ("ssh", "local")

    def commands(self, hosts: Sequence[Host], module: str, order: str) -> list[tuple[list[str], list[int]]]:
        """What to run here, and the indices of the nodes that each of it starts.

        Args:
            module: what to start on the nodes; its arguments are the node's index and `order`.
            order: path of the file with the order, or - for standard input.
        """
        everyone = list(range(len(hosts)))
        if self.kind == "ssh":
            return [(self._ssh(host.name, self._shell(module, str(index), order)), [index]) for index, host in enumerate(hosts)]
        if self.kind == "local":
            return [(["/bin/sh", "-c", self._shell(module, str(index), order)], [index]) for index in everyone]
        if self.kind == "pdsh":
            return [(self._pdsh(hosts, self._shell(module, "\0", order).replace("%", "%%").replace("\0", "%n")), everyone)]
        return [(self._srun(hosts, self._shell(module, "$SLURM_PROCID", order)), everyone)]

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        chosen = dict(inherited)
        if self.kind == "pdsh":
            chosen["PDSH_RCMD_TYPE"] = "ssh"
            options = [chosen.get("PDSH_SSH_ARGS_APPEND", ""), *SSH_OPTIONS, *self._port()]
            chosen["PDSH_SSH_ARGS_APPEND"] = " ".join(filter(None, options))
        if self.kind == "slurm" and "SLURM_CPUS_PER_TASK" in chosen:
            # Since Slurm 22.05 srun ignores the allocation's number of cores, and would give all ranks of a node a single one.
            chosen.setdefault("SRUN_CPUS_PER_TASK", chosen["SLURM_CPUS_PER_TASK"])
        return chosen

    def _shell(self, module: str, index: str, order: str) -> str:
        path = os.environ.get("PYTHONPATH")
        variables = f"env {shlex.quote(f'PYTHONPATH={path}')} " if path else ""
        python = f"{variables}{shlex.quote(self.python)} -u"
        return f"cd {shlex.quote(self.directory)} && exec {python} -m {module} {index} {shlex.quote(order)}"

    def _port(self) -> list[str]:
        return ["-p", str(self.ssh_port)] if self.ssh_port is not None else []

    def _ssh(self, name: str, command: str) -> list[str]:
        return ["ssh", *SSH_OPTIONS, *self._port(), name, command]

    def _pdsh(self, hosts: Sequence[Host], command: str) -> list[str]:
        return ["pdsh", "-S", "-f", str(MOST_AT_ONCE), "-w", ",".join(host.name for host in hosts), command]

    def _srun(self, hosts: Sequence[Host], command: str) -> list[str]:
        # --kill-on-bad-exit=0: a node that ends first must not have Slurm kill those that still save
        shape = [f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", "--distribution=block"]
        nodes = f"--nodelist={','.join(host.name for host in hosts)}"
        return ["srun", *shape, nodes, "--kill-on-bad-exit=0", "--export=ALL", "/bin/sh", "-c", command]


def choose_transport(launcher: str) -> tuple[str, str]:
    """The transport for `--launcher`, and what to tell a person about it.

    Raises:
        ValueError: unknown, or its program is not installed.
    """
    if launcher not in LAUNCHERS:
        raise ValueError(f"--launcher: got {launcher!r}, expected one of {', '.join(LAUNCHERS)}.")
    if launcher == "auto":
        return ("pdsh", "pdsh") if shutil.which("pdsh") else ("ssh", "ssh, since pdsh is not installed")
    kind = "ssh" if launcher == "torchrun" else launcher
    program = "srun" if kind == "slurm" else kind
    if shutil.which(program) is None:
        raise ValueError(f"--launcher {launcher}: {program} is not installed here. Install it, or choose another launcher.")
    return kind, "ssh, torchrun on every node" if launcher == "torchrun" else kind


def slurm_hosts(environment: Mapping[str, str], *, slots: int) -> list[Host]:
    """The nodes of the surrounding Slurm allocation, in Slurm's order.

    Raises:
        ValueError: there is no allocation, or scontrol cannot say what is in it.
    """
    listed = environment.get("SLURM_JOB_NODELIST")
    if not listed:
        raise ValueError("--launcher slurm: no allocation here. Call it inside sbatch or salloc, or give a --hostfile.")
    try:
        command = ["scontrol", "show", "hostnames", listed]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"--launcher slurm: `scontrol show hostnames {listed}` failed ({error}).") from error
    return [Host(name=name, slots=tuple(range(slots))) for name in answer.stdout.split()]


def resolve(host: Host, remote: Remote) -> str:
    """The address of a node: as ssh's configuration has it, looked up; the name itself where that fails."""
    name = host.short
    if remote.kind in ("ssh", "pdsh"):
        answer = subprocess.run(["ssh", "-G", host.name], capture_output=True, text=True, check=False)
        found = re.search(r"^hostname (\S+)$", answer.stdout, re.MULTILINE)
        name = found[1] if found else name
    try:
        return socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return name


def own_address(towards: str) -> str:
    """The address of this machine that a node at `towards` can answer to."""
    try:
        family = socket.getaddrinfo(towards, 1, type=socket.SOCK_DGRAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((towards, 1))  # sends nothing: it only asks the routing table
            return probe.getsockname()[0]
    except OSError:
        return socket.gethostname()


def advise(said: str, host: Host) -> str:
    """What to do about the last words of ssh or of a remote shell."""
    for pattern, advice in ADVICE:
        if re.search(pattern, said):
            return advice.format(host=host.name)
    return f"Try `ssh {host.name} true` by hand."
