"""`python -m launch.node INDEX ORDER`: one node of a launch over many; the head starts it, nobody by hand.

Its order is a line on standard input or in a file; everything after that goes over a TCP connection to the head. When that is
lost it stops its ranks by itself, so that nothing runs on where nobody can reach it.
"""

import contextlib
import hashlib
import hmac
import os
import select
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.channel import connect_tcp
from launch.head_link import HeadLink
from launch.job import Job
from launch.machine import find_devices, free_port
from launch.order import Order
from launch.outcome import FAILED
from launch.supervisor import Supervisor
from launch.versions import identify
from launch.watch import Limits

ORDER_SECONDS = 60.0  # until the order has arrived
CONNECT_SECONDS = 15.0
BEGIN_SECONDS = 900.0  # until every other node is there too; the head decides when to give up


def main() -> int:
    index = int(sys.argv[1])
    order = Order.decode(read_order(sys.argv[2]))
    # Not in the session of ssh or srun: what ends those must not end this process unasked.
    with contextlib.suppress(OSError):
        os.setsid()
    try:
        channel = connect_tcp(order.addresses[index], order.port, seconds=CONNECT_SECONDS)
    except OSError as error:
        sys.stderr.write(
            f"cannot reach the head at {order.addresses[index]} port {order.port} ({error}). Open this port in the firewall"
            " between nodes and head (choose it with --control-port), or name the right address with --control-address.\n"
        )
        return FAILED
    link = HeadLink(channel, order.silence)
    begin = greet(link, order, index)
    if begin is None:
        return FAILED
    return run(order, index, begin, link)


def answer(secret: str, nonce: str) -> str:
    """The proof that this process knows the secret."""
    return hmac.new(secret.encode(), nonce.encode(), hashlib.sha256).hexdigest()


def greet(link: HeadLink, order: Order, index: int) -> Mapping[str, Any] | None:
    """Tells the head who is here and waits until it says to begin; None when it does not."""
    nonce = _await(link, "nonce", seconds=CONNECT_SECONDS)
    if nonce is None:
        return None
    environment = {**os.environ, **order.environment}
    link.send(
        "hello",
        node=index,
        proof=answer(order.secret, nonce["nonce"]),
        host=socket.gethostname(),
        pid=os.getpid(),
        versions=identify(),
        devices=find_devices(environment),
        log_dir=Path(order.log_dir).is_dir(),
        port=free_port(),
        clock=time.time(),
    )
    return _await(link, "begin", seconds=BEGIN_SECONDS)


def run(order: Order, index: int, begin: Mapping[str, Any], link: HeadLink) -> int:
    """Runs this node's ranks to their end and says goodbye."""
    name = list(order.world)[index]
    job = Job(
        program=order.program,
        devices=order.world[name],
        on_gpu=bool(begin["on_gpu"]),
        log_dir=Path(order.log_dir),
        master_port=int(begin["master_port"]),
        grace=order.grace,
        world=order.world,
        node=index,
        master_addr=str(begin["master_addr"]),
        launcher=order.launcher,
        extra_environment=order.environment,
        limits=Limits(heartbeat=order.heartbeat, stall=order.stall, start=order.start),
    )
    code = Supervisor(job, os.environ, head=link).run()
    link.send("goodbye", code=code)
    link.drain_messages()
    return code


def read_order(source: str) -> bytes:
    """The line on standard input (-), read bare, so that nothing waits for more than it; or that of a file."""
    if source != "-":
        try:
            return Path(source).read_bytes()
        except OSError as error:
            raise SystemExit(
                f"{source}: {error.strerror}. The run directory must be on a file system that all nodes share."
            ) from error
    data, end = b"", time.monotonic() + ORDER_SECONDS
    while not data.endswith(b"\n") and time.monotonic() < end:
        if select.select([0], [], [], 1.0)[0]:
            piece = os.read(0, 65536)
            if not piece:
                break
            data += piece
    if not data.endswith(b"\n"):
        raise SystemExit("launch.node: no order on standard input. It is started by `python -m launch`, not by hand.")
    return data


def _await(link: HeadLink, what: str, *, seconds: float) -> Mapping[str, Any] | None:
    end = time.monotonic() + seconds
    while link.alive and time.monotonic() < end:
        link.tick()
        if select.select([link.channel], [], [], min(1.0, link.silence / 4))[0]:
            for message in link.hear():
                if message.get("do") == what:
                    return message
    return None


if __name__ == "__main__":
    sys.exit(main())
