"""Starts a run on Ray Train: preflight, scaling, failures, progress."""

import contextlib
import math
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cifar_dist.data.store import use_decoded
from cifar_dist.environment import limit_waits
from cifar_dist.errors import UserError
from cifar_dist.storage import Folder, open_uri, seal, to_json
from cifar_dist.train import preflight
from cifar_dist.train.attempt import Attempts
from cifar_dist.train.checkpoint import Checkpoint, Checkpoints
from cifar_dist.train.cluster import connect, count_resource, uses_gpu
from cifar_dist.train.plan import Job, Launch, Plan
from cifar_dist.train.progress import Display, StartUp
from cifar_dist.train.telemetry import Telemetry
from cifar_dist.train.trainer import StartLimit, Trainer
from cifar_dist.versions import git_commit

NODE_SECONDS = 60.0  # for a node to answer preflight's questions
QUICK_SECONDS = 30.0  # after a failure: another one then waits before the workers are started again
RETRY_SECONDS, MOST_RETRY_SECONDS = 5.0, 30.0  # the first such wait, which doubles, and the longest
START_SECONDS = 60.0  # for nodes to be found and Python to start, before the ranks' limit counts
STOP_SECONDS = 20.0  # for the workers to store a checkpoint at a signal; pods and Slurm give 30 s


@dataclass(frozen=True)
class RunResult:
    """A finished run: its URI, its best checkpoint and whether it had been finished before."""

    run_uri: str
    best: Checkpoint
    was_finished: bool


@ray.remote(num_cpus=0)
class Progress:
    """A mailbox between rank 0 and the driver, beside which it lives; what is measured goes on to Prometheus."""

    def __init__(self, run: str, model: str) -> None:
        self.events: list[dict[str, Any]] = []
        self.num_starts = self.num_updates = 0
        self.is_training = self.is_stopping = False
        self.telemetry = Telemetry(run, model)

    def measured(self, values: dict[str, Any]) -> None:
        """What is not shown."""
        self.telemetry.set(values)

    def update(self, values: dict[str, Any]) -> None:
        self.num_updates += 1
        self.telemetry.set(values)
        self.events.append(values)

    def say(self, message: str) -> None:
        self.events.append({"message": message})

    def started(self) -> int:
        """How often workers were started under this driver, this time included."""
        self.num_starts += 1
        return self.num_starts

    def updates(self) -> int:
        """How many steps and epochs were logged."""
        return self.num_updates

    def trains(self) -> None:
        """Rank 0 says that there is something to store."""
        self.is_training = True

    def stop(self) -> bool:
        """Asks the workers to store a checkpoint and to end; returns whether there is anything to store."""
        self.is_stopping = True
        return self.is_training

    def asks_to_stop(self) -> bool:
        return self.is_stopping

    def drain(self) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events


def train_function(settings: dict[str, Any]) -> None:
    """Ray Train's train function, on each worker."""
    job: Job = settings["job"]
    job.start_up.end("worker processes")
    # Not above: the driver and Ray Train's controller load this module, and have no use for DALI, which takes seconds.
    from cifar_dist.train.worker import train_worker  # noqa: PLC0415

    job.start_up.end("worker imports")
    train_worker(job)


class StopOnUserError(UserCallback):
    """Runs in Ray Train's controller when workers have failed. `progress` is the job's actor."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress
        self.num_quick = 0  # failures in a row, each soon after the one before, with nothing logged in between
        self.num_updates, self.failed_at = 0, -math.inf

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Ends the run at an error that would come again; waits before a retry where failures follow each other."""
        for error in worker_exceptions.values():
            if isinstance(error, UserError):
                raise error
        has_moved, is_soon = self.has_moved(), time.monotonic() - self.failed_at < QUICK_SECONDS
        self.num_quick = self.num_quick + 1 if is_soon and not has_moved else 0
        if self.num_quick:  # what the machine lacks, memory say, others may give back
            time.sleep(min(RETRY_SECONDS * 2 ** (self.num_quick - 1), MOST_RETRY_SECONDS))
        self.failed_at = time.monotonic()
        look_for_nodes()

    def has_moved(self) -> bool:
        """Whether a step or an epoch was logged since the last failure."""
        before = self.num_updates
        with contextlib.suppress(ray.exceptions.RayError):
            self.num_updates = ray.get(self.progress.updates.remote(), timeout=5)
        return self.num_updates > before


def look_for_nodes() -> None:
    """Has Ray's elastic policy count the nodes now: by itself it counts on what a dead one had for up to 20 s, and then
    waits in vain for it."""
    with contextlib.suppress(ray.exceptions.RayError):  # then it is as slow as without
        coordinator = get_or_create_autoscaling_coordinator()
        ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=5)


def resources_per_worker(plan: Plan) -> dict[str, float]:
    """CPUs (as many as fit evenly) and GPUs for each worker. Raises UserError if the cluster cannot hold them."""
    launch = plan.launch
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    least = launch.min_workers or launch.num_workers
    gpu = uses_gpu(launch.device, least)

    def places(cpus: int) -> int:
        return sum(min(int(n.get("CPU", 0)) // cpus, int(n.get("GPU", 0)) if gpu else 1 << 20) for n in nodes)

    most = max((int(n.get("CPU", 0)) for n in nodes), default=0)
    for wanted in range(launch.num_workers, least - 1, -1):  # all of them if they fit, else as many as do
        for cpus in range(most, 0, -1):
            if places(cpus) >= wanted:
                return {"CPU": cpus, **({"GPU": 1} if gpu else {})}
    total = sum(int(n.get("CPU", 0)) for n in nodes)
    raise UserError(f"{least} workers need a CPU each, the cluster has {total} on {len(nodes)} nodes; lower --workers")


def check_nodes(plan: Plan, use_gpu: bool) -> list[preflight.Finding]:
    """Preflight on every node that can hold a worker: here at once on a cluster of our own, else by a task on each."""
    launch, run, token = plan.launch, Folder(plan.launch.run_uri), uuid.uuid4().hex
    mine = f"{preflight.FOLDER}/{token}"  # another start of the run may be looking too
    run.create(mine)
    run.write(f"{mine}/token", token.encode())
    needs = ("CPU", "GPU") if use_gpu else ("CPU",)
    nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"] and all(n["Resources"].get(name) for name in needs)]
    where = launch.run_uri, plan.data_uri, launch.staging_folder, token
    seen, silent = [], []
    try:
        if launch.address is None:
            seen = [preflight.look(node, *where) for node in nodes]
        else:
            look = ray.remote(num_cpus=0)(preflight.look)
            pins = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
            tasks = [look.options(scheduling_strategy=p).remote(n, *where) for n, p in zip(nodes, pins, strict=True)]
            ray.wait(tasks, num_returns=len(tasks), timeout=NODE_SECONDS)
            for node, task in zip(nodes, tasks, strict=True):
                try:
                    seen.append(ray.get(task, timeout=0))
                except ray.exceptions.RayError as error:
                    silent.append(preflight.Finding("answers", node, "warning", str(error).splitlines()[0]))
            if silent and (not launch.min_workers or not seen):  # else the run goes on with the others
                raise UserError(
                    f"a node of the cluster does not answer preflight's questions: {silent[0].text}; with --workers "
                    "MIN:MAX the run begins without it"
                )
        written = run.names(mine)
    finally:
        run.delete(mine)
        run.delete_empty(preflight.FOLDER)
        run.delete_empty("")
    data = plan.config.data
    decoded = use_decoded(
        plan.manifest.image_shape("train"), plan.manifest.num_rows("train"), data.cache, data.cache_budget_mib
    )
    return [*silent, *preflight.judge(seen, plan.manifest, token, decoded, use_gpu, written)]


def check_cluster(plan: Plan) -> tuple[dict[str, float], list[preflight.Finding]]:
    """Connects; returns each worker's resources and preflight's findings. Raises UserError if workers do not fit."""
    connect(plan.launch.address, plan.launch.num_workers)
    resources = resources_per_worker(plan)
    text = f"{plan.launch.num_workers} of " + ", ".join(f"{v:g} {k}" for k, v in resources.items())
    fits = preflight.Finding("workers", "cluster", "ok", text)
    return resources, [fits, *check_nodes(plan, "GPU" in resources)]


def train(plan: Plan, start_up: StartUp | None = None) -> RunResult:
    """Runs or continues a run to its last epoch.

    Raises UserError for nodes that preflight finds unfit, data or storage that fail, a loss that is not finite, and
    workers that died more than `max_failures` times.
    """
    config, launch = plan.config, plan.launch
    if plan.is_finished:
        return finished(plan)
    start_up = start_up or StartUp()
    start = time.monotonic()
    resources, findings = check_cluster(plan)
    if wrong := [f for f in findings if f.status != "ok"]:
        print(preflight.table(wrong), flush=True)
    if faults := [f"{f.check} on {f.node}: {f.text}" for f in findings if f.status == "failed"]:
        raise UserError(f"preflight failed: {'; '.join(faults)}")
    print(f"preflight: {len(findings)} checks in {time.monotonic() - start:.1f} s", flush=True)
    start_up.end("preflight")
    run = Folder(launch.run_uri)
    driver = uuid.uuid4().hex[:8]
    attempt = Attempts(run, driver).claim(takeover=True)
    run.write("config.json", to_json(seal(plan.card)))
    run.delete("ray")  # Ray Train's own bookkeeping: our checkpoints do not need it, and a damaged one blocks a resume
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    progress = Progress.options(scheduling_strategy=here).remote(launch.name, config.model.model)  # type: ignore[attr-defined]
    job = Job(
        config,
        plan.data_uri,
        plan.manifest.sha256,
        launch.run_uri,
        launch.staging_folder,
        int(resources["CPU"]),
        git_commit(),
        progress,
        driver,
        attempt,
        plan.weights,
        start_up,
        launch.profile,
        launch.collective_timeout_seconds,
    )
    if launch.min_workers:
        look_for_nodes()
    use_gpu = "GPU" in resources
    limit_waits(launch.collective_timeout_seconds)
    filesystem, path = open_uri(launch.run_uri)
    trainer = Trainer(
        train_function,
        owns_cluster=launch.address is None,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=(launch.min_workers, launch.num_workers)  # type: ignore[arg-type]
            if launch.min_workers
            else launch.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=launch.resize_seconds,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name="ray",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=launch.max_failures),
            callbacks=[StopOnUserError(progress), StartLimit(START_SECONDS + launch.collective_timeout_seconds)],  # type: ignore[list-item]
            worker_runtime_env={"env_vars": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}}
            if config.loop.deterministic
            else None,
        ),
        backend="nccl" if use_gpu else "gloo",
        limit_seconds=launch.collective_timeout_seconds,
    )

    def drain() -> list[dict[str, Any]]:
        try:
            return ray.get(progress.drain.remote())
        except ray.exceptions.RayError:  # only the display is lost; fit() reports what failed
            return []

    def why_quiet() -> str:
        least = launch.min_workers or launch.num_workers
        with contextlib.suppress(ray.exceptions.RayError, ConnectionError):  # as above
            for name, each in resources.items():
                if (total := count_resource(name)) < least * each:
                    return (
                        f"waiting for nodes: {least} workers need {least * each:g} {name}, the cluster has {total} now"
                    )
        return ""

    try:
        with Display(drain, config.loop.epochs, why_quiet):
            fit(trainer, lambda: ray.get(progress.stop.remote(), timeout=STOP_SECONDS))
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        Attempts(run, driver).check_driver()  # where another start has taken over, that is the reason
        raise UserError(why_failed(error, launch)) from error
    return finished(plan)


def fit(trainer: Trainer, stop: Callable[[], bool]) -> None:
    """trainer.fit() in a thread, so that signals reach this one at once, and not Ray Train's own handler.

    At a signal `stop` asks the workers for a checkpoint, for which they get STOP_SECONDS.
    """
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            trainer.fit()
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while not outcome.done():
            wait([outcome], timeout=0.2)  # not Thread.join(): a signal makes Python take the thread for ended
    except KeyboardInterrupt:
        with contextlib.suppress(ray.exceptions.RayError):
            if stop():
                print("stopping: a checkpoint is being stored; a second signal ends at once", flush=True)
                wait([outcome], timeout=STOP_SECONDS)
        raise
    outcome.result()


def why_failed(error: Exception, launch: Launch) -> str:
    """The sentence for a run that Ray Train has given up."""
    cause, kept = getattr(error, "controller_failure", None), "what was stored is kept, run the same command to go on"
    if isinstance(cause, UserError):
        return str(cause)
    name, reason = launch.name, first_cause(cause or error)
    if isinstance(error, ray.exceptions.RayActorError):
        return f"Ray Train's controller of run {name} died, on the node of this job: {reason}; {kept}"
    if failures := getattr(error, "worker_failures", None):
        texts = [f"{type(failure).__name__} {failure}" for failure in failures.values()]
        memory = any("OutOfMemoryError" in text or "low on memory" in text for text in texts)
        advice = "; the machine is out of memory: use fewer --workers or a smaller --global-batch-size" * memory
        return f"the workers of run {name} failed more than {launch.max_failures} times: {reason}{advice}; {kept}"
    return f"Ray could not go on with run {name}: {reason}; is the cluster alive? {kept[0].upper()}{kept[1:]}"


def first_cause(error: Exception) -> str:
    """The last line of what the first failed worker said, or of the error itself."""
    failures = getattr(error, "worker_failures", None)
    rank, cause = min(failures.items()) if failures else (None, error)
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    text = lines[-1] if lines else type(cause).__name__
    return text if rank is None else f"rank {rank}: {text}"


def finished(plan: Plan) -> RunResult:
    best = Checkpoints(plan.launch.run_uri).best()
    assert best is not None  # a finished run has one
    return RunResult(plan.launch.run_uri, best, plan.is_finished)
