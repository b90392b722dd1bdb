"""What runs inside each Ray Train worker: set up, resume, train epoch by epoch, validate, checkpoint."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from cifar_dist.config import Config
from cifar_dist.data import order
from cifar_dist.data.loader import Batch, Loader, eval_plans, train_plans
from cifar_dist.data.store import read_manifest
from cifar_dist.errors import UserError
from cifar_dist.storage import Folder, to_json
from cifar_dist.train.checkpoint import Checkpoint, Checkpoints, Cursor
from cifar_dist.train.loop import (
    Clock,
    TrainState,
    average_batchnorm_over_ranks,
    recalibrate_batchnorm,
    sum_over_ranks,
    train_epoch,
    validate,
)
from cifar_dist.train.metrics import RunLog, chance_warning, validation_lags, validation_warning
from cifar_dist.train.optim import average_of, make_optimizers
from cifar_dist.train.precision import Precision
from cifar_dist.train.setup import augmentation, build_model, image_spec, load_start_weights, split_ids, weights_notice

EVAL_BATCH = 100
DIAGNOSIS_BATCHES = 20  # of training images, when validation lags behind training


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker. `progress` is a Ray actor handle."""

    config: Config
    data_uri: str
    manifest_sha256: str
    run_uri: str
    staging_folder: str | None
    num_cpus_per_worker: int
    git_commit: str
    progress: Any


class Diverged(Exception):
    """The loss or the weights are no longer finite; raised on all ranks at once."""


def train_worker(settings: dict[str, Any]) -> None:
    """Ray Train's train function.

    A fault while a rank is set up, or a loss that is not finite, ends the run on every rank with a status. Any other
    error is raised: Ray Train stops the other ranks and starts the group again.
    """
    job: Job = settings["job"]
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL's object collectives use the current device
    fault = None
    try:
        worker = Worker(job, device)
    except UserError as error:
        fault = str(error)
    # Before the first collective of DDP: so no rank waits for one that gave up, and all resume from the same place.
    ready: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ready, (fault, None if fault else worker.state.cursor))
    fault = next((f for f, _ in ready if f), None)
    if fault is None and len({cursor for _, cursor in ready}) > 1:
        fault = f"the workers do not see the same checkpoints in {job.run_uri}; is the storage shared by all nodes?"
    try:
        if fault is None:
            worker.run()
    except Diverged as error:
        fault = str(error)
    if ray.train.get_context().get_world_rank() == 0:
        status = {"status": "failed", "message": fault} if fault else {"status": "finished"}
        Folder(job.run_uri).write("status.json", to_json(status))


class Worker:
    """One rank of a run, set up and resumed from the newest checkpoint."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, config = job, job.config
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        # On a laptop there may be more workers than cores.
        cores = (os.cpu_count() or 1) // context.get_local_world_size()
        self.num_threads = max(1, min(job.num_cpus_per_worker, cores))
        torch.set_num_threads(self.num_threads)
        torch.use_deterministic_algorithms(config.loop.deterministic)
        self.manifest = read_manifest(job.data_uri)
        if self.manifest.sha256 != job.manifest_sha256:
            raise UserError(f"{job.data_uri} is not the same data set on every worker; is the storage shared?")
        spec = image_spec(config, device)
        batch_size = max(-(-config.loop.global_batch_size // self.world), EVAL_BATCH)
        threads = config.data.dali_threads or self.num_threads
        cache = config.data.cache, config.data.cache_budget_mib, job.staging_folder
        self.loader = Loader(job.data_uri, self.manifest, "train", spec, device, threads, batch_size, *cache)
        self.train_ids, self.validation_ids = split_ids(config, self.loader.staged.labels)
        model = build_model(config, self.manifest.num_classes, spec, device)
        self.weights = load_start_weights(config, model)
        self.state = TrainState(
            config,
            model,
            model,
            make_optimizers(model, config.optim),
            Precision(config.loop.precision, device),
            average_of(model, config.optim),
            device,
            self.rank,
            self.world,
            order.num_steps(len(self.train_ids), config.loop.global_batch_size),
            totals=torch.zeros(3, dtype=torch.float64, device=device),
        )
        self.checkpoints, self.attempt, self.warned = Checkpoints(job.run_uri), 1, set[str]()
        self.diagnosed = False
        resumed = self.checkpoints.latest()
        if resumed:
            self._resume(resumed)
            self._say(f"continuing from {resumed.name} (attempt {self.attempt})")
        self.log = RunLog(job.run_uri, self.state.global_step) if self.rank == 0 else None

    def _wrap(self, model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        compile = self.job.config.loop.compile
        gpu = device.type == "cuda"
        wrapped: Any = torch.compile(model) if compile == "on" or (compile == "auto" and gpu) else model
        if self.world == 1:
            return wrapped
        # Moving statistics are averaged where they are read, so DDP need not broadcast them at every step.
        devices = [device] if gpu else None
        return DistributedDataParallel(wrapped, devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def _resume(self, checkpoint: Checkpoint) -> None:
        state, meta = self.state, checkpoint.meta
        expect = {"model": self.job.config.model.model, "manifest_sha256": self.manifest.sha256}
        loaded = self.checkpoints.load(checkpoint, expect)
        state.model.load_state_dict(loaded["model"])
        if state.average is not None:
            state.average.module.load_state_dict(loaded["average"])
            state.average.n_averaged.fill_(meta["num_averaged"])
        for optimizer, stored in zip(state.optimizers, loaded["optimizer"]["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        state.precision.scaler.load_state_dict(loaded["optimizer"]["scaler"])
        state.cursor = checkpoint.cursor
        if self.rank == 0:  # the others start from zero: only the sum over ranks is ever used
            state.totals += torch.tensor(meta["totals"], dtype=torch.float64, device=state.device)
        self.attempt = meta["attempt"] + 1

    def run(self) -> None:
        """Trains from the cursor to the last epoch. Raises Diverged on all ranks."""
        config, state = self.job.config, self.state
        state.wrapped = self._wrap(state.model, state.device)
        self._say(
            f"training {config.model.model} on {len(self.train_ids)} images, validating on {len(self.validation_ids)}: "
            f"{self.world} workers of {self.num_threads} CPU threads each, {state.device.type}, {state.precision.name}"
        )
        if notice := weights_notice(config, self.weights):
            self._say(f"WARNING: {notice}")
        while state.cursor.epoch < config.loop.epochs:
            batches = self._train_batches(state.cursor)
            clock = train_epoch(state, batches, self._on_log, self._write_checkpoint)
            self._end_epoch(clock)

    def _train_batches(self, cursor: Cursor) -> Iterator[Batch]:
        config = self.job.config
        batch_size, seed = config.loop.global_batch_size, config.loop.seed
        augment = augmentation(config)
        return self.loader.batches(
            train_plans(self.train_ids, augment, seed, *cursor, batch_size, self.rank, self.world)
        )

    def _end_epoch(self, clock: Clock) -> None:
        """Validates, logs the epoch, moves the cursor to the next one and writes a checkpoint."""
        state = self.state
        loss, correct, seen = self._finite_totals()
        rates = clock.rates()  # after the totals, which wait for the device
        evaluated = self._average_over_ranks()
        start = time.perf_counter()
        if num_batches := self.job.config.loop.recalibrate_batches:
            self._recalibrate(evaluated, num_batches)
        validation_loss, num_correct, num_validation = self._validate(evaluated)
        metrics = {
            "train_loss": loss / seen,
            "train_accuracy": correct / seen,
            "validation_loss": validation_loss / num_validation,
            "validation_accuracy": num_correct / num_validation,
            "num_validation_correct": int(num_correct),
            "num_validation": int(num_validation),
            "learning_rate": state.learning_rate,
            "validation_seconds": round(time.perf_counter() - start, 3),
            **rates,
        }
        self._check_train_chance(correct / seen, int(seen))
        self._check_validation(evaluated, correct / seen, num_correct / num_validation)
        epoch, global_step = state.cursor.epoch, state.global_step
        state.cursor = Cursor(epoch + 1, 0)
        state.totals.zero_()
        if self.log:
            self.log.add("epoch", epoch, global_step, **metrics)
            self._send({"epoch_done": epoch, **metrics})
        self._write_checkpoint(metrics)
        ray.train.report({"epoch": epoch, **metrics})

    def _recalibrate(self, model: torch.nn.Module, num_batches: int) -> None:
        batches = self._train_batches(Cursor(self.state.cursor.epoch, 0))
        recalibrate_batchnorm(model, batches, num_batches, self.state.precision)

    def _validate(self, model: torch.nn.Module) -> list[float]:
        """[loss sum, correct, seen] over the validation images, of all ranks."""
        plans = eval_plans(self.validation_ids, EVAL_BATCH, self.rank, self.world)
        return sum_over_ranks(validate(model, self.loader.batches(plans), self.state.precision)).tolist()

    def _average_over_ranks(self) -> torch.nn.Module:
        """Makes the moving statistics equal on all ranks; returns the model that is evaluated."""
        average_batchnorm_over_ranks(self.state.model)
        if self.state.average is None:
            return self.state.model
        average_batchnorm_over_ranks(self.state.average.module)
        return self.state.average.module

    def _finite_totals(self) -> list[float]:
        """The epoch's totals over all ranks. Raises Diverged on every rank if the loss is not finite."""
        totals = sum_over_ranks(self.state.totals).tolist()
        if not math.isfinite(totals[0]):
            self._diverged("the training loss")
        return totals

    def _diverged(self, what: str) -> None:
        kept = self.checkpoints.latest()
        good = f"its last good checkpoint {kept.name} is kept" if kept else "it had no checkpoint yet"
        raise Diverged(
            f"{what} became infinite or not a number by step {self.state.global_step}; the run stopped, {good}. Lower "
            "--learning-rate, set --clip-norm, or use another --precision, under another --name"
        )

    def _on_log(self, clock: Clock) -> None:
        state = self.state
        loss, correct, seen = self._finite_totals()
        line = {
            "step": state.cursor.step,
            "train_loss": loss / seen,
            "train_accuracy": correct / seen,
            "learning_rate": state.learning_rate,
            **clock.rates(),
        }
        if self.log:
            self.log.add("step", state.cursor.epoch, state.global_step, **line)
            self._send(line)
        self._check_train_chance(correct / seen, int(seen))

    def _write_checkpoint(self, metrics: dict[str, Any] | None = None) -> None:
        """All ranks call it, rank 0 writes; `metrics` at an epoch's end. Weights that are not finite never are."""
        state, job = self.state, self.job
        totals = self._finite_totals()
        if metrics is None:
            self._average_over_ranks()
        if not math.isfinite(get_total_norm([p.detach() for p in state.model.parameters()])):
            self._diverged("a weight")
        if self.log is None:
            return
        self.log.flush()
        average = state.average.module.state_dict() if state.average is not None else None
        optimizers = [optimizer.state_dict() for optimizer in state.optimizers]
        optimizer = {"optimizers": optimizers, "scaler": state.precision.scaler.state_dict()}
        meta = {
            "model": job.config.model.model,
            "global_step": state.global_step,
            "metrics": metrics,
            "totals": totals,
            "num_averaged": int(state.average.n_averaged) if state.average is not None else 0,
            "config": job.config.to_dict(),
            "precision": state.precision.name,
            "device": torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else "cpu",
            "weights": self.weights,
            "data_uri": job.data_uri,
            "manifest_sha256": self.manifest.sha256,
            "class_names": self.manifest.class_names,
            "num_train": len(self.train_ids),
            "world_size": self.world,
            "num_threads_per_worker": self.num_threads,
            "attempt": self.attempt,
            "git_commit": job.git_commit,
        }
        self.checkpoints.write(state.cursor, state.model.state_dict(), average, optimizer, meta)
        self.checkpoints.keep(job.config.checkpoint.keep_checkpoints)

    def _check_train_chance(self, accuracy: float, num_seen: int) -> None:
        """Warns of a training accuracy that is still at chance after `chance_warning_steps`."""
        after = self.job.config.loop.chance_warning_steps
        if after and self.state.global_step >= after:
            message = chance_warning(accuracy, num_seen, self.manifest.num_classes)
            if message:
                self._warn("train_at_chance", message)

    def _check_validation(self, model: torch.nn.Module, train: float, validation: float) -> None:
        """Where validation stays near chance and training does not: finds out whether BatchNorm's statistics lag."""
        num_classes, after = self.manifest.num_classes, self.job.config.loop.chance_warning_steps
        if self.diagnosed or not after or not validation_lags(train, validation, num_classes):
            return
        self.diagnosed = True
        kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._recalibrate(model, DIAGNOSIS_BATCHES)
        _, num_correct, num_seen = self._validate(model)
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
        momentum = self.job.config.model.batchnorm_momentum
        found = num_correct / num_seen
        message = validation_warning(train, validation, found, num_classes, momentum)
        self._warn("validation_near_chance", message, recalibrated_accuracy=found)

    def _warn(self, kind: str, message: str, **values: Any) -> None:
        """Said once per attempt, recorded once per run."""
        if self.log and kind not in self.warned:
            self.warned.add(kind)
            self._say(f"WARNING: {message}")
            if not any(line.get("warning") == kind for line in self.log.lines):
                place = self.state.cursor.epoch, self.state.global_step
                self.log.add("warning", *place, warning=kind, message=message, **values)

    def _say(self, message: str) -> None:
        if self.rank == 0:
            self.job.progress.say.remote(message)

    def _send(self, values: dict[str, Any]) -> None:
        position = {"global_step": self.state.global_step, "epoch": self.state.cursor.epoch}
        self.job.progress.update.remote({**position, "steps_per_epoch": self.state.steps_per_epoch, **values})
