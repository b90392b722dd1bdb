"""What a launch says of a failure, and how it waits between retries; the rest needs a cluster."""

import signal
import threading
import time

import pytest
import ray.exceptions
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from cifar_dist import stopping
from cifar_dist.errors import UserError
from cifar_dist.job_settings import Launch
from cifar_dist.launch import driver, failures
from cifar_dist.launch.failures import QUICK_SECONDS, StopOnUserError

GO_ON = "run the same command to go on"
RUN = Launch(recipe="deck_fan", data="data", storage="storage", name="first", workers="2", max_failures=3)


def workers_failed(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("the workers failed", dict(enumerate(errors)))


def test_workers_that_failed_too_often_are_told_with_the_first_reason():
    text = failures.why_failed(workers_failed(RuntimeError("line\nthe reason"), RuntimeError("another")), RUN)
    assert text.startswith("the workers of run first failed more than 3 times: rank 0: the reason; ")
    assert GO_ON in text
    assert "memory" not in text


def test_a_machine_without_memory_is_named():
    text = failures.why_failed(workers_failed(ray.exceptions.OutOfMemoryError("Task was killed")), RUN)
    assert "out of memory: use fewer --workers or a smaller --global-batch-size" in text


def test_a_fault_of_the_controller_is_not_the_workers():
    text = failures.why_failed(ControllerError(RuntimeError("the raylet is gone")), RUN)
    assert text.startswith("Ray could not go on with run first: the raylet is gone; ")
    assert "failed more than" not in text
    assert "same command to go on" in text


def test_the_death_of_the_controller_is_said():
    text = failures.why_failed(ray.exceptions.ActorDiedError(), RUN)
    assert text.startswith("Ray Train's controller of run first died")
    assert GO_ON in text


def test_a_user_error_is_passed_on_as_it_is():
    assert failures.why_failed(ControllerError(UserError("the loss is not finite")), RUN) == "the loss is not finite"


class Clock:
    """A clock that goes on by sleeping and by hand."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(failures, "time", clock)
    monkeypatch.setattr(failures, "look_for_nodes", lambda: None)
    return clock


class Policy(StopOnUserError):
    """In a run that logs a step after each start, or none."""

    def __init__(self, moves: bool = False) -> None:
        super().__init__(None)
        self.moves = moves

    def has_moved(self) -> bool:
        return self.moves


@pytest.mark.parametrize(
    ("seconds", "moves", "slept"),
    [(QUICK_SECONDS / 2, False, [5.0, 10.0, 20.0, 30.0]), *((QUICK_SECONDS, False, []), (QUICK_SECONDS / 2, True, []))],
)
def test_failures_that_follow_each_other_wait_longer_each_time(clock, seconds, moves, slept):
    policy = Policy(moves)
    for _ in range(5):
        policy.after_exception(None, {0: RuntimeError("killed")})
        clock.now += seconds
    assert clock.slept == slept


def test_an_error_that_would_come_again_ends_the_run(clock):
    with pytest.raises(UserError, match="a fault"):
        Policy().after_exception(None, {1: UserError("a fault")})
    assert clock.slept == []


class Trainer:
    """Trains until it is let go."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.end, self.thread = error, threading.Event(), None

    def fit(self) -> None:
        self.thread = threading.current_thread()
        self.end.wait(60)
        if self.error:
            raise self.error


@pytest.fixture
def signalled(monkeypatch):
    """Sends this process SIGTERM a little later, as a job gets it."""
    handlers = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    monkeypatch.setattr(stopping, "received", 0)
    stopping.listen()
    yield lambda: threading.Timer(0.3, signal.raise_signal, [signal.SIGTERM]).start()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_fit_ends_with_what_the_trainer_raises():
    trainer = Trainer(ValueError("its own"))
    trainer.end.set()
    with pytest.raises(ValueError, match="its own"):
        driver.fit(trainer, lambda: False)
    assert trainer.thread is not threading.main_thread()


def test_a_signal_waits_for_the_checkpoint(signalled):
    trainer = Trainer()

    def stop() -> bool:
        threading.Timer(1.0, trainer.end.set).start()
        return True

    signalled()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        driver.fit(trainer, stop)
    assert trainer.end.is_set()
    assert time.monotonic() - start >= 1.0
    assert stopping.exit_code() == 143


def test_a_signal_does_not_wait_where_nothing_is_to_be_stored(signalled):
    trainer = Trainer()
    signalled()
    with pytest.raises(KeyboardInterrupt):
        driver.fit(trainer, lambda: False)
    assert not trainer.end.is_set()
    trainer.end.set()


def test_a_checkpoint_that_does_not_come_is_not_waited_for_without_end(signalled, monkeypatch):
    monkeypatch.setattr(driver, "STOP_SECONDS", 0.5)
    trainer = Trainer()
    signalled()
    with pytest.raises(KeyboardInterrupt):
        driver.fit(trainer, lambda: True)
    trainer.end.set()
