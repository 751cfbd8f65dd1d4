"""A rank for the launcher's tests: waits, saves when asked, notices dead peers; without torch, so it starts at once.

Usage: rank_program.py OUT MODE, with MODE one of finish, wait, deaf, user-error, fail, bar, beat, hang.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from simmim_scale.engine.heartbeat import Heartbeat

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
SAVE_SECONDS = 0.5
KEPT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "DS_ACCELERATOR", "PATH")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def publish(out: Path, name: str, content: dict) -> None:
    aside = out / f".{name}_{RANK}"
    aside.write_text(json.dumps(content))
    aside.replace(out / f"{name}_{RANK}.json")


def peers(out: Path) -> list[int]:
    files = [out / f"ready_{rank}.json" for rank in range(WORLD) if rank != RANK]
    return [json.loads(file.read_text())["pid"] for file in files if file.exists()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait(out: Path) -> int:
    """As a training run: until a signal asks for a save, or a peer is gone without having saved."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: asked.append(number))
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    publish(out, "ready", {"pid": os.getpid(), "worker": worker.pid})
    while not asked:
        time.sleep(0.05)
        if not asked and not all(alive(pid) for pid in peers(out)):
            say(f"rank {RANK}: a peer is gone")
            return 1
    time.sleep(SAVE_SECONDS)
    publish(out, "saved", {"signals": asked, "worker_alive": worker.poll() is None})
    say(f"rank {RANK}: saved")
    return 75


def deaf(out: Path) -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    publish(out, "ready", {"pid": os.getpid()})
    time.sleep(600)
    return 0


def beat(out: Path) -> int:
    """As training over several hosts: steps together, and a save together when any rank is asked; a lost peer is waited for."""
    heartbeat = Heartbeat.from_environment(os.environ)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: asked.append(number))
    publish(out, "ready", {"pid": os.getpid()})
    step = 0
    while True:
        step += 1
        heartbeat.mark("train", step)
        stopping = wait_for_all(out, step, bool(asked))
        time.sleep(0.1)
        if stopping:
            publish(out, "saved", {"step": step})
            return 75


def wait_for_all(out: Path, step: int, asked: bool) -> bool:
    """A collective: returns on all ranks whether any of them was asked to stop; a peer that is gone is an error."""
    publish(out, f"step{step % 2}", {"step": step, "asked": asked, "pid": os.getpid()})
    ready = peers(out)
    while True:
        files = [out / f"step{step % 2}_{rank}.json" for rank in range(WORLD)]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        if len(found) == WORLD and all(one["step"] == step for one in found):
            return any(one["asked"] for one in found)
        if not all(alive(pid) for pid in ready):
            say(f"rank {RANK}: a peer is gone")
            sys.exit(1)
        time.sleep(0.02)


def hang(out: Path) -> int:
    """The last rank stops taking steps, and the others wait for it."""
    heartbeat = Heartbeat.from_environment(os.environ)
    for step in range(1, 4):
        heartbeat.mark("train", step)
        wait_for_all(out, step, False)
    if RANK == WORLD - 1:
        waits_for_data()
    heartbeat.mark("train", 4)
    wait_for_all(out, 4, False)
    return 0


def waits_for_data() -> None:
    time.sleep(600)


def bar() -> int:
    for percent in range(0, 101, 20):
        sys.stdout.write(f"\r\x1b[2K\x1b[32mstep {percent} %\x1b[0m")
        sys.stdout.flush()
        time.sleep(0.02)
    say("\ndone")
    return 0


def main() -> int:
    out, mode = Path(sys.argv[1]), sys.argv[2]
    terminals = [stream.isatty() for stream in (sys.stdout, sys.stderr)]
    publish(
        out,
        "seen",
        {
            "arguments": sys.argv[3:],
            "terminals": terminals,
            "own": os.environ.get("SIMMIM_OWN"),
            "environment": {name: os.environ[name] for name in KEPT if name in os.environ},
        },
    )
    say(f"rank {RANK} began")
    if mode == "finish":
        say("a long line " * 2000)
        return 0
    if mode == "user-error":
        sys.stderr.write("error: no shards here\n")
        return 2
    if mode == "fail":
        say(f"rank {RANK}: about to fail")
        return 3 if RANK == 1 else 0
    return {"wait": wait, "deaf": deaf, "beat": beat, "hang": hang, "bar": lambda _: bar()}[mode](out)


if __name__ == "__main__":
    sys.exit(main())
