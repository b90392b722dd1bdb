"""The connection to a Ray cluster, or to one started on this machine. Ray Train and torch are not imported."""

import atexit
import importlib
import logging
import os
import re
import socket
import threading
from typing import Any

import ray

from cifar_dist.config import set_up_local_cluster
from cifar_dist.errors import UserError


def connect(address: str | None, num_workers: int) -> None:
    """Connects to the Ray cluster at `address`, or starts one on this machine if it is None."""
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # More workers than cores is slow but sound, and how a laptop rehearses a cluster.
        num_cpus = max(os.cpu_count() or 1, num_workers)
        set_up_local_cluster()
        # Ray's processes take seconds to start, torch takes one to import, and both are needed next.
        torch_import = threading.Thread(target=importlib.import_module, args=("torch",))
        torch_import.start()
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
        # It follows the workers' output for the driver, which is quiet. ray.init() cannot leave it out.
        ray._private.worker._global_node.kill_log_monitor()  # type: ignore[attr-defined]
        atexit.register(ray.shutdown)  # before Ray's own, which first sleeps half a second
        torch_import.join()
        return
    if match := re.fullmatch(r"(?:ray://)?([^:/]+|\[.+\]):(\d+)", address):
        try:  # Ray itself tries for a quarter of an hour
            socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=10).close()
        except OSError as error:
            raise UserError(f"no Ray cluster answers at {address}: {error}; check --address") from error
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}") from error


def count_resource(name: str) -> int:
    """CPUs or GPUs of the connected cluster."""
    return int(ray.cluster_resources().get(name, 0))


def uses_gpu(device: str, num_tasks: int = 1) -> bool:
    """Whether `auto`, `cpu` or `gpu` means a GPU on the connected cluster. Raises UserError if there are too few."""
    num_gpus = count_resource("GPU")
    gpu = device == "gpu" or (device == "auto" and num_gpus > 0)
    if gpu and num_gpus < num_tasks:
        raise UserError(f"{num_tasks} workers need a GPU each, the cluster has {num_gpus}; use --device cpu or fewer")
    return gpu
