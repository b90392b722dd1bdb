"""One training step: gradients, update, average. On a GPU, one CUDA graph runs the steps of full batches."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cifar_dist.data import order
from cifar_dist.data.batch import Batch
from cifar_dist.train.optim import Muon, set_step
from cifar_dist.train.state import TrainState

NUM_WARM_UP_STEPS = 3  # full batches before the capture: they compile, and allocate what lasts


class Step:
    """Trains a rank on one batch at a time. It waits for no device.

    On a GPU, the full batches after the first three run as one CUDA graph, which costs the host one launch in place of
    hundreds. It computes the same bits, so a run may stop and resume anywhere.
    """

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self._num_steps = state.config.loop.epochs * state.steps_per_epoch
        self._num_warm_ups_left = NUM_WARM_UP_STEPS
        self._stream = torch.cuda.Stream(state.device) if uses_graph(state) else None
        self._graph: Graph | None = None

    def __call__(self, batch: Batch) -> None:
        state = self.state
        state.learning_rate = set_step(state.optimizers, state.config.optim, state.global_step, self._num_steps)
        if state.average is not None:
            state.average.set_step()
        batch = replace(batch, images=state.input_of(batch))
        torch.manual_seed(order.step_seed(state.config.loop.seed, *state.cursor, state.rank))
        if self._stream is None or not is_full(batch, state):
            run(state, batch)
        elif self._graph is None and self._num_warm_ups_left:
            self._num_warm_ups_left -= 1
            with on_stream(self._stream):
                run(state, batch)
        else:
            if self._graph is None:
                self._graph = Graph(state, batch, self._stream)
            self._graph.replay(batch)


def uses_graph(state: TrainState) -> bool:
    """Whether steps run as a CUDA graph. Muon computes with the learning rate on the host, so no graph holds it."""
    loop, optimizer = state.config.loop, state.config.optim.optimizer
    return loop.cuda_graph == "auto" and state.device.type == "cuda" and state.world == 1 and optimizer != "muon"


def is_full(batch: Batch, state: TrainState) -> bool:
    return batch.num_counted == batch.global_size == state.config.loop.global_batch_size


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Runs the context's work on `stream`, after earlier and before later work of the current stream."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class Graph:
    """The step of a full batch as a CUDA graph, whose input has one place in memory."""

    def __init__(self, state: TrainState, batch: Batch, stream: torch.cuda.Stream) -> None:
        self.batch = replace(batch, images=torch.empty_like(batch.images), labels=torch.empty_like(batch.labels))
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as the saver's and DALI's, go on using the device.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            run(state, self.batch)

    def replay(self, batch: Batch) -> None:
        self.batch.images.copy_(batch.images)
        self.batch.labels.copy_(batch.labels)
        self._graph.replay()


def run(state: TrainState, batch: Batch) -> None:
    """Computes gradients, updates the weights and adds to totals and average. `batch.images`: the network's input."""
    state.totals += backward(state, batch)
    update(state)
    if state.average is not None:
        state.average.update_parameters(state.model)


def without_exchange(network: nn.Module) -> AbstractContextManager[None]:
    """Returns a context in which the ranks exchange no gradients."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def backward(state: TrainState, batch: Batch) -> torch.Tensor:
    """Adds the gradient of the mean loss over the *global* batch; returns this rank's float64 [3] totals.

    DistributedDataParallel averages over ranks, so each rank scales its summed loss by world / global size. The
    result is exact even if the ranks have different numbers of images.
    """
    num_chunks = order.num_micro_batches(len(batch.labels), state.config.loop.accumulation_steps)
    chunks = list(zip(batch.images.tensor_split(num_chunks), batch.labels.tensor_split(num_chunks), strict=True))
    counted = batch.num_counted > 0
    totals = torch.zeros(3, dtype=torch.float64, device=state.device)
    if state.communication:
        state.communication.num_rows = -(-batch.global_size // order.num_rank_parts(batch.global_size, state.world))
    for i, (inputs, labels) in enumerate(chunks):
        last = i == num_chunks - 1
        with nullcontext() if last else without_exchange(state.trainable):
            with state.precision.autocast():
                logits = state.trainable(inputs)
            smoothing = state.config.optim.label_smoothing
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction="sum") * counted
            state.precision.scaler.scale(loss * (state.world / batch.global_size)).backward()
        if last and state.communication:
            state.communication.end()
        correct = (logits.argmax(1) == labels).sum() * counted
        totals += torch.stack(
            [loss.detach().double(), correct.double(), torch.full_like(totals[0], len(labels) * counted)]
        )
    return totals


def update(state: TrainState) -> None:
    """Runs one optimizer step and clears the gradients."""
    optimizers, scaler, clip_norm = state.optimizers, state.precision.scaler, state.config.optim.clip_norm
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):
            optimizer.take_gradients()
    if clip_norm:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip_norm)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    state.model.zero_grad(set_to_none=True)
