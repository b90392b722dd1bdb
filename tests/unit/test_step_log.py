"""The lines of the log: on a device that works behind the host they are finished later, and say the same."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cifar_dist.config import Config
from cifar_dist.errors import UserError
from cifar_dist.run.checkpoint import Cursor
from cifar_dist.run.network import Precision
from cifar_dist.train.diagnosis import Diagnosis
from cifar_dist.train.loop import Clock
from cifar_dist.train.reporting import Reporter
from cifar_dist.train.state import TrainState
from cifar_dist.train.step_log import StepLog

CPU = torch.device("cpu")


class Log(list):
    """A log, which is one even without lines."""

    def __bool__(self) -> bool:
        return True

    def add(self, kind: str, epoch: int, global_step: int, **values: Any) -> None:
        self.append((kind, epoch, global_step, values))


class Rank:
    """A rank whose device may work behind the host. `sent`: what the driver was sent; `checked`: what was diagnosed."""

    def __init__(self, defers: bool) -> None:
        model = nn.Linear(1, 1)
        self.state = TrainState(
            config=Config(),
            model=model,
            trainable=model,
            optimizers=[],
            precision=Precision("fp32", CPU),
            average=None,
            device=CPU,
            rank=0,
            world=1,
            steps_per_epoch=100,
        )
        self.sent: list[dict[str, Any]] = []
        reporter = Reporter(SimpleNamespace(update=SimpleNamespace(remote=self.sent.append)), self.state)
        self.log = reporter.log = Log()
        self.checked: list[tuple[float, int]] = []
        diagnosis = SimpleNamespace(check_training=lambda *seen: self.checked.append(seen))
        self.lines, self.clock = StepLog(self.state, reporter, diagnosis, lambda: None), Clock()
        self.lines.defers = defers

    def step(self, loss: float = 2.0) -> None:
        state = self.state
        state.cursor = Cursor(state.cursor.epoch, state.cursor.step + 1)
        state.totals += torch.tensor([loss, 1.0, 4.0])
        state.learning_rate = 1.0 / state.cursor.step
        self.clock.num_images += 4
        self.lines.begin(self.clock)


VALUES = ("step", "train_loss", "train_accuracy", "learning_rate")


def test_a_line_says_the_same_whenever_it_is_finished():
    now, later = Rank(defers=False), Rank(defers=True)
    for rank in (now, later):
        for loss in (2.0, 4.0, 6.0):
            rank.step(loss)
    assert [line[:3] for line in now.log] == [("step", 0, step) for step in (1, 2, 3)]
    assert len(later.log) == 2  # the third is still being computed
    later.lines.finish()
    later.lines.finish()  # nothing more
    for line, other in zip(now.log, later.log, strict=True):
        assert line[:3] == other[:3]
        assert [line[3][name] for name in VALUES] == [other[3][name] for name in VALUES]
        assert line[3]["images_per_second"] > 0
    assert [[sent[name] for name in ("global_step", "epoch", *VALUES)] for sent in now.sent] == [
        [sent[name] for name in ("global_step", "epoch", *VALUES)] for sent in later.sent
    ]
    assert now.checked == later.checked == [(0.25, 4 * step, (0, step)) for step in (1, 2, 3)]
    assert now.log[2][3]["train_loss"] == 1.0


def test_rates_are_those_of_the_moment_when_the_line_began():
    rank = Rank(defers=True)
    rank.clock.start._time -= 10
    rank.step()
    rank.clock.num_images = 1_000_000
    rank.clock.data_wait_seconds = 1_000_000.0
    rank.lines.finish()
    ((*_, values),) = rank.log
    assert values["images_per_second"] * values["seconds"] == pytest.approx(4, rel=0.1)
    assert values["data_wait_seconds"] == 0


@pytest.mark.parametrize("defers", [False, True])
def test_a_warning_is_of_the_step_of_its_line(defers):
    """So that it does not depend on what made the line be finished."""
    rank = Rank(defers)
    rank.state.config = rank.state.config.replace(chance_warning_steps=3)
    rank.lines.diagnosis = Diagnosis(rank.state, 4, rank.lines.reporter, None)
    rank.lines.reporter.progress.say = SimpleNamespace(remote=lambda _text: None)
    rank.log.warnings = set()
    for _ in range(5):
        rank.step()
        if rank.state.global_step == 2:
            rank.lines.finish()
    rank.lines.finish()
    assert [line[:3] for line in rank.log if line[0] == "warning"] == [("warning", 0, 3)]


@pytest.mark.parametrize("defers", [False, True])
def test_a_loss_that_is_not_finite_names_the_step_of_its_line(defers):
    rank = Rank(defers)
    rank.step()
    if defers:
        rank.step(math.nan)
    with pytest.raises(UserError, match="the training loss became infinite or not a number by step 2;"):
        rank.step(1.0 if defers else math.nan)
    assert [line[2] for line in rank.log] == [1]
