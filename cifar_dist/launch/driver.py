"""Starts a run on Ray Train: preflight, scaling, failures, progress."""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cifar_dist.environment import limit_waits
from cifar_dist.errors import UserError
from cifar_dist.launch import preflight, ray_private
from cifar_dist.launch.cluster import check_cluster, count_resource
from cifar_dist.launch.failures import StopOnUserError, why_failed
from cifar_dist.launch.progress import Display, Progress
from cifar_dist.launch.trainer import Trainer, start_limits, torch_config
from cifar_dist.run.checkpoint import Checkpoint
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.ownership import Attempts
from cifar_dist.sealed_json import seal, to_json
from cifar_dist.storage import Folder
from cifar_dist.train.job import Job, Plan, StartUp
from cifar_dist.uris import open_uri
from cifar_dist.versions import git_commit

START_SECONDS = 60.0  # for nodes to be found and Python to start, before the ranks' limit counts
STOP_SECONDS = 20.0  # for the workers to store a checkpoint at a signal; pods and Slurm give 30 s


@dataclass(frozen=True)
class RunResult:
    """A finished run: its URI, its best checkpoint and whether it had been finished before."""

    run_uri: str
    best: Checkpoint
    was_finished: bool


def train_function(settings: dict[str, Any]) -> None:
    """Ray Train's train function, on each worker."""
    job: Job = settings["job"]
    job.start_up.end("worker processes")
    # Not above: the driver and Ray Train's controller load this module, and have no use for DALI, which takes seconds.
    from cifar_dist.train.worker import train_worker  # noqa: PLC0415

    job.start_up.end("worker imports")
    train_worker(job, ray_private.a_node_is_leaving)


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
    if loss := ray_private.warning():
        print(f"WARNING: {loss}", flush=True)
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
        ray_private.look_for_nodes()
    use_gpu = "GPU" in resources
    limit_waits(launch.collective_timeout_seconds)
    filesystem, path = open_uri(launch.run_uri)
    start_seconds = START_SECONDS + launch.collective_timeout_seconds
    callbacks: list[Any] = [StopOnUserError(progress), *start_limits(start_seconds)]
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
            callbacks=callbacks,
            worker_runtime_env={"env_vars": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}}
            if config.loop.deterministic
            else None,
        ),
        torch_config=torch_config(
            owns_cluster=launch.address is None,
            backend="nccl" if use_gpu else "gloo",
            limit_seconds=launch.collective_timeout_seconds,
        ),
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


def finished(plan: Plan) -> RunResult:
    best = Checkpoints(plan.launch.run_uri).best()
    assert best is not None  # a finished run has one
    return RunResult(plan.launch.run_uri, best, plan.is_finished)
