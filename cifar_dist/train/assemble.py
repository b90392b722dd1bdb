"""Builds a rank's images, network and optimizers; then splits off the frozen base and wraps the network in DDP."""

from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from cifar_dist.config import Config
from cifar_dist.cpus import num_cpus
from cifar_dist.data import order
from cifar_dist.data.loader import Loader
from cifar_dist.data.order import ImageSpec
from cifar_dist.data.private import Staging, private_folder
from cifar_dist.data.staged import DataSet, staging_root
from cifar_dist.environment import set_up_compiler
from cifar_dist.errors import UserError
from cifar_dist.models.frozen import split_frozen
from cifar_dist.run.network import Precision, build_model, eval_batch, image_spec, use_exact_fp32
from cifar_dist.train.communication import parallel
from cifar_dist.train.compiled import CompiledForFullBatches, full_part, full_sizes
from cifar_dist.train.features import NUM_VARIANTS, DeviceFeatures, Features, fits_device, open_cache
from cifar_dist.train.images import Images
from cifar_dist.train.job import Job
from cifar_dist.train.optim import average_of, make_optimizers
from cifar_dist.train.reporting import Reporter
from cifar_dist.train.state import START, TrainState, images_of
from cifar_dist.train.step import backward, without_exchange


def open_data(job: Job) -> DataSet:
    """Opens the data set on this node. Raises UserError if it differs from the driver's data set."""
    planned = job.plan.data
    staging = Staging(
        job=job.driver, folder=planned.staging.folder, say=job.progress.say.remote, limit_seconds=job.limit_seconds
    )
    data = DataSet.open(planned.uri, staging)
    if data.manifest.sha256 != planned.manifest.sha256:
        raise UserError(f"{data.uri} is not the same data set on every worker; is the storage shared?")
    return data


def assemble(job: Job, device: torch.device, *, rank: int, world: int, local_world: int) -> tuple[TrainState, Images]:
    """Returns a rank's state before training and its images. `local_world`: number of ranks on this node."""
    config = job.plan.config
    # A laptop may run more workers than it has cores.
    num_threads = max(1, min(job.num_cpus_per_worker, num_cpus() // local_world))
    torch.set_num_threads(num_threads)
    compiled = private_folder(staging_root(job.plan.data.staging.folder) / "compiled")
    set_up_compiler(str(compiled), num_threads)  # before torch imports its compiler, as the next line does
    torch.use_deterministic_algorithms(config.loop.deterministic)
    torch.backends.cudnn.benchmark = not config.loop.deterministic
    use_exact_fp32()
    data, spec = open_data(job), image_spec(config, device)
    train, validation = open_loaders(config, data, spec, device, num_threads=num_threads, world=world)
    images = Images(train, validation, config, rank=rank, world=world)
    model = build_model(config, data.manifest.num_classes, spec, device)
    num_train = len(images.train_ids)
    state = new_state(config, model, device, rank=rank, world=world, num_threads=num_threads, num_train=num_train)
    return state, images


def open_loaders(
    config: Config, data: DataSet, spec: ImageSpec, device: torch.device, *, num_threads: int, world: int
) -> tuple[Loader, Loader | None]:
    """Returns the loaders of train and of the data set's own validation split, None if it has none."""

    def loader_of(split: str) -> Loader:
        return Loader(
            data,
            split,
            spec,
            device=device,
            num_threads=config.data.dali_threads or num_threads,
            max_batch_size=max(-(-config.loop.global_batch_size // world), eval_batch(device, config.data.image_size)),
            cache=config.data.cache,
            cache_budget_mib=config.data.cache_budget_mib,
            synthetic=config.data.synthetic_data,
        )

    return loader_of("train"), loader_of("validation") if data.manifest.has_validation else None


def new_state(
    config: Config, model: nn.Module, device: torch.device, *, rank: int, world: int, num_threads: int, num_train: int
) -> TrainState:
    """Returns the state before the first of `num_train` images, with the optimizers and the average of the weights."""
    return TrainState(
        config=config,
        model=model,
        trainable=model,
        optimizers=make_optimizers(model, config.optim),
        precision=Precision(config.loop.precision, device),
        average=average_of(model, config.optim),
        device=device,
        rank=rank,
        world=world,
        num_threads=num_threads,
        steps_per_epoch=order.num_steps(num_train, config.loop.global_batch_size),
        totals=torch.zeros(3, dtype=torch.float64, device=device),
    )


def split_base(state: TrainState, images: Images, reporter: Reporter) -> None:
    """If the base is frozen, makes its features the training input. Call it once the weights are loaded."""
    base, state.trainable = split_frozen(state.model, state.precision.dtype)
    if base is None:
        return
    data, loop, loader, num_train = state.config.data, state.config.loop, images.loader, len(images.train_ids)
    num_at_once = -(-min(loop.global_batch_size, num_train) // state.world)
    if state.compiles:
        part = full_part(loop, num_train, state.rank, state.world)
        base.compile({part, num_at_once, eval_batch(state.device, data.image_size)})
    images.reader = state.input_of = Features(loader, base)
    if data.features == "cached":
        ids, num_variants = (images.train_ids, images.validation_ids), NUM_VARIANTS[data.flips]
        if fits_device(loader, base, len(ids[0]) * num_variants + len(ids[1])):
            kept = DeviceFeatures(loader, base, *ids, num_variants=num_variants, num_at_once=num_at_once)
            images.reader = state.input_of = kept
            reporter.say(kept.notice)
        else:
            num_used = len(ids[0]), len(ids[1])
            cache = open_cache(state.config, loader.data, base, num_images=loader.num_images, num_used=num_used)
            images.reader = state.input_of = Features(loader, base, cache)
            reporter.say(cache.notice)


def wrap(state: TrainState, num_train: int) -> None:
    """Compiles the trained part of the network and wraps it in DistributedDataParallel."""
    loop = state.config.loop
    trainable: Any = state.trainable
    if state.compiles:
        trainable = CompiledForFullBatches(trainable, full_sizes(loop, num_train, state.rank, state.world))
    if state.world > 1:
        factors = None
        # Not measured on a GPU. With gradient accumulation, ranks may exchange factors different numbers of times.
        # A compiled network is compiled before the first step, when ranks must not wait for each other.
        is_plain = loop.accumulation_steps == 1 and not state.compiles
        if state.device.type == "cpu" and is_plain:
            factors = loop.global_batch_size, state.precision.dtype
        # Each rank keeps its own moving statistics. Validation and checkpoints average them.
        trainable, state.communication = parallel(trainable, state.device, loop.gradient_dtype, factors)
    state.trainable = trainable


def compile_now(state: TrainState, images: Images) -> None:
    """If the network is compiled, compiles all that will be, which takes up to minutes, and leaves no trace.

    In a step or in validation, faster ranks would wait for slower ones with a time limit."""
    if not state.compiles:
        return
    kept = {name: buffer.clone() for name, buffer in state.model.named_buffers()}
    (batch,) = islice(images.train_batches(START), 1)
    batch = replace(batch, images=state.input_of(batch))
    with without_exchange(state.trainable):
        backward(state, batch)
    state.model.zero_grad(set_to_none=True)
    for name, buffer in state.model.named_buffers():
        buffer.copy_(kept[name])
    if state.input_of is not images_of:  # a compiled base computes features for validation too
        for batch in islice(images.validation_batches(), 1):
            state.input_of(batch)
