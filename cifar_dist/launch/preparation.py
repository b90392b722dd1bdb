"""Makes parts of a data set in Ray tasks on all nodes of a cluster."""

from collections.abc import Callable, Iterator
from typing import Any

import ray

from cifar_dist.data.check import Checker
from cifar_dist.data.making import make_part
from cifar_dist.data.parts import PREPARING, Made, Part
from cifar_dist.environment import frugal_memory
from cifar_dist.errors import UserError, first_line
from cifar_dist.launch.cluster import connect, count_resource
from cifar_dist.storage import Folder

AHEAD = 2  # parts that wait for each CPU
WORD_SECONDS = 60.0  # without a finished part: then a line says what is waited for


def make_on_node(part: Part, uri: str) -> Made:
    """Makes a part on this node."""
    node = ray.util.get_node_ip_address()
    if not Folder(uri).exists(PREPARING):
        raise UserError(
            f"node {node} does not see {uri}, which the job writes to; name a shared folder or a URI with --out"
        )
    checker = Checker(num_threads=1)
    try:
        with frugal_memory():
            return make_part(part, uri, checker)
    except UserError as error:
        raise UserError(
            f"{error} (on node {node}, which must see the same files as the job; --address local prepares on this "
            "machine alone)"
        ) from error
    finally:
        checker.stop()


def on_cluster(
    parts: list[Part], uri: str, passed: Callable[[int], None], *, address: str, num_tasks: int = 0
) -> Iterator[Made]:
    """Yields what is made of each part, in any order, with a task for each CPU of the cluster, or `num_tasks`."""
    connect(address, 1)
    task = ray.remote(num_cpus=1, max_retries=3)(make_on_node)
    most = num_tasks or max(1, AHEAD * count_resource("CPU"))
    left, running = iter(parts), dict[Any, int]()
    try:
        while True:
            while len(running) < most and (part := next(left, None)):
                running[task.remote(part.portable(), uri)] = len(part.items)
            if not running:
                return
            finished, _ = ray.wait(list(running), timeout=WORD_SECONDS)
            if not finished:
                free = ray.available_resources().get("CPU", 0)
                print(
                    f"no part was finished in {WORD_SECONDS:.0f} s: {len(running)} wait or run; the cluster has "
                    f"{count_resource('CPU')} CPUs, {free:g} of them free",
                    flush=True,
                )
            for reference in finished:
                made = ray.get(reference)
                passed(running.pop(reference))
                yield made
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise
    except ray.exceptions.RayError as error:
        raise UserError(
            f"a task that prepares pictures was lost more than 3 times: {first_line(error)}; run the same command "
            "again to go on"
        ) from error
    finally:
        for reference in running:
            ray.cancel(reference)
