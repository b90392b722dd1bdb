"""Ray Train's trainer, without the helper processes and the open ports that a run does not need.

A helper process wakes up over 100 times a second. Where all cores compute, each time costs the thread that it
interrupts, and the threads that wait for that one.
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

LEAVE_SECONDS = 3.0  # for the ranks to leave the process group before they are ended
TorchBackend: Any = ray_private.get("backend") or object
WorkerGroupCallback: Any = ray_private.get("group_callback") or object
FixedScalingPolicy: Any = ray_private.get("fixed_scaling") or object
# Without these two Ray's own backend is used.
HAS_OWN_BACKEND = all(ray_private.get(name) for name in ("backend", "leave_group"))
HAS_LOCAL_BACKEND = HAS_OWN_BACKEND and bool(ray_private.get("set_variables"))


def join_group(backend: str, path: str, rank: int, *, world: int, timeout_seconds: int) -> None:
    """Makes torch's process group on a worker; the ranks find each other by the file at `path`."""
    timeout = timedelta(seconds=timeout_seconds)
    store = dist.FileStore(path, world)
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


class Backend(TorchBackend):
    """Ray's own, which waits half a minute for a rank that hangs to leave the process group, before it is killed."""

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:  # noqa: ARG002
        """Called in the controller before workers are stopped."""
        leave = ray_private.get("leave_group")
        tasks = worker_group.execute_async(leave, destroy_process_group=len(worker_group) > 1)
        with contextlib.suppress(ray.exceptions.RayError):  # a rank that is dead or hangs: it is ended next
            ray.get(tasks, timeout=LEAVE_SECONDS)


class LocalBackend(Backend):
    """For workers on one machine. Ray's own has them meet at a port of rank 0 that every network reaches and that asks
    for no password; here it is a file that only this user reads, new for each start of the workers."""

    folder: tempfile.TemporaryDirectory | None = None

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called in the controller when workers have started."""
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
        """Called in the controller before workers are stopped."""
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
    """`owns_cluster`: all workers are on this machine. `backend`: nccl or gloo. `limit_seconds`: of collectives."""
    kind = TorchConfig
    if HAS_OWN_BACKEND:
        kind = LocalTorchConfig if owns_cluster and HAS_LOCAL_BACKEND else GroupConfig
    return kind(backend=backend, timeout_s=limit_seconds)


class StartLimit(WorkerGroupCallback):
    """Ends the workers of a group that has not started after so many seconds, so that Ray Train starts another one.

    Its controller waits for their first answers without a limit, and so for a process that was stopped.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        """Called in the controller, around the start of the workers."""
        watch = threading.Timer(self.limit_seconds, ray_private.end_workers)
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()


def start_limits(limit_seconds: float) -> list[Any]:
    """The callbacks that limit the start of workers; none where Ray takes no such callback."""
    return [StartLimit(limit_seconds)] if ray_private.get("group_callback") else []


class FixedScaling(FixedScalingPolicy):
    """Without Ray's autoscaling coordinator: for a cluster that no autoscaler grows."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Asks for no resources."""

    def _maybe_send_resource_request(self) -> None:
        pass


class Trainer(TorchTrainer):
    """TorchTrainer for train functions that use no Ray data sets.

    `owns_cluster`: the cluster was started here and ends with this process. Then nothing has to look after the workers'
    placement group when the controller dies, and a fixed number of workers is asked of no autoscaler.
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
            find()  # the controller needs this actor and waits for it: they may as well start side by side
        parts["callbacks"] = [c for c in parts["callbacks"] if not isinstance(c, kinds)]
        return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]
