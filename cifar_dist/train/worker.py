"""The code that runs in each Ray Train worker: resume, train epoch by epoch, validate, store checkpoints."""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from cifar_dist.data.manifest import Manifest
from cifar_dist.errors import UserError
from cifar_dist.run.checkpoint import LOWEST, Checkpoint, Cursor, score_of
from cifar_dist.run.folder import Run
from cifar_dist.run.network import expected_of, load_start_weights
from cifar_dist.train import assemble, rank_state
from cifar_dist.train.cadence import AGREE_SECONDS, Cadence, RankZero
from cifar_dist.train.diagnosis import Diagnosis, announce, bottleneck_verdict, schedule_warning
from cifar_dist.train.images import Images
from cifar_dist.train.job import Job, StartUp
from cifar_dist.train.loop import Clock, train_epoch
from cifar_dist.train.rank_state import Found
from cifar_dist.train.readiness import Readiness
from cifar_dist.train.reporting import Reporter, record_samples
from cifar_dist.train.saver import Saver
from cifar_dist.train.state import TrainState
from cifar_dist.train.step import Step
from cifar_dist.train.step_log import StepLog
from cifar_dist.train.tracing import Tracer
from cifar_dist.train.validation import Validation

COMPILE_SECONDS = 600  # for one kernel or file: meanwhile this process only waits for the compiler's processes


class Stop(Exception):
    """Training stops at this step, because the job was asked to stop."""


def train_worker(job: Job, a_node_is_leaving: Callable[[], bool]) -> None:
    """Trains as one rank of a run.

    A UserError on any rank ends the run: the controller stops all ranks (launch/failures.py). Any other error, or the
    death of a worker, makes Ray Train restart the worker group, which resumes from the newest checkpoint.
    """
    device, context = ray.train.torch.get_device(), ray.train.get_context()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL's object collectives use the current device
    place = {"rank": context.get_world_rank(), "world": context.get_world_size()}
    readiness = Readiness(job.limit_seconds)
    with readiness.together():  # on some ranks staging takes minutes
        state, images = assemble.assemble(job, device, **place, local_world=context.get_local_world_size())
        worker = Worker(job, state, images, a_node_is_leaving)
        found = worker.claim()
    worker.resume(found)
    with readiness.together():
        assemble.split_base(state, images, worker.reporter)
    assemble.wrap(state, len(images.train_ids))
    with readiness.together(least_seconds=COMPILE_SECONDS):
        assemble.compile_now(state, images)
    worker.run()


class Worker:
    """Runs one rank of a run."""

    start_up: StartUp | None = None  # only on rank 0 of the first attempt, until the first step
    saver: Saver | None = None  # only on rank 0
    tracer: Tracer | None = None  # only on rank 0, with --profile

    def __init__(self, job: Job, state: TrainState, images: Images, a_node_is_leaving: Callable[[], bool]) -> None:
        plan = job.plan
        self.job, self.plan, self.state, self.images, self.attempt = job, plan, state, images, job.attempt
        self.a_node_is_leaving = a_node_is_leaving
        self.run_folder = Run(plan.run.uri, plan.config.checkpoint.storage_retry_seconds)
        self.reporter = Reporter(job.progress, state)
        self.validation = Validation(state, images)
        self.diagnosis = Diagnosis(state, self.manifest.num_classes, self.reporter, self.validation)
        self.step_log = StepLog(state, self.reporter, self.diagnosis, self._latest)
        self.cadence = Cadence(plan.config, None)
        self.waits = {"seconds": 0.0, "data_wait_seconds": 0.0, "communication_seconds": 0.0}
        self.logged_stall_seconds, self.started_at, self.is_resumed = 0.0, time.monotonic(), False
        if plan.launch.profile and state.rank == 0:
            self.tracer = Tracer(self.run_folder, self.reporter.say)

    @property
    def manifest(self) -> Manifest:
        return self.plan.data.manifest

    def claim(self) -> Found | None:
        """On rank 0: claims the run, and reads the newest checkpoint, or else the start weights, for all ranks."""
        job, config = self.job, self.plan.config
        if self.state.rank != 0:
            return None
        attempts = self.run_folder.attempts(job.driver)
        if ray.get(job.progress.started.remote(), timeout=job.limit_seconds) > 1:  # the ranks were restarted
            self.attempt = attempts.claim(takeover=False)
        else:
            self.start_up = job.start_up
        attempts.check(self.attempt)
        expect = expected_of(config, self.manifest)
        found = self.run_folder.checkpoints.load_newest(expect, self.reporter.note_checkpoint)
        if found is None and load_start_weights(config, self.state.model) != self.plan.weights:
            raise UserError(f"{config.model.weights} is another file than the one that the job was started with")
        return found

    def resume(self, found: Found | None) -> None:
        """Starts from rank 0's checkpoint or start weights. All ranks call it."""
        config, state = self.plan.config, self.state
        rank_state.check_precision(state)
        found = rank_state.found_by_rank_zero(found, state)
        if found:
            checkpoint, loaded = found
            rank_state.restore(state, checkpoint, loaded, self.run_folder.checkpoints.where(checkpoint.name))
            now = state.precision.name
            if (made := checkpoint.meta["precision"]) != now:
                self.reporter.say(f"WARNING: {checkpoint.name} was trained in {made}, this goes on in {now}")
            self.reporter.say(f"continuing from {checkpoint.name} (attempt {self.attempt})")
        elif config.model.weights:
            state.model.load_state_dict(rank_state.from_rank_zero(dict(state.model.state_dict()), state))
        self.is_resumed = found is not None
        if state.rank == 0:
            self._open_saver(found)

    def _open_saver(self, found: Found | None) -> None:
        """On rank 0: opens the log and the checkpoints for writing, and lets this rank decide for all ranks."""
        job, config = self.job, self.plan.config
        job.progress.measured.remote({"recoveries": self.attempt - 1, "num_workers": self.state.world})
        self.saver = Saver(
            self.run_folder,
            job.driver,
            self.attempt,
            device=self.state.device,
            global_step=self.state.global_step,
            mark=found[1].log if found else None,
            num_kept=config.checkpoint.keep_checkpoints,
            may_drop=config.checkpoint.checkpoint_every_seconds > 0,
        )
        self.reporter.log = self.saver.log
        zero = RankZero(
            config.checkpoint,
            saver=self.saver,
            a_node_is_leaving=self.a_node_is_leaving,
            asks_to_stop=self._is_asked_to_stop,
            say=self.reporter.say,
            best=self.run_folder.checkpoints.best_score(found[0]) if found else LOWEST,
        )
        self.cadence = Cadence(config, zero)
        if self.saver.log.lost:
            self.reporter.warn("log_lost", self.saver.log.lost)
        if found and (message := schedule_warning(self.state, found[0].meta)):
            self.reporter.warn(f"schedule_of_{config.loop.epochs}_epochs", message)

    def _is_asked_to_stop(self) -> bool:
        with contextlib.suppress(ray.exceptions.RayError):  # a dead driver cannot ask to stop
            return ray.get(self.job.progress.asks_to_stop.remote(), timeout=AGREE_SECONDS)
        return False

    def run(self) -> None:
        """Trains from the cursor to the last epoch. Raises UserError on all ranks if the loss is not finite."""
        state = self.state
        if self.start_up:
            self.start_up.end("set-up")
        announce(self.reporter, self.plan, self.images, is_resumed=self.is_resumed)
        if self.tracer:
            self.tracer.start()
        if self.saver:
            self.job.progress.trains.remote()
        step = Step(state)
        with contextlib.suppress(Stop):
            while state.cursor.epoch < self.plan.config.loop.epochs and not self.cadence.stops:
                batches = record_samples(self.reporter, self.images.train_batches(state.cursor))
                self._end_epoch(train_epoch(step, batches, self._after_step))
        self._close()

    def _after_step(self, clock: Clock) -> None:
        state = self.state
        if self.tracer:
            self.tracer.step(state.global_step)
        if self.start_up:
            self.start_up.end("first step")
            self.reporter.say(str(self.start_up))
            self.start_up = None
        if self.cadence.is_logged(state):
            self.step_log.begin(clock)
        if self.cadence.is_checkpoint_due(state):
            self._store()
        if self.cadence.ends_here(state):
            raise Stop
        if self.saver:
            self.saver.flush_if_due()

    def _end_epoch(self, clock: Clock) -> None:
        """Validates, logs the epoch, moves the cursor to the next epoch and stores a checkpoint if it is due."""
        state, loop = self.state, self.plan.config.loop
        self.step_log.finish()
        loss, correct, seen = rank_state.finite_totals(state, self._latest)
        rates = clock.lap().rates()
        self.waits = {name: seconds + rates[name] for name, seconds in self.waits.items()}
        network = self.validation.network()
        start = time.perf_counter()
        if loop.recalibrate_batches:
            self.validation.recalibrate(network, loop.recalibrate_batches)
        validation_loss, num_correct, num_validation = self.validation.totals(network)
        metrics: dict[str, Any] = {
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
        if not math.isfinite(validation_loss):
            text = f"the validation loss after epoch {state.cursor.epoch + 1} is not finite: it is stored as null"
            text += ", and this epoch is never the best; try --precision fp32"
            self.reporter.warn("validation_not_finite", text)
        self.diagnosis.check_training(correct / seen, int(seen), self.reporter.place())
        self.diagnosis.check_validation(network, correct / seen, num_correct / num_validation)
        if self.saver:
            stall = self.saver.stall_seconds
            metrics["checkpoint_stall_seconds"] = round(stall - self.logged_stall_seconds, 3)
            self.logged_stall_seconds = stall
        self.reporter.record("epoch", **metrics)
        epoch = state.cursor.epoch
        state.cursor = Cursor(epoch + 1, 0)
        state.totals.zero_()
        self.reporter.send({"epoch_done": epoch, **metrics})
        end = self.cadence.end_of_epoch(state, score_of(metrics))
        if end.is_due:
            self._store(metrics, is_best=end.is_best)

    def _latest(self) -> Checkpoint | None:
        """Returns the newest checkpoint, after all pending writes are done."""
        if self.saver:
            self.saver.wait()
        return self.run_folder.checkpoints.latest()

    def _store(self, metrics: dict[str, Any] | None = None, *, is_best: bool = False) -> None:
        """Stores a checkpoint. All ranks call this method, at an epoch's end with `metrics`.

        Weights that are not finite are never stored. Storing changes no training state, so the times at which
        checkpoints are written do not affect the result.
        """
        state, plan = self.state, self.plan
        self.step_log.finish()  # the log up to here belongs to the checkpoint
        totals = rank_state.finite_totals(state, self._latest)
        rank_state.check_weights(state, self._latest)
        rows = rank_state.gather_rows(state)
        if self.saver is None:
            return
        meta = {
            **expected_of(plan.config, self.manifest),
            **rank_state.checkpoint_meta(state, totals, metrics),
            "weights": plan.weights,
            "data_uri": plan.data.uri,
            "class_names": self.manifest.class_names,
            "num_train": len(self.images.train_ids),
            "git_commit": self.job.git_commit,
        }
        self.saver.save(state.cursor, rank_state.checkpoint_state(state, rows), meta, is_best=is_best)

    def _close(self) -> None:
        """Waits for all pending writes. Raises UserError, which ends the run, if the run was asked to stop."""
        if self.saver:
            stall, seconds = self.saver.stall_seconds, time.monotonic() - self.started_at
            self.saver.close()
            self.reporter.say(
                f"checkpoints held up training for {stall:.2f} s of {seconds:.1f} s, {stall / seconds:.2%}"
            )
            if self.waits["seconds"]:
                self.reporter.say(bottleneck_verdict(**self.waits))
        if self.tracer:
            self.tracer.stop()
        if self.cadence.stops and self.saver:  # only on rank 0: another rank's error could end rank 0 first
            raise UserError("the run was asked to stop")
