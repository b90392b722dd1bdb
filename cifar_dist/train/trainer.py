"""Ray Train's trainer for a cluster that is started for one run.

No helper processes of no use to a run: each wakes up over 100 times a second, and where all cores compute every time
costs both the thread that it interrupts and those that wait for that one. No port that other machines reach.
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
from ray._private.state import state
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _set_torch_distributed_env_vars, _shutdown_torch, _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context as get_internal_train_context
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from cifar_dist.train.cluster import session_folder

LEAVE_SECONDS = 3.0  # for the ranks to leave the process group before they are ended


def join_group(backend: str, path: str, rank: int, world: int, timeout_seconds: int) -> None:
    """Makes torch's process group on a worker; the ranks find each other by the file at `path`."""
    timeout = timedelta(seconds=timeout_seconds)
    store = dist.FileStore(path, world)
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


class Backend(_TorchBackend):
    """Ray's own, which waits half a minute for a rank that hangs to leave the process group, before it is killed."""

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:  # noqa: ARG002
        """Called in the controller before workers are stopped."""
        tasks = worker_group.execute_async(_shutdown_torch, destroy_process_group=len(worker_group) > 1)
        with contextlib.suppress(ray.exceptions.RayError):  # a rank that is dead or hangs: it is ended next
            ray.get(tasks, timeout=LEAVE_SECONDS)


class LocalBackend(Backend):
    """For workers on one machine. Ray's own has them meet at a port of rank 0 that every network reaches and that asks
    for no password; here it is a file that only this user reads, new for each start of the workers."""

    folder: tempfile.TemporaryDirectory | None = None

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called in the controller when workers have started."""
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-", dir=session_folder(), ignore_cleanup_errors=True)
        group, world = f"{self.folder.name}/group", len(worker_group)
        worker_group.execute(_set_torch_distributed_env_vars)
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


def a_node_is_leaving() -> bool:
    """Whether Ray has told this worker that the node of some worker is about to be taken away. ray.train's own
    get_preemption_info asks all workers each time, and waits for one that hangs."""
    return get_internal_train_context().preemption_context.preemption_info is not None


class StartLimit(WorkerGroupCallback):
    """Ends the workers of a group that has not started after so many seconds, so that Ray Train starts another one.

    Its controller waits for their first answers without a limit, and so for a process that was stopped.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        """Called in the controller, around the start of the workers."""
        watch = threading.Timer(self.limit_seconds, end_workers)
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()


def end_workers() -> None:
    """Kills the workers that the controller in this process has started."""
    context, core = ray.get_runtime_context(), ray._private.worker.global_worker.core_worker  # type: ignore[attr-defined]
    job = ray.JobID.from_hex(context.get_job_id())
    for actor_id, actor in state.actor_table(None, job, "ALIVE").items():
        if actor["ActorClassName"].endswith("RayTrainWorker"):
            core.kill_actor(ray.ActorID.from_hex(actor_id), True)


class FixedScaling(FixedScalingPolicy):
    """Without Ray's autoscaling coordinator: for a cluster that no autoscaler grows."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Asks for no resources."""

    def _maybe_send_resource_request(self) -> None:
        pass


class Trainer(TorchTrainer):
    """TorchTrainer for train functions that use no Ray data sets.

    `owns_cluster`: the cluster was started here and ends with this process. Then nothing has to look after the workers'
    placement group when the controller dies (which also asks the dashboard every second, so there must be one), and
    a fixed number of workers is asked of no autoscaler; and all workers are on this machine. `backend` of the process
    group: nccl or gloo; `limit_seconds`: of its collectives.
    """

    def __init__(self, *args: Any, owns_cluster: bool, backend: str, limit_seconds: int, **settings: Any) -> None:
        config = LocalTorchConfig if owns_cluster else GroupConfig
        super().__init__(*args, torch_config=config(backend=backend, timeout_s=limit_seconds), **settings)
        self._owns_cluster = owns_cluster

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        unused: list[type] = [DatasetsCallback]
        if self._owns_cluster:
            unused.append(PlacementGroupCleanerCallback)
        if self._owns_cluster and not self.scaling_config.elasticity_enabled:  # type: ignore[attr-defined]
            parts["scaling_policy"] = FixedScaling(self.scaling_config)  # type: ignore[arg-type]
        else:
            # The controller needs this actor and waits for it: they may as well start side by side.
            get_or_create_autoscaling_coordinator()
        parts["callbacks"] = [c for c in parts["callbacks"] if not isinstance(c, tuple(unused))]
        return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]
