"""`python -m launch.probe INDEX ORDER`: a node that answers the questions of `python -m launch check`, which starts it."""

import os
import select
import sys
from typing import Any

from launch.channel import connect_tcp
from launch.head_link import HeadLink
from launch.measurements import Task, make_tasks
from launch.node import CONNECT_SECONDS, greet, read_order
from launch.order import Order
from launch.outcome import FAILED, FINISHED


def main() -> int:
    index = int(sys.argv[1])
    order = Order.decode(read_order(sys.argv[2]))
    os.environ.update(order.environment)
    try:
        link = HeadLink(connect_tcp(order.addresses[index], order.port, seconds=CONNECT_SECONDS), order.silence)
    except OSError as error:
        sys.stderr.write(f"cannot reach the head at {order.addresses[index]} port {order.port} ({error}).\n")
        return FAILED
    if greet(link, order, index) is None:
        return FAILED
    tasks = make_tasks()
    while link.alive:
        link.tick()
        if select.select([link.channel], [], [], 1.0)[0]:
            for message in link.hear():
                if message.get("do") == "task":
                    link.send("result", name=message["name"], value=_run(tasks[message["name"]], message["arguments"]))
    return FINISHED


def _run(task: Task, arguments: dict[str, Any]) -> dict[str, Any]:
    """The task's answer; an error that it did not expect is one too, since a check must go on and name it."""
    try:
        return task(**arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the check has found
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    sys.exit(main())
