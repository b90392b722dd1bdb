"""When a worker logs and stores: after which steps, whatever it then does."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cifar_dist.config import Config
from cifar_dist.train.checkpoint import Cursor
from cifar_dist.train.loop import Clock, TrainState
from cifar_dist.train.precision import Precision
from cifar_dist.train.worker import Worker

NUM_STEPS = 6


class Steps(Worker):
    """Counts steps without data, storage and Ray; `due`: the global steps at which the clock wants a checkpoint."""

    def __init__(self, due: set[int], agree_every: int, **settings) -> None:
        config, cpu, model = Config().replace(**settings), torch.device("cpu"), nn.Linear(1, 1)
        precision = Precision("fp32", cpu)
        self.state = TrainState(config, model, model, [], precision, None, cpu, 0, 1, NUM_STEPS)
        self.job, self.saver = SimpleNamespace(config=config), None
        self.due, self.agree_every, self.steps_to_agree = due, agree_every, 1
        self.logged, self.agreed, self.stored = [], [], []

    def _on_log(self, _clock) -> None:
        self.logged.append(self.state.global_step)

    def _agree(self) -> bool:
        self.steps_to_agree = self.agree_every
        self.agreed.append(self.state.global_step)
        return self.state.global_step in self.due

    def _write_checkpoint(self, _metrics=None) -> None:
        self.stored.append(self.state.global_step)


def two_epochs(due: tuple = (), agree_every: int = 100, **settings) -> Steps:
    worker = Steps(set(due), agree_every, **settings)
    for epoch in range(2):
        for step in range(NUM_STEPS):
            worker.state.cursor = Cursor(epoch, step + 1)
            worker._after_step(Clock())
    return worker


def test_log_lines_are_counted_over_the_run():
    assert two_epochs(log_every_steps=4).logged == [4, 8, 12]


@pytest.mark.parametrize(
    ("every", "stored"), [(0, []), (4, [4, 8]), (3, [3, 9]), (1, [1, 2, 3, 4, 5, 7, 8, 9, 10, 11])]
)
def test_checkpoints_are_counted_over_the_run_but_an_epoch_that_ends_has_its_own(every, stored):
    assert two_epochs(checkpoint_every_steps=every).stored == stored


def test_ranks_agree_as_often_as_they_agreed_to_and_store_once_where_both_want_it():
    worker = two_epochs(due=(1, 4, 7), agree_every=3, checkpoint_every_steps=4)
    assert worker.agreed == [1, 4, 7, 10]
    assert worker.stored == [1, 4, 7, 8]


def test_checkpoint_that_is_due_where_the_epoch_ends_is_the_epoch_s():
    assert two_epochs(due=(6,), agree_every=5).stored == []
