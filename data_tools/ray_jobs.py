"""The same jobs on a Ray cluster: `--engine ray`. The cluster's machines must see source and destination under the same paths."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2  # jobs a core of the cluster that are handed out before they are needed


def run_ray_jobs(function: Callable[[Item], Result], items: Iterable[Item], jobs: int | None) -> Iterator[Result]:
    """Yield function(item) for each item, in order, computed by a Ray cluster.

    The cluster is the one that RAY_ADDRESS names, or that of `ray start` on this machine; without one, one is started here for
    the time of the run, with `jobs` cores.

    Args:
        jobs: Most jobs at once; None: as many as the cluster has cores.

    Raises:
        ValueError: Ray is not installed. An exception of `function` is raised as it was.
    """
    ray = _import_ray()
    started = not ray.is_initialized()
    if started:
        _connect(ray, jobs)
    try:
        width = jobs or max(1, int(ray.cluster_resources().get("CPU", 1)))
        # Shards are written aside and renamed, so a job whose machine was lost is simply done again.
        remote = ray.remote(num_cpus=1, max_retries=3)(function)
        yield from _in_order(ray, remote, items, _AHEAD * width)
    finally:
        if started:
            ray.shutdown()


def _in_order(ray: Any, remote: Any, items: Iterable[Item], ahead: int) -> Iterator[Any]:
    pending: deque[Any] = deque()
    try:
        for item in items:
            pending.append(remote.remote(item))
            if len(pending) > ahead:
                yield ray.get(pending.popleft())
        while pending:
            yield ray.get(pending.popleft())
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        for reference in pending:
            ray.cancel(reference)


def _connect(ray: Any, jobs: int | None) -> None:
    # Workers import this program from where this process has it.
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}}
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False, "runtime_env": environment}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
        return
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    except ConnectionError:  # no cluster here: one for this run
        ray.init(num_cpus=jobs, **quiet)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ValueError('--engine ray: the package ray is missing. Install it: pip install "simmim-scale[ray]".') from error
    return ray
