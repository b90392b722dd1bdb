"""Every private API of Ray that a job uses, with its reason and the effect if a release of Ray lacks it.

A job also runs with Ray's public API alone, but slower or less protected. So with another release of Ray the job warns
and raises no ImportError. tests/unit/test_ray_private.py fails if a release of Ray changes one of these APIs.
"""

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import ray

from cifar_dist.environment import uses_private_ray


class PrivateAPI(NamedTuple):
    """`path`: MODULE:NAME, or MODULE:NAME.ATTRIBUTE. `losses`: what the user loses if Ray lacks it."""

    path: str
    reason: str
    losses: tuple[str, ...]


LACKING = object()  # not None: an API may hold None
DOCUMENTED = inspect.getdoc(ray.init) or ""  # names ray.init()'s settings that begin with _
OPEN_PORTS = "the job's own cluster can be reached from other machines"
SLOW_RECOVERY = "a failure of workers takes up to half a minute longer"
MORE_PROCESSES = "helper processes take some CPU time from training"
SLOW_END = "the job takes some seconds longer to end"
API = {
    "constants": PrivateAPI(
        "ray._private.ray_constants:ENABLE_RAY_CLUSTER",
        "Ray replaces 127.0.0.1 by an address that other machines reach, unless clusters are switched off",
        (OPEN_PORTS,),
    ),
    "token": PrivateAPI(
        "ray._raylet:AuthenticationTokenLoader.instance",
        "a process that starts a second cluster still has the token of the first one",
        ("a second cluster in one process may not start",),
    ),
    "worker": PrivateAPI(
        "ray._private.worker:_global_node",
        "the log monitor follows output that the driver does not show, and ray.shutdown() waits a second per process",
        (SLOW_END, MORE_PROCESSES),
    ),
    "sigterm": PrivateAPI(
        "ray._private.utils:set_sigterm_handler",
        "ray.init() puts a handler in place that ends the process without a word",
        ("a SIGTERM while Ray starts is not answered",),
    ),
    "address": PrivateAPI(
        "ray._private.services:canonicalize_bootstrap_address",
        "it tells the address behind `auto`, which is then tried for seconds and not for a quarter of an hour",
        ("an address `auto` that leads nowhere is found after 30 s",),
    ),
    "actors": PrivateAPI(
        "ray._private.state:state.actor_table",
        "it names the workers that a controller has started",
        ("workers that hang while they start are waited for",),
    ),
    "coordinator": PrivateAPI(
        "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator:get_or_create_autoscaling_coordinator",
        "Ray counts on the resources of a dead node for up to 20 s, then waits for resources that never come",
        (SLOW_RECOVERY,),
    ),
    "backend": PrivateAPI(
        "ray.train.torch.config:_TorchBackend",
        "ranks meet at a port that every network reaches, and a rank that hangs is given half a minute to leave",
        (OPEN_PORTS, SLOW_RECOVERY),
    ),
    "set_variables": PrivateAPI(
        "ray.train.torch.config:_set_torch_distributed_env_vars",
        "a backend of our own sets what Ray's own sets",
        (OPEN_PORTS,),
    ),
    "leave_group": PrivateAPI(
        "ray.train.torch.config:_shutdown_torch", "a backend of our own ends what Ray's own ends", (SLOW_RECOVERY,)
    ),
    "data_sets": PrivateAPI(
        "ray.train.v2._internal.callbacks.datasets:DatasetsCallback",
        "it starts an actor for Ray data sets, of which a run has none",
        (MORE_PROCESSES,),
    ),
    "cleaner": PrivateAPI(
        "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback",
        "it starts an actor that asks the dashboard every second; the job's own cluster has none",
        (MORE_PROCESSES,),
    ),
    "group_callback": PrivateAPI(
        "ray.train.v2._internal.execution.callback:WorkerGroupCallback",
        "the controller waits without a limit for the first answers of workers",
        ("workers that hang while they start are waited for",),
    ),
    "context": PrivateAPI(
        "ray.train.v2._internal.execution.context:get_train_context",
        "ray.train.get_preemption_info() asks all workers each time, and waits for one that hangs",
        ("no checkpoint is stored when a node is about to be taken away",),
    ),
    "fixed_scaling": PrivateAPI(
        "ray.train.v2._internal.execution.scaling_policy:FixedScalingPolicy",
        "it asks an autoscaler for workers that the job's own cluster already has",
        (MORE_PROCESSES,),
    ),
    "run_controller": PrivateAPI(
        "ray.train.torch:TorchTrainer._initialize_and_run_controller",
        "the callbacks and the scaling policy of a run are passed through it",
        (MORE_PROCESSES,),
    ),
}


def _find(name: str) -> Any:
    """Returns the object of API[name], or LACKING if Ray lacks it or if only public APIs may be used."""
    module, _, path = API[name].path.partition(":")
    if not uses_private_ray():
        return LACKING
    try:
        return attrgetter(path)(importlib.import_module(module))
    except (ImportError, AttributeError):
        return LACKING


def get(name: str) -> Any:
    """Returns the object of API[name], or None if Ray lacks it or if only public APIs may be used."""
    found = _find(name)
    return None if found is LACKING else found


def has(name: str) -> bool:
    """Whether the installed Ray has API[name], even if its current value is None."""
    return _find(name) is not LACKING


def warning() -> str | None:
    """Returns one sentence on what the job loses with the installed Ray, or None if it loses nothing."""
    # has(), not get(): the global node is None until a cluster is started.
    missing = [name for name in API if not has(name)]
    if not missing:
        return None
    cause = f"Ray {ray.__version__} lacks" if uses_private_ray() else "CIFAR_DIST_PRIVATE_RAY=0 switches off"
    losses = "; ".join(dict.fromkeys(loss for name in missing for loss in API[name].losses))
    return f"{cause} {len(missing)} of the private functions that this job uses: {losses}"


def stay_on_loopback() -> None:
    """Makes ray.init() keep the address 127.0.0.1."""
    if get("constants") is not None:
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False


def forget_token() -> None:
    """Makes Ray read the cluster's token again."""
    if instance := get("token"):
        instance().reset_cache()


def own_cluster_settings(folder: str) -> dict[str, Any]:
    """Returns settings of ray.init() for a cluster on the loopback interface with its files in `folder`.

    Leaves out settings that the installed Ray does not document."""
    wanted = {"_node_ip_address": "127.0.0.1", "_temp_dir": folder}
    return {name: value for name, value in wanted.items() if name in DOCUMENTED and uses_private_ray()}


def trim_own_cluster() -> None:
    """Ends the log monitor of the cluster that this process has started, and makes ray.shutdown() quick."""
    if node := get("worker"):
        with contextlib.suppress(AttributeError):
            node.kill_log_monitor()
            # ray.shutdown() sends SIGTERM, which the processes have blocked, and waits a second for each of them.
            end_processes = node.kill_all_processes
            node.kill_all_processes = lambda **_: end_processes(check_alive=False, allow_graceful=False)


def session_folder() -> str | None:
    """Returns the folder of Ray's session, which ends with the cluster, or None. Works in any cluster process."""
    node = get("worker")
    return node.get_session_dir_path() if node else None


@contextmanager
def own_handlers() -> Iterator[None]:
    """Keeps this process's SIGTERM handler during ray.init(). Ray's handler would exit with 15 and no message."""
    if not get("sigterm"):
        yield
        return
    set_handler = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = set_handler


def address_of_auto() -> str:
    """Returns HOST:PORT of the cluster that `auto` means, or 'auto' if the address is unknown."""
    canonicalize = get("address")
    return (canonicalize("auto") if canonicalize else None) or "auto"


def look_for_nodes() -> None:
    """Makes Ray's elastic policy count the nodes now; for the reason see API["coordinator"]."""
    if find := get("coordinator"):
        with contextlib.suppress(ray.exceptions.RayError):  # then recovery is merely slow
            ray.get(find().get_reserved_resources.remote("", recompute=True), timeout=5)


def a_node_is_leaving() -> bool:
    """Whether Ray has told this worker that a node with a worker is about to be taken away."""
    context = get("context")
    return context is not None and context().preemption_context.preemption_info is not None


def end_workers() -> None:
    """Kills the workers that the controller in this process has started."""
    actor_table = get("actors")
    if actor_table is None:
        return
    core = ray._private.worker.global_worker.core_worker  # type: ignore[attr-defined]
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    for actor_id, actor in actor_table(None, job, "ALIVE").items():
        if actor["ActorClassName"].endswith("RayTrainWorker"):
            core.kill_actor(ray.ActorID.from_hex(actor_id), True)
