"""Two hosts on one machine: network namespaces with their own address and sshd, joined by a cable that tests can pull.

They share the file system and the process table, so a test sees every process of both. Needs root, iproute2 and openssh-server.
"""

import os
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
# Travels to every process of a launch: variables of this family are forwarded to ranks, and this one passes our ssh to nodes too
MARK = "SIMMIM_RIG_TEST"
ADDRESSES = {"a": "10.99.0.1", "b": "10.99.0.2"}
NEEDED = {"ip": "iproute2", "ssh": "openssh-client", "/usr/sbin/sshd": "openssh-server"}
PATIENCE = 300.0  # seconds: a hang fails the test, a busy machine does not


def why_not() -> str | None:
    """Why the rig cannot be built here, or None."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (as root on Debian or Ubuntu: make test-system-packages)"
    name = f"simmim-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return f"network namespaces are not allowed here: {made.stderr.strip()}" if made.returncode else None


@dataclass
class Rig:
    """The two hosts, known to ssh as a and b."""

    folder: Path
    name: str = field(default_factory=lambda: f"simmim-{os.getpid()}-{uuid.uuid4().hex[:4]}")
    servers: list[subprocess.Popen] = field(default_factory=list)

    @property
    def disk(self) -> Path:
        """A small file system that both hosts share, for tests that fill it."""
        return self.folder / "disk"

    def namespace(self, host: str) -> str:
        return f"{self.name}-{host}"

    def build(self) -> None:
        # Before the servers: what is mounted later they do not see, since each has a mount namespace of its own.
        self.disk.mkdir()
        run("mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(self.disk))
        keys = self.folder / "keys"
        keys.mkdir()
        for key in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / key))
        for host in ADDRESSES:
            run("ip", "netns", "add", self.namespace(host))
        ends = ["cable", "netns", self.namespace("a")], ["cable", "netns", self.namespace("b")]
        run("ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for host, address in ADDRESSES.items():
            self.ip(host, "addr", "add", f"{address}/24", "dev", "cable")
            self.ip(host, "link", "set", "cable", "up")
            self.ip(host, "link", "set", "lo", "up")
        Path("/run/sshd").mkdir(exist_ok=True)
        for host in ADDRESSES:
            self.serve(host)
        self._configure_ssh()
        for host in ADDRESSES:
            until(lambda host=host: self.start(["ssh", host, "true"]).wait() == 0, f"sshd on {host}")

    def serve(self, host: str) -> None:
        settings = {
            "Port": 22,
            "ListenAddress": ADDRESSES[host],
            "HostKey": self.folder / "keys" / "host",
            "AuthorizedKeysFile": self.folder / "keys" / "user.pub",
            "PidFile": "none",
            "StrictModes": "no",
            "UsePAM": "no",
            "PermitRootLogin": "yes",
            "MaxStartups": "100:30:200",
            "AcceptEnv": MARK,
        }
        path = self.folder / f"sshd_{host}.conf"
        path.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        command = ["ip", "netns", "exec", self.namespace(host), "/usr/sbin/sshd", "-D", "-e", "-f", str(path)]
        with (self.folder / f"sshd_{host}.log").open("ab") as log:
            self.servers.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

    def _configure_ssh(self) -> None:
        lines = ["StrictHostKeyChecking no", f"UserKnownHostsFile {self.folder / 'known'}", "LogLevel ERROR"]
        lines += [f"IdentityFile {self.folder / 'keys' / 'user'}", "IdentitiesOnly yes"]
        for host, address in ADDRESSES.items():
            lines += [f"Host {host}", f"  HostName {address}"]
        config = self.folder / "ssh_config"
        # options before the first Host are for all
        config.write_text("\n".join(lines) + "\n")
        wrapper = self.folder / "bin" / "ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {config} -o "SetEnv={MARK}=\\"${MARK}\\"" "$@"\n')
        wrapper.chmod(0o755)

    def environment(self, mark: str = "") -> dict[str, str]:
        return {
            **os.environ,
            MARK: f"{self.name} {mark}",  # with the name: another rig on this machine is not ours to look at, or to kill
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "GLOO_SOCKET_IFNAME": "cable",
            "TP_SOCKET_IFNAME": "cable",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }

    def start(
        self, command: list[str], *, host: str = "a", mark: str = "", variables: dict[str, str] | None = None, **options
    ) -> subprocess.Popen:
        """Starts a command on a host, with these variables besides the rig's."""
        inside = ["ip", "netns", "exec", self.namespace(host), *command]
        return subprocess.Popen(inside, env={**self.environment(mark), **(variables or {})}, cwd=REPOSITORY, **options)

    def ip(self, host: str, *arguments: str) -> None:
        run("ip", "-n", self.namespace(host), *arguments)

    def pull_cable(self) -> None:
        self.ip("b", "link", "set", "cable", "down")

    def plug_cable(self) -> None:
        self.ip("b", "link", "set", "cable", "up")

    def family(self, mark: str) -> list[psutil.Process]:
        """Every living process of one launch, on both hosts, whoever its parent is."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == f"{self.name} {mark}":
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def on(self, host: str, processes: list[psutil.Process]) -> list[psutil.Process]:
        """Those of the processes that run on a host."""
        place = os.stat(f"/run/netns/{self.namespace(host)}").st_ino
        found = []
        for process in processes:
            try:
                if os.stat(f"/proc/{process.pid}/ns/net").st_ino == place:
                    found.append(process)
            except OSError:
                continue
        return found

    def remove(self) -> None:
        for server in self.servers:
            server.terminate()
            server.wait()
        for host in ADDRESSES:
            subprocess.run(["ip", "netns", "del", self.namespace(host)], check=False)
        subprocess.run(["umount", str(self.disk)], check=False)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def until(condition, what: str, *, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} seconds for {what}"
        time.sleep(0.05)
