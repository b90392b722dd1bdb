"""What runs inside each Ray Train worker: set up, resume, train epoch by epoch, validate, checkpoint."""

import contextlib
import gzip
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm

from cifar_dist.cpus import num_cpus
from cifar_dist.data import order
from cifar_dist.data.loader import Batch, Loader
from cifar_dist.data.manifest import read_manifest
from cifar_dist.data.order import eval_plans, train_plans
from cifar_dist.data.staged import Staging
from cifar_dist.errors import UserError
from cifar_dist.models.frozen import Head, split_frozen
from cifar_dist.run.checkpoint import Checkpoint, Cursor, Mark, State
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.network import (
    Precision,
    augmentation,
    build_model,
    expected_of,
    image_spec,
    load_start_weights,
    split_ids,
    weights_notice,
)
from cifar_dist.run.ownership import Attempts
from cifar_dist.storage import Folder
from cifar_dist.train.communication import parallel
from cifar_dist.train.diagnosis import (
    average_warning,
    batch_warning,
    bottleneck_verdict,
    chance_warning,
    length_warning,
    validation_lags,
    validation_warning,
)
from cifar_dist.train.features import Features, open_cache
from cifar_dist.train.job import Job, StartUp
from cifar_dist.train.loop import Clock, TrainState, sum_over_ranks, train_epoch, validate
from cifar_dist.train.moving_statistics import (
    average_batchnorm_over_ranks,
    gather_statistics,
    recalibrate_batchnorm,
    set_statistics,
    split_statistics,
)
from cifar_dist.train.optim import average_of, make_optimizers, schedule_factor
from cifar_dist.train.readiness import Readiness
from cifar_dist.train.saver import Saver

EVAL_BATCH = 100
DIAGNOSIS_BATCHES = 20  # of training images, when validation lags behind training
AGREE_SECONDS = 2.0  # between the points where all ranks agree whether a checkpoint is due; one costs some milliseconds
PROFILE_STEPS = 5, 2, 5  # left out, to warm up, recorded
NOTICE_SECONDS = 10.0  # between checkpoints while a node is about to be taken away


class Stop(Exception):
    """Training ends here, because the job was asked to."""


def train_worker(job: Job, a_node_is_leaving: Callable[[], bool] = lambda: False) -> None:
    """Trains as one rank of a run.

    A UserError on any rank ends the run: the controller stops all ranks (launch/failures.py). Any other error, or
    the death of a worker, makes Ray Train start the group again, which resumes from the newest checkpoint.
    """
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL's object collectives use the current device
    readiness = Readiness(job.limit_seconds)
    with readiness.together():  # staging may take some ranks minutes
        worker = Worker(job, device, a_node_is_leaving)
        found = worker.newest()
    worker.resume(found)
    with readiness.together():
        worker.open_source()
    worker.run()


class Worker:
    """One rank of a run."""

    profiler: torch.profiler.profile | None = None  # on rank 0
    start_up: StartUp | None = None  # on rank 0, in the first attempt

    def __init__(self, job: Job, device: torch.device, a_node_is_leaving: Callable[[], bool]) -> None:
        self.a_node_is_leaving = a_node_is_leaving
        self.job, self.attempt, config = job, job.attempt, job.config
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        # On a laptop there may be more workers than cores.
        cores = num_cpus() // context.get_local_world_size()
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
        synthetic = config.data.synthetic_data
        self.staging = Staging(job.driver, job.progress.say.remote, job.limit_seconds)
        loaded = self.manifest, "train", spec, device, threads, batch_size, *cache, synthetic, self.staging
        self.loader = Loader(job.data_uri, *loaded)
        self.source: Loader | Features = self.loader
        self.train_ids, self.validation_ids = split_ids(config, self.loader.staged.labels)
        model = build_model(config, self.manifest.num_classes, spec, device)
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
        self.retry_seconds = config.checkpoint.storage_retry_seconds
        self.checkpoints = Checkpoints(job.run_uri, self.retry_seconds)
        self.saver: Saver | None = None  # on rank 0
        self.diagnosed, self.noticed, self.stops, self.warned = False, False, False, set[str]()
        self.steps_to_agree, self.agreed_steps = 1, 1
        self.agreed_at = self.started_at = time.monotonic()
        self.waits = {"seconds": 0.0, "data_wait_seconds": 0.0, "communication_seconds": 0.0}
        self.profiler = self._make_profiler() if job.profile and self.rank == 0 else None
        self.logged_stall_seconds = 0.0

    def newest(self) -> tuple[Checkpoint, State] | None:
        """The newest checkpoint that this rank can read. Rank 0 claims the run first."""
        job = self.job
        if self.rank == 0:
            attempts = Attempts(Folder(job.run_uri, self.retry_seconds), job.driver)
            if ray.get(job.progress.started.remote(), timeout=job.limit_seconds) > 1:  # they were started again
                self.attempt = attempts.claim(takeover=False)
            else:
                self.start_up = job.start_up
            attempts.check(self.attempt)
        return self.checkpoints.load_newest(expected_of(job.config, self.manifest), self._note_checkpoint)

    def resume(self, found: tuple[Checkpoint, State] | None) -> None:
        """Goes on from the newest checkpoint that every rank can read, or from the start weights."""
        job, attempt = self.job, self.attempt
        self.is_resumed = found is not None
        expect = expected_of(job.config, self.manifest)
        ages: list[Any] = [None] * self.world
        dist.all_gather_object(ages, ((found[0].age, found[0].name) if found else None, self.state.precision.name))
        ages, precisions = (list(values) for values in zip(*ages, strict=True))
        if len(set(precisions)) > 1:
            raise UserError(
                f"the workers' processors differ: --precision auto means {set(precisions)}; name one of them"
            )
        if None in ages and any(ages):
            raise UserError(
                f"the workers do not see the same checkpoints in {job.run_uri}; is the storage shared by all nodes?"
            )
        mark: Mark | None = None
        if found:
            common = min(ages)[1]
            if found[0].name != common:
                checkpoint = next(c for c in self.checkpoints.all() if c.name == common)
                found = checkpoint, self.checkpoints.load(checkpoint, expect)
            self._restore(*found)
            made = found[0].meta["precision"]
            if made != self.state.precision.name:
                self._say(f"WARNING: {common} was trained in {made}, this goes on in {self.state.precision.name}")
            mark = found[1].log
            self._say(f"continuing from {common} (attempt {attempt})")
        elif load_start_weights(job.config, self.state.model) != job.weights:
            raise UserError(f"{job.config.model.weights} is not the same file on every worker; is it shared?")
        if self.rank == 0:
            job.progress.measured.remote({"recoveries": attempt - 1, "num_workers": self.world})
            num_kept, place = job.config.checkpoint.keep_checkpoints, (self.state.device, self.state.global_step)
            self.saver = Saver(job.run_uri, job.driver, attempt, *place, mark, num_kept, self.retry_seconds)
            if self.saver.log.lost:
                self._warn("log_lost", self.saver.log.lost)
            if found:
                self._warn_of_length(found[0].meta)

    def _note_checkpoint(self, _name: str, fault: str) -> None:
        if fault:
            self._say(f"WARNING: {fault}; going on from the checkpoint before it")

    def _restore(self, checkpoint: Checkpoint, loaded: State) -> None:
        state, meta = self.state, checkpoint.meta
        try:
            state.model.load_state_dict(loaded.model)
            if state.average is not None:
                state.average.module.load_state_dict(loaded.average or {})
                state.average.n_averaged.fill_(meta["num_averaged"])
            for optimizer, stored in zip(state.optimizers, loaded.optimizer["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
            state.precision.scaler.load_state_dict(loaded.optimizer["scaler"])
            if meta["world_size"] == self.world:  # each rank has its own back; other numbers of ranks take the mean
                for name, rows in loaded.ranks.items():
                    set_statistics(self._models()[name], rows[self.rank].to(state.device))
                if self.job.config.loop.deterministic:
                    self.num_threads = meta["num_threads_per_worker"]
                    torch.set_num_threads(self.num_threads)
        except (RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
            raise UserError(
                f"the checkpoint {self.checkpoints.where(checkpoint.name)} does not fit the network and optimizer of "
                f"this run ({str(error).splitlines()[0]}); use another --name"
            ) from error
        state.cursor = checkpoint.cursor
        if self.rank == 0:  # the others start from zero: only the sum over ranks is ever used
            state.totals += torch.tensor(meta["totals"], dtype=torch.float64, device=state.device)

    def _warn_of_length(self, meta: dict[str, Any]) -> None:
        """Where --epochs has changed since the checkpoint, and with it the rate at this step."""
        state, config = self.state, self.job.config
        old, new = meta["config"]["loop"]["epochs"], config.loop.epochs
        # The first step behind a run's end has the rate of its last one.
        num_old, step = old * state.steps_per_epoch, min(state.global_step, old * state.steps_per_epoch - 1)
        before = schedule_factor(config.optim, step, num_old) * config.optim.learning_rate
        after = schedule_factor(config.optim, step, new * state.steps_per_epoch) * config.optim.learning_rate
        if old != new and before != after:
            self._warn(f"schedule_of_{new}_epochs", length_warning(old, new, state.global_step, before, after))

    def _models(self) -> dict[str, torch.nn.Module]:
        average = {"average": self.state.average.module} if self.state.average is not None else {}
        return {"model": self.state.model, **average}

    def open_source(self) -> None:
        """Where the base is frozen, its features (now that it has its weights) are what is trained on."""
        state, config = self.state, self.job.config
        base, self.head = split_frozen(state.model, state.precision.dtype)
        if base is None:
            return
        if self._compiles():
            base.compile()
        cache, data = None, config.data
        if data.features == "cached":
            counts = len(self.train_ids), len(self.validation_ids)
            stored = len(self.loader.staged), counts, self.job.staging_folder
            cache = open_cache(config, self.manifest, base, *stored)
            self._say(cache.notice)
        self.source = state.features = Features(self.loader, base, cache)

    def _compiles(self) -> bool:
        compile = self.job.config.loop.compile
        return compile == "on" or (compile == "auto" and self.state.device.type == "cuda")

    def _trained(self, model: torch.nn.Module) -> torch.nn.Module:
        """What of the model or of its average is given `state.features`."""
        return model if self.source is self.loader else Head(model)  # type: ignore[arg-type]

    def _wrap(self, model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        wrapped: Any = torch.compile(model) if self._compiles() else model
        if self.world == 1:
            return wrapped
        loop, factors = self.job.config.loop, None
        # Not measured on a GPU. In more steps than one ranks may differ in how often they exchange.
        if device.type == "cpu" and loop.accumulation_steps == 1:
            factors = loop.global_batch_size, self.state.precision.dtype
        # Moving statistics are averaged where they are read.
        wrapped, self.state.communication = parallel(wrapped, device, loop.gradient_dtype, factors)
        return wrapped

    def run(self) -> None:
        """Trains from the cursor to the last epoch. Raises UserError on all ranks where the loss is not finite."""
        config, state = self.job.config, self.state
        if self.start_up:
            self.start_up.end("set-up")
        state.wrapped = self._wrap(self.head, state.device)
        self._say(
            f"training {config.model.model} on {len(self.train_ids)} images, validating on {len(self.validation_ids)}: "
            f"{self.world} workers of {self.num_threads} CPU threads each, {state.device.type}, {state.precision.name}"
        )
        if not self.is_resumed and (notice := weights_notice(config, self.job.weights)):
            self._say(f"WARNING: {notice}")
        batch, micro_batches = config.loop.global_batch_size, config.loop.accumulation_steps
        if message := batch_warning(len(self.train_ids), batch, self.world, micro_batches):
            self._warn("few_images_at_a_time", message)
        if config.data.synthetic_data:
            self._say("WARNING: --synthetic-data: training images are random, nothing is learned")
        if self.profiler:
            self.profiler.start()
        if self.saver:
            self.job.progress.trains.remote()
        with contextlib.suppress(Stop):
            while state.cursor.epoch < config.loop.epochs and not self.stops:
                batches = self._train_batches(state.cursor)
                clock = train_epoch(state, self._recorded(batches), self._after_step)
                self._end_epoch(clock)
        self._close()

    def _close(self) -> None:
        """Waits until all is stored. Raises UserError, which ends the run, where the run was asked to stop."""
        if self.saver:
            stall, seconds = self.saver.stall_seconds, time.monotonic() - self.started_at
            self.saver.close()
            self._say(f"checkpoints held up training for {stall:.2f} s of {seconds:.1f} s, {stall / seconds:.2%}")
            if self.waits["seconds"]:
                self._say(bottleneck_verdict(**self.waits))
        if self.profiler:
            self.profiler.stop()
            if not self.profiled:
                self._say(f"WARNING: --profile wrote nothing: the run had fewer than {sum(PROFILE_STEPS)} steps")
        if self.stops and self.saver:  # the others just end: an error of theirs would cut this rank off
            raise UserError("the run was asked to stop")

    def _make_profiler(self) -> torch.profiler.profile:
        """Of a few steps, once they run evenly; the trace goes into the run's folder."""
        self.profiled = False

        def store(profiler: torch.profiler.profile) -> None:
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder) / "trace.json"
                profiler.export_chrome_trace(str(trace))  # given a name in .gz it compresses twice
                content = gzip.compress(trace.read_bytes())
                name = f"profile/rank-0-step-{self.state.global_step:06d}.json.gz"
                run = Folder(self.job.run_uri, self.retry_seconds)
                run.create("profile")
                run.write(name, content)
            self.profiled = True
            self._say(f"profile of {PROFILE_STEPS[2]} steps: {name}, for chrome://tracing or ui.perfetto.dev")

        wait, warmup, active = PROFILE_STEPS
        schedule = torch.profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=1)
        return torch.profiler.profile(schedule=schedule, on_trace_ready=store)

    def _train_batches(self, cursor: Cursor) -> Iterator[Batch]:
        config = self.job.config
        batch_size, seed = config.loop.global_batch_size, config.loop.seed
        augment = augmentation(config)
        return self.source.batches(
            train_plans(self.train_ids, augment, seed, *cursor, batch_size, self.rank, self.world)
        )

    def _end_epoch(self, clock: Clock) -> None:
        """Validates, logs the epoch, moves the cursor to the next one and writes a checkpoint."""
        state = self.state
        loss, correct, seen = self._finite_totals()
        rates = clock.rates()  # after the totals, which wait for the device
        self.waits = {name: seconds + rates[name] for name, seconds in self.waits.items()}
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
        if not math.isfinite(validation_loss):
            text = f"the validation loss after epoch {state.cursor.epoch + 1} is not finite: it is stored as null"
            self._warn("validation_not_finite", f"{text}, and this checkpoint is never the best; try --precision fp32")
        self._check_train_chance(correct / seen, int(seen))
        self._check_validation(evaluated, correct / seen, num_correct / num_validation)
        epoch, global_step = state.cursor.epoch, state.global_step
        state.cursor = Cursor(epoch + 1, 0)
        state.totals.zero_()
        if self.saver:
            stall = self.saver.stall_seconds
            metrics["checkpoint_stall_seconds"] = round(stall - self.logged_stall_seconds, 3)
            self.logged_stall_seconds = stall
            self.saver.log.add("epoch", epoch, global_step, **metrics)
            self._send({"epoch_done": epoch, **metrics})
        self._write_checkpoint(metrics)

    def _recalibrate(self, model: torch.nn.Module, num_batches: int) -> None:
        batches = self._train_batches(Cursor(self.state.cursor.epoch, 0))
        trained = self._trained(model)
        recalibrate_batchnorm(trained, batches, num_batches, self.state.precision, self.state.features)

    def _validate(self, model: torch.nn.Module) -> list[float]:
        """[loss sum, correct, seen] over the validation images, of all ranks."""
        plans = eval_plans(self.validation_ids, EVAL_BATCH, self.rank, self.world)
        state, batches = self.state, self.source.batches(plans)
        return sum_over_ranks(validate(self._trained(model), batches, state.precision, state.features)).tolist()

    def _average_over_ranks(self) -> torch.nn.Module:
        """Makes the moving statistics equal on all ranks; returns the model that is evaluated."""
        average_batchnorm_over_ranks(self.state.model)
        if self.state.average is None:
            return self.state.model
        average_batchnorm_over_ranks(self.state.average.module)
        return self.state.average.module

    def _finite_totals(self) -> list[float]:
        """The epoch's totals over all ranks. Raises UserError on every rank if the loss is not finite."""
        totals = sum_over_ranks(self.state.totals).tolist()
        if not math.isfinite(totals[0]):
            self._diverged("the training loss")
        return totals

    def _diverged(self, what: str) -> None:
        if self.saver:
            self.saver.wait()
        kept = self.checkpoints.latest()
        good = f"its last good checkpoint {kept.name} is kept" if kept else "it had no checkpoint yet"
        raise UserError(
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
        if self.saver:
            self.saver.log.add("step", state.cursor.epoch, state.global_step, **line)
            self._send(line)
        self._check_train_chance(correct / seen, int(seen))

    def _after_step(self, clock: Clock) -> None:
        state, every = self.state, self.job.config.checkpoint.checkpoint_every_steps
        if self.profiler:
            self.profiler.step()
        if self.start_up:
            self.start_up.end("first step")
            self._say(str(self.start_up))
            self.start_up = None
        if state.global_step % self.job.config.loop.log_every_steps == 0:
            self._on_log(clock)
        self.steps_to_agree -= 1
        due = self.steps_to_agree <= 0 and self._agree()
        is_inside = state.cursor.step < state.steps_per_epoch
        if is_inside and (due or self.stops or (every and state.global_step % every == 0)):
            self._write_checkpoint()
        if is_inside and self.stops:
            raise Stop
        if self.saver:
            self.saver.flush_if_due()

    def _agree(self) -> bool:
        """Whether a checkpoint is due by the clock of rank 0, or because a node is about to be taken away.

        All ranks come here after the same step, and agree after how many steps they come again and whether they stop.
        """
        now, config = time.monotonic(), self.job.config.checkpoint
        seconds_per_step = max((now - self.agreed_at) / self.agreed_steps, 1e-6)
        agreed = torch.zeros(3, dtype=torch.int64, device=self.state.device)
        if self.saver:
            waited, is_leaving = now - self.saver.saved_at, self.a_node_is_leaving()
            first, self.noticed = is_leaving and not self.noticed, is_leaving
            due = waited >= config.checkpoint_every_seconds > 0 or (self.noticed and waited >= NOTICE_SECONDS)
            if first:
                self._say("a node is about to be taken away: storing a checkpoint")
            num_steps = max(1, min(round(AGREE_SECONDS / seconds_per_step), 1000))
            agreed = torch.tensor([first or due, num_steps, self._is_asked_to_stop()], device=self.state.device)
        if self.world > 1:
            dist.broadcast(agreed, 0)
        due, self.agreed_steps, stops = agreed.tolist()
        self.steps_to_agree, self.agreed_at, self.stops = self.agreed_steps, time.monotonic(), bool(stops)
        return bool(due)

    def _is_asked_to_stop(self) -> bool:
        with contextlib.suppress(ray.exceptions.RayError):  # a driver that is gone asks for nothing
            return ray.get(self.job.progress.asks_to_stop.remote(), timeout=AGREE_SECONDS)
        return False

    def _recorded(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; with --record-samples, ids and flips of each global batch go into metrics.jsonl."""
        for batch in batches:
            if self.job.config.loop.record_samples:
                assert batch.augment is not None
                parts: list[Any] = [None] * self.world
                num_mine = len(batch.ids) if batch.num_counted else 0
                dist.all_gather_object(parts, (batch.ids[:num_mine].tolist(), batch.augment.flips[:num_mine].tolist()))
                if self.saver:
                    ids, flips = ([x for part in column for x in part] for column in zip(*parts, strict=True))
                    self.saver.log.add(
                        "samples", self.state.cursor.epoch, self.state.global_step + 1, ids=ids, flips=flips
                    )
            yield batch

    def _write_checkpoint(self, metrics: dict[str, Any] | None = None) -> None:
        """All ranks call it; `metrics` at an epoch's end. Weights that are not finite are never stored.

        Nothing of the run's state changes, so it does not matter to the result when checkpoints are written.
        """
        state, job = self.state, self.job
        totals = self._finite_totals()
        if not math.isfinite(get_total_norm([p.detach() for p in state.model.parameters()])):
            self._diverged("a weight")
        rows = {name: gather_statistics(model) for name, model in self._models().items()}
        if self.saver is None:
            return
        models = {n: dict(m.state_dict()) | split_statistics(m, rows[n].mean(0)) for n, m in self._models().items()}
        ranks = {name: values for name, values in rows.items() if self.world > 1 and values.numel()}
        optimizers = [optimizer.state_dict() for optimizer in state.optimizers]
        optimizer = {"optimizers": optimizers, "scaler": state.precision.scaler.state_dict()}
        meta = {
            **expected_of(job.config, self.manifest),
            "global_step": state.global_step,
            "metrics": metrics,
            "totals": totals,
            "num_averaged": int(state.average.n_averaged) if state.average is not None else 0,
            "config": job.config.to_dict(),
            "precision": state.precision.name,
            "device": torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else "cpu",
            "weights": job.weights,
            "data_uri": job.data_uri,
            "class_names": self.manifest.class_names,
            "num_train": len(self.train_ids),
            "world_size": self.world,
            "num_threads_per_worker": self.num_threads,
            "git_commit": job.git_commit,
        }
        self.saver.save(state.cursor, State(models["model"], models.get("average"), ranks, optimizer), meta)

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
        if model is not self.state.model:  # the average of the weights
            _, num_correct, num_seen = self._validate(self.state.model)
            plain, decay = num_correct / num_seen, self.job.config.optim.ema_decay
            if message := average_warning(train, validation, plain, decay):
                self._warn("average_lags", message, plain_accuracy=plain)
                return
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
        if self.saver and kind not in self.warned:
            self.warned.add(kind)
            self._say(f"WARNING: {message}")
            if kind not in self.saver.log.warnings:
                place = self.state.cursor.epoch, self.state.global_step
                self.saver.log.add("warning", *place, warning=kind, message=message, **values)

    def _say(self, message: str) -> None:
        if self.rank == 0:
            self.job.progress.say.remote(message)

    def _send(self, values: dict[str, Any]) -> None:
        position = {"global_step": self.state.global_step, "epoch": self.state.cursor.epoch}
        self.job.progress.update.remote({**position, "steps_per_epoch": self.state.steps_per_epoch, **values})
