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
from cifar_dist.job_settings import Launch
from cifar_dist.launch import preflight, ray_private
from cifar_dist.launch.cluster import check_cluster, count_resource
from cifar_dist.launch.failures import StopOnUserError, why_failed
from cifar_dist.launch.progress import Display, Progress
from cifar_dist.launch.trainer import Trainer, start_limits, torch_config
from cifar_dist.run.checkpoint import Checkpoint
from cifar_dist.run.folder import Run
from cifar_dist.train.job import Job, Plan, StartUp
from cifar_dist.uris import open_uri
from cifar_dist.versions import git_commit

START_SECONDS = 60.0  # to find nodes and start Python; added to the ranks' own time limit
STOP_SECONDS = 20.0  # for workers to store a checkpoint after a signal; Kubernetes and Slurm kill after 30 s


@dataclass(frozen=True)
class RunResult:
    """A finished run, its best checkpoint, and whether the run was finished before this job."""

    run: Run
    best: Checkpoint
    was_finished: bool


def train_function(settings: dict[str, Any]) -> None:
    """Ray Train's train function, on each worker."""
    job: Job = settings["job"]
    job.start_up.end("worker processes")
    # Imported here: the driver and Ray Train's controller load this module too, and importing DALI takes seconds.
    from cifar_dist.train.worker import train_worker  # noqa: PLC0415

    job.start_up.end("worker imports")
    train_worker(job, ray_private.a_node_is_leaving)


def drive(plan: Plan, start_up: StartUp | None = None) -> RunResult:
    """Starts or resumes a run and trains to its last epoch.

    Raises UserError if preflight fails, data or storage fail, the loss is not finite, or workers died more than
    `max_failures` times.
    """
    if plan.is_finished:
        return finished(plan)
    start_up = start_up or StartUp()
    resources = preflight_passed(plan)
    start_up.end("preflight")
    driver = uuid.uuid4().hex[:8]
    attempt = plan.run.attempts(driver).claim(takeover=True)
    plan.run.write_card(plan.card)
    # Ray Train's own state: our checkpoints do not need it, and if damaged it would block a resume.
    plan.run.folder.delete("ray")
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    names = plan.run.name, plan.config.model.model
    progress = Progress.options(scheduling_strategy=here).remote(*names)  # type: ignore[attr-defined]
    job = Job(
        plan=plan,
        driver=driver,
        attempt=attempt,
        progress=progress,
        start_up=start_up,
        num_cpus_per_worker=int(resources["CPU"]),
        git_commit=git_commit(),
        limit_seconds=plan.launch.limit_seconds(gpu="GPU" in resources),
    )
    if plan.launch.min_workers:
        ray_private.look_for_nodes()
    trainer = make_trainer(job, resources)
    try:
        with Display(lambda: drain(progress), plan.config.loop.epochs, lambda: idle_reason(plan.launch, resources)):
            fit(trainer, lambda: ray.get(progress.stop.remote(), timeout=STOP_SECONDS))
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        plan.run.attempts(driver).check_driver()  # a takeover by another job is then the reason
        raise UserError(why_failed(error, plan.launch)) from error
    return finished(plan)


def preflight_passed(plan: Plan) -> dict[str, float]:
    """Runs preflight and returns each worker's resources. Prints warnings; raises UserError if a check failed."""
    start = time.monotonic()
    resources, findings = check_cluster(plan)
    if wrong := [f for f in findings if f.status != "ok"]:
        print(preflight.table(wrong), flush=True)
    if faults := [f"{f.check} on {f.node}: {f.text}" for f in findings if f.status == "failed"]:
        raise UserError(f"preflight failed: {'; '.join(faults)}")
    if loss := ray_private.warning():
        print(f"WARNING: {loss}", flush=True)
    print(f"preflight: {len(findings)} checks in {time.monotonic() - start:.1f} s", flush=True)
    return resources


def make_trainer(job: Job, resources: dict[str, float]) -> Trainer:
    """Returns Ray Train's trainer for a job. `resources`: of each worker."""
    launch, limit_seconds = job.plan.launch, job.limit_seconds
    use_gpu, owns_cluster = "GPU" in resources, launch.cluster is None
    limit_waits(limit_seconds)
    filesystem, path = open_uri(job.plan.run.uri)
    callbacks: list[Any] = [StopOnUserError(job.progress), *start_limits(START_SECONDS + limit_seconds)]
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if job.plan.config.loop.deterministic else {}
    num_workers: Any = (launch.min_workers, launch.num_workers) if launch.min_workers else launch.num_workers
    return Trainer(
        train_function,
        owns_cluster=owns_cluster,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=num_workers,
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
            worker_runtime_env={"env_vars": variables} if variables else None,
        ),
        torch_config=torch_config(
            owns_cluster=owns_cluster, backend="nccl" if use_gpu else "gloo", limit_seconds=limit_seconds
        ),
    )


def drain(progress: Any) -> list[dict[str, Any]]:
    """Returns the events that rank 0 has sent since the last call."""
    try:
        return ray.get(progress.drain.remote())
    except ray.exceptions.RayError:  # only the display is lost; fit() reports what failed
        return []


def idle_reason(launch: Launch, resources: dict[str, float]) -> str:
    """Returns which resources are missing if the cluster is too small for the workers, else ''."""
    least = launch.min_workers or launch.num_workers
    with contextlib.suppress(ray.exceptions.RayError, ConnectionError):  # only the display loses this message
        for name, each in resources.items():
            if (total := count_resource(name)) < least * each:
                return f"waiting for nodes: {least} workers need {least * each:g} {name}, the cluster has {total} now"
    return ""


def fit(trainer: Trainer, stop: Callable[[], bool]) -> None:
    """Runs trainer.fit() in a thread. Signals then interrupt this thread at once and bypass Ray Train's handler.

    At a signal `stop` asks the workers to store a checkpoint, for which they get STOP_SECONDS.
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
            wait([outcome], timeout=0.2)  # not Thread.join(): after a signal Python treats the thread as ended
    except KeyboardInterrupt:
        with contextlib.suppress(ray.exceptions.RayError):
            if stop():
                print("stopping: a checkpoint is being stored; a second signal ends at once", flush=True)
                wait([outcome], timeout=STOP_SECONDS)
        raise
    outcome.result()


def finished(plan: Plan) -> RunResult:
    best = plan.run.best()
    assert best is not None  # a finished run has a best checkpoint
    return RunResult(plan.run, best, plan.is_finished)
