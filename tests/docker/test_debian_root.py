"""The image's install steps, run for real in a Debian root that debootstrap makes.

Always: the packages of the operating system, the user, the ssh server and a login. With SIMMIM_TEST_IMAGE=1 (`make test-image`)
also the virtual environment with its gigabytes, DeepSpeed's ops that need no GPU compiler, and `simmim doctor` inside.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("debootstrap", "unshare", "chroot", "mount", "ssh", "ssh-keygen")
FULL = os.environ.get("SIMMIM_TEST_IMAGE") == "1"
# /proc and /dev of the root live in a mount namespace of the command alone, so nothing can stay mounted.
INSIDE = 'mount --bind /proc "$0/proc" && mount --bind /dev "$0/dev" && exec chroot "$0" "$@"'

pytestmark = pytest.mark.slow


def obstacle() -> str | None:
    """Why no root can be made here, or None."""
    if os.geteuid() != 0:
        return "needs root for chroot"
    missing = [name for name in TOOLS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False)
    return None if probe.returncode == 0 else f"mount namespaces are not allowed: {probe.stderr.strip()}"


class DebianRoot:
    """A directory with a minimal Debian, and commands inside it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, *command: str, code: int = 0, **environment: str) -> str:
        result = subprocess.run(
            ["unshare", "--mount", "sh", "-c", INSIDE, str(self.path), *command],
            capture_output=True,
            text=True,
            check=False,
            env={**pip_environment(), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", **environment},
        )
        assert result.returncode == code, f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"
        return result.stdout + result.stderr

    def install(self, name: str, *arguments: str, code: int = 0, **environment: str) -> str:
        return self.run("sh", f"/opt/install/{name}", *arguments, code=code, **environment)


def pip_environment() -> dict[str, str]:
    return {
        name: value for name, value in os.environ.items() if name.startswith(("PIP_", "http", "HTTP", "no_proxy", "NO_PROXY"))
    }


@pytest.fixture(scope="module")
def debian(tmp_path_factory) -> Iterator[DebianRoot]:
    reason = obstacle()
    if reason:
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("debian") / "root"
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", "bookworm", str(path)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"debootstrap failed, which needs Debian's packages: {made.stdout[-300:]}")
    root = DebianRoot(path)
    for name in ("resolv.conf", "pip.conf"):
        if Path("/etc", name).is_file():
            shutil.copyfile(f"/etc/{name}", path / "etc" / name)
    shutil.copytree(ROOT / "docker" / "install", path / "opt" / "install")
    shutil.copy(ROOT / "docker" / "entrypoint.sh", path / "usr/local/bin/entrypoint.sh")
    root.install("system.sh")
    root.install("user.sh", "simmim", "1000", str(free_port()))
    yield root
    shutil.rmtree(path, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_system_brings_compiler_headers_and_ssh(debian):
    (debian.path / "tmp/hello.c").write_text("#include <Python.h>\nint main(void) { return PY_MAJOR_VERSION - 3; }\n")
    include = debian.run("python3", "-c", "import sysconfig; print(sysconfig.get_paths()['include'])").strip()
    debian.run("gcc", f"-I{include}", "/tmp/hello.c", "-o", "/tmp/hello")
    debian.run("/tmp/hello")
    debian.run("python3", "-m", "venv", "--without-pip", "/tmp/venv")
    for command in ("ssh", "sshd", "pdsh", "tini", "git"):
        assert debian.run("sh", "-c", f"command -v {command}").strip().endswith(command)


def test_user_is_made_once_and_owns_what_it_needs(debian):
    port = (debian.path / "home/simmim/sshd/sshd_config").read_text().split("Port ")[1].split()[0]
    debian.install("user.sh", "simmim", "1000", port)  # a second time changes nothing
    assert "uid=1000(simmim)" in debian.run("id", "simmim")
    for folder in ("/data", "/runs"):
        debian.run("su", "simmim", "-c", f"touch {folder}/x && rm {folder}/x")


def test_entrypoint_refuses_an_ssh_server_that_nobody_can_enter(debian):
    (debian.path / "home/simmim/.ssh/authorized_keys").unlink(missing_ok=True)
    answer = debian.run("su", "simmim", "-c", "SIMMIM_SSHD=1 sh /usr/local/bin/entrypoint.sh true", code=2)
    assert "SIMMIM_AUTHORIZED_KEYS" in answer


def test_entrypoint_starts_a_server_that_lets_the_key_in(debian, tmp_path):
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    public = Path(f"{key}.pub").read_text().strip()
    command = f"SIMMIM_SSHD=1 SIMMIM_AUTHORIZED_KEYS='{public}' NCCL_DEBUG=WARN sh /usr/local/bin/entrypoint.sh echo started"
    assert "started" in debian.run("su", "simmim", "-c", command)
    port = (debian.path / "home/simmim/sshd/sshd_config").read_text().split("Port ")[1].split()[0]
    options = [*("-i", str(key), "-p", port), *("-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path}/known")]
    try:
        assert login(options, "simmim", "id -un; echo $NCCL_DEBUG").split() == ["simmim", "WARN"]
        assert login(options, "root", "id -un", code=255) == ""
        other = tmp_path / "other"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
        assert login(["-i", str(other), *options[2:]], "simmim", "id -un", code=255) == ""
    finally:
        os.kill(int((debian.path / "home/simmim/sshd/sshd.pid").read_text()), signal.SIGTERM)


def login(options: list[str], user: str, command: str, *, code: int = 0) -> str:
    arguments = ["ssh", "-F", "none", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", *options, f"{user}@127.0.0.1", command]
    for _ in range(20):  # the server needs a moment to listen
        result = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if "Connection refused" not in result.stderr:
            break
        time.sleep(0.25)
    assert result.returncode == code, result.stderr
    return result.stdout


def test_scripts_say_what_they_miss(debian):
    assert "no pyproject.toml" in debian.install("python.sh", "/opt/venv", "/nowhere", code=2)
    assert "no nvcc found" in debian.install("apex.sh", "/opt/venv", code=2)


@pytest.mark.skipif(not FULL, reason="several GB: `make test-image` runs it")
def test_the_whole_environment_passes_the_doctor(debian):
    checkout = debian.path / "opt/simmim_scale"
    kept = ("simmim_scale", "launch", "data_tools", "configs", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
    checkout.mkdir()
    for name in kept:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)
    debian.install("python.sh", "/opt/venv", "/opt/simmim_scale", "coco,tensorboard")
    debian.install("deepspeed.sh", "/opt/venv", "/opt/simmim_scale", DEEPSPEED_OPS="UTILS AIO", DS_ACCELERATOR="cpu")
    answer = debian.run("/opt/venv/bin/simmim", "doctor", "--nodes")
    assert "prebuilt" in answer
    assert "ten steps under ZeRO-3" in answer
