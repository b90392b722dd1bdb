"""Starts a run on Ray Train: checks, scaling, failures, storage, progress."""

import json
import logging
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from cifar_dist.config import FREE_ON_RESUME, Config
from cifar_dist.data import order
from cifar_dist.data.loader import use_decoded
from cifar_dist.data.store import Manifest, read_manifest
from cifar_dist.errors import UserError
from cifar_dist.storage import Folder, absolute_uri, join_uri, open_uri, to_json
from cifar_dist.train.checkpoint import Checkpoint, Checkpoints
from cifar_dist.train.progress import Display
from cifar_dist.train.setup import build_model, image_spec, load_start_weights
from cifar_dist.train.worker import Job, train_worker


@dataclass(frozen=True)
class Launch:
    """Where and how a run is launched: workers, storage and limits. Nothing here changes what is learned."""

    data_uri: str
    storage_uri: str
    name: str
    num_workers: int = 1
    recipe: str = ""
    device: str = "auto"  # auto, cpu or gpu
    max_failures: int = 3
    collective_timeout_seconds: int = 300
    staging_folder: str | None = None
    address: str | None = None  # of a Ray cluster; None starts one on this machine

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise UserError(f"--workers must be 1 or more, not {self.num_workers}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise UserError(
                f"--name {self.name!r} is no run name: up to 100 letters, digits, dots, dashes and underscores, "
                "beginning with a letter or digit; a folder goes into --storage"
            )
        if self.max_failures < 0:
            raise UserError(f"--max-failures must be 0 or more, not {self.max_failures}")

    @property
    def run_uri(self) -> str:
        return join_uri(absolute_uri(self.storage_uri), self.name)


@dataclass(frozen=True)
class RunResult:
    """A finished run: its URI, its best checkpoint and whether it had been finished before."""

    run_uri: str
    best: Checkpoint
    was_finished: bool


@ray.remote(num_cpus=0)
class Progress:
    """A mailbox between rank 0 and the driver."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def update(self, values: dict[str, Any]) -> None:
        self.events.append(values)

    def say(self, message: str) -> None:
        self.events.append({"message": message})

    def drain(self) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events


def connect(address: str | None, num_workers: int) -> None:
    """Connects to the Ray cluster at `address`, or starts one on this machine if it is None."""
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # More workers than cores is slow but sound, and how a laptop rehearses a cluster.
        num_cpus = max(os.cpu_count() or 1, num_workers)
        # Ray Train asks the dashboard whether its controller lives. Without one of its own it would ask that of another
        # cluster on this machine, take the "no" for a death and stop the workers.
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=True, **quiet)
        return
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


def resources_per_worker(num_workers: int, device: str) -> dict[str, float]:
    """CPUs (as many as fit evenly) and GPUs for each worker. Raises UserError if the cluster cannot hold them."""
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    gpu = uses_gpu(device, num_workers)

    def places(cpus: int) -> int:
        return sum(min(int(n.get("CPU", 0)) // cpus, int(n.get("GPU", 0)) if gpu else num_workers) for n in nodes)

    most = max((int(n.get("CPU", 0)) for n in nodes), default=0)
    for cpus in range(most, 0, -1):
        if places(cpus) >= num_workers:
            return {"CPU": cpus, **({"GPU": 1} if gpu else {})}
    total = sum(int(n.get("CPU", 0)) for n in nodes)
    raise UserError(
        f"{num_workers} workers need a CPU each, the cluster has {total} on {len(nodes)} nodes; lower --workers"
    )


def check_run(config: Config, launch: Launch, manifest: Manifest) -> bool:
    """Checks settings, data and stored run against each other; returns whether the run is finished already."""
    batch = config.loop.global_batch_size
    if batch < launch.num_workers:
        raise UserError(f"--global-batch-size {batch} is less than one image for each of {launch.num_workers} workers")
    num_train = manifest.num_rows("train")
    # As the split does: the labels alone decide how many images validate.
    labels = np.repeat(np.arange(manifest.num_classes), manifest.splits["train"]["num_rows_per_class"])
    rest, validation = (len(ids) for ids in order.train_validation_ids(labels, config.data.validation_fraction, 0, 0))
    if not validation:
        raise UserError(f"no class of {launch.data_uri} has the 2 train images that a validation split needs")
    if config.data.train_images > rest:
        raise UserError(
            f"--train-images is {config.data.train_images}, the data set has {num_train} train images, of which "
            f"{validation} are held out for validation"
        )
    use_decoded(manifest.image_shape("train"), num_train, config.data.cache, config.data.cache_budget_mib)
    weights = None
    if config.model.weights:  # into a network of its own: what does not fit is found before anything is stored
        cpu = torch.device("cpu")
        weights = load_start_weights(config, build_model(config, manifest.num_classes, image_spec(config, cpu), cpu))
    run = Folder(launch.run_uri)
    mine: dict[str, Any] = {"config": config.to_dict(), "manifest_sha256": manifest.sha256}
    try:
        stored = json.loads(run.read("config.json"))
        old_config, old_data = (stored[key] for key in mine)
        old_weights = stored.get("weights") or {}
    except FileNotFoundError:
        stored = None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{launch.run_uri}/config.json is damaged ({error!r}); use another --name") from error
    if stored:
        if old_data != manifest.sha256:
            raise UserError(f"the run {launch.name} was started on another data set; use another --name")
        if old_weights.get("sha256") != (weights or {}).get("sha256"):
            raise UserError(
                f"the run {launch.name} was started from {old_weights.get('uri', 'random weights')}, which --weights "
                f"{config.model.weights or 'that is not given'} is not; name the same file, or use another --name"
            )
        for section, values in mine["config"].items():
            for name, value in values.items():
                old = old_config.get(section, {}).get(name)
                if old != value and name not in FREE_ON_RESUME:
                    raise UserError(
                        f"the run {launch.name} was started with {name}={old}, not {value}; use the same setting to "
                        "continue it, or another --name"
                    )
    latest = Checkpoints(launch.run_uri).latest()
    if latest and latest.cursor.epoch >= config.loop.epochs:
        return True
    run.create()
    card = {
        **mine,
        "weights": weights,
        "recipe": launch.recipe,
        "data_uri": launch.data_uri,
        "num_workers": launch.num_workers,
    }
    run.write("config.json", to_json(card))
    return False


def git_commit() -> str:
    """The commit of the source tree, with '+' if it was changed; 'unknown' outside a checkout."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", ".")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def train(config: Config, launch: Launch) -> RunResult:
    """Runs or continues a run to its last epoch; connects to the Ray cluster once all else is checked.

    Raises UserError for settings, data or storage that do not fit, a loss that is not finite, and workers that died
    more than `max_failures` times.
    """
    data_uri = absolute_uri(launch.data_uri)
    if config.model.weights:
        config = config.replace(weights=absolute_uri(config.model.weights))
    manifest = read_manifest(data_uri)
    if check_run(config, launch, manifest):
        return finished(launch, was_finished=True)
    connect(launch.address, launch.num_workers)
    resources = resources_per_worker(launch.num_workers, launch.device)
    use_gpu = "GPU" in resources
    progress = Progress.remote()  # type: ignore[attr-defined]
    job = Job(
        config,
        data_uri,
        manifest.sha256,
        launch.run_uri,
        launch.staging_folder,
        int(resources["CPU"]),
        git_commit(),
        progress,
    )
    run = Folder(launch.run_uri)
    run.delete("status.json")
    run.delete("ray")  # Ray Train's own bookkeeping: our checkpoints do not need it, and a damaged one blocks a resume
    filesystem, path = open_uri(launch.run_uri)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=launch.num_workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(  # type: ignore[call-arg]
            name="ray",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=launch.max_failures),
            worker_runtime_env={"env_vars": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}}
            if config.loop.deterministic
            else None,
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=launch.collective_timeout_seconds),
    )

    def drain() -> list[dict[str, Any]]:
        try:
            return ray.get(progress.drain.remote())
        except ray.exceptions.RayError:  # only the display is lost; fit() reports what failed
            return []

    try:
        with Display(drain, config.loop.epochs):
            trainer.fit()
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        raise UserError(
            f"the workers of run {launch.name} failed more than {launch.max_failures} times: {first_cause(error)}; "
            "what was stored is kept, run the same command to go on"
        ) from error
    return finished(launch, was_finished=False)


def first_cause(error: Exception) -> str:
    """The last line of what the first failed worker said."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    rank, cause = min(failures.items())
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    text = lines[-1] if lines else type(cause).__name__
    return f"rank {rank}: {text.removeprefix('cifar_dist.errors.UserError: ')}"


def finished(launch: Launch, was_finished: bool) -> RunResult:
    run = Folder(launch.run_uri)
    if not was_finished:
        status = json.loads(run.read("status.json"))
        if status["status"] != "finished":
            raise UserError(status["message"])
    best = Checkpoints(launch.run_uri).best()
    assert best is not None  # a finished run has one
    return RunResult(launch.run_uri, best, was_finished)
