"""Ray Train's trainer, without the helper processes and the open ports that a run does not need.

A helper process wakes up over 100 times a second. If all cores are busy, each wake-up delays the thread that it
interrupts, and all threads that wait for the interrupted thread.
"""

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig, TorchTrainer

from cifar_dist.launch import ray_private

LEAVE_SECONDS = 3.0  # for the ranks to leave the process group before they are killed
TorchBackend: Any = ray_private.get("backend") or object
WorkerGroupCallback: Any = ray_private.get("group_callback") or object
FixedScalingPolicy: Any = ray_private.get("fixed_scaling") or object
# Without these two private APIs, Ray's own backend is used.
HAS_OWN_BACKEND = all(ray_private.get(name) for name in ("backend", "leave_group"))
HAS_LOCAL_BACKEND = HAS_OWN_BACKEND and bool(ray_private.get("set_variables"))


def join_group(backend: str, path: str, rank: int, *, world: int, timeout_seconds: int) -> None:
    """Creates torch's process group on a worker. The ranks find each other through the file at `path`."""
    timeout = timedelta(seconds=timeout_seconds)
    store = dist.FileStore(path, world)
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


class Backend(TorchBackend):
    """Ray's backend with a shorter shutdown. Ray waits half a minute for a hanging rank to leave the process group."""

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:  # noqa: ARG002
        """Makes the ranks leave the group. Ray Train's controller calls this before it stops the workers."""
        leave = ray_private.get("leave_group")
        tasks = worker_group.execute_async(leave, destroy_process_group=len(worker_group) > 1)
        with contextlib.suppress(ray.exceptions.RayError):  # a rank is dead or hangs; Ray kills it next
            ray.get(tasks, timeout=LEAVE_SECONDS)


class LocalBackend(Backend):
    """Backend for workers on one machine, where ranks meet through a file that only this user can read.

    Ray's backend opens a port of rank 0 to every network, without a password. The file is new for each start."""

    folder: tempfile.TemporaryDirectory | None = None

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Creates the process group. Ray Train's controller calls this when workers have started."""
        session = ray_private.session_folder()
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-", dir=session, ignore_cleanup_errors=True)
        group, world = f"{self.folder.name}/group", len(worker_group)
        worker_group.execute(ray_private.get("set_variables"))
        settings = {"world": world, "timeout_seconds": backend_config.timeout_s}
        tasks = [
            worker_group.execute_single_async(i, join_group, backend_config.backend, group, i, **settings)
            for i in range(world)
        ]
        ray.get(tasks)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Also deletes the file. Ray Train's controller calls this before it stops the workers."""
        super().on_shutdown(worker_group, backend_config)
        if self.folder:
            self.folder.cleanup()


@dataclass
class GroupConfig(TorchConfig):
    """TorchConfig for workers on any machines."""

    @property
    def backend_cls(self) -> type:
        return Backend


@dataclass
class LocalTorchConfig(TorchConfig):
    """TorchConfig for workers on one machine."""

    @property
    def backend_cls(self) -> type:
        return LocalBackend


def torch_config(*, owns_cluster: bool, backend: str, limit_seconds: int) -> TorchConfig:
    """Returns the TorchConfig of a run.

    `owns_cluster`: all workers are on this machine. `backend`: nccl or gloo. `limit_seconds`: of collectives."""
    kind = TorchConfig
    if HAS_OWN_BACKEND:
        kind = LocalTorchConfig if owns_cluster and HAS_LOCAL_BACKEND else GroupConfig
    return kind(backend=backend, timeout_s=limit_seconds)


class StartLimit(WorkerGroupCallback):
    """Kills the workers of a group that has not started after `limit_seconds`. Ray Train then starts a new group.

    Ray Train's controller waits without a limit for the first answers of workers, even for a stopped process.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        """Limits the start of the workers. Ray Train's controller enters this context around the start."""
        watch = threading.Timer(self.limit_seconds, ray_private.end_workers)
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()


def start_limits(limit_seconds: float) -> list[Any]:
    """Returns the callbacks that limit the start of workers, none if Ray has no such callback."""
    return [StartLimit(limit_seconds)] if ray_private.get("group_callback") else []


class FixedScaling(FixedScalingPolicy):
    """Scaling policy that does not call Ray's autoscaling coordinator, for a cluster without an autoscaler."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Requests no resources."""

    def _maybe_send_resource_request(self) -> None:
        pass


class Trainer(TorchTrainer):
    """TorchTrainer for train functions that use no Ray data sets.

    `owns_cluster`: this process started the cluster, which ends with the process. Then no helper has to remove the
    workers' placement group if the controller dies, and a fixed number of workers needs no autoscaler.
    """

    def __init__(self, *args: Any, owns_cluster: bool, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._owns_cluster = owns_cluster

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if not ray_private.get("run_controller"):
            return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]
        unused = [ray_private.get("data_sets"), ray_private.get("cleaner") if self._owns_cluster else None]
        kinds = tuple(filter(None, unused))
        is_fixed = not self.scaling_config.elasticity_enabled  # type: ignore[attr-defined]
        if self._owns_cluster and is_fixed and ray_private.get("fixed_scaling"):
            parts["scaling_policy"] = FixedScaling(self.scaling_config)
        elif find := ray_private.get("coordinator"):
            find()  # starts the actor in parallel with the controller, which waits for it
        parts["callbacks"] = [c for c in parts["callbacks"] if not isinstance(c, kinds)]
        return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]
