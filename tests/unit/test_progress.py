"""What the driver shows of a run where there is no terminal."""

import threading
from collections.abc import Callable

import pytest

from cifar_dist.launch import progress

STEP = {
    **{"global_step": 2, "steps_per_epoch": 4, "epoch": 0, "step": 2, "train_loss": 1.5, "train_accuracy": 0.25},
    **{"images_per_second": 10.0, "data_wait_share": 0.01},
}
SILENT = "no worker has started yet: is the cluster busy with other jobs?"


def shown(
    events: list[dict], capsys: pytest.CaptureFixture, why_quiet: Callable[[], str] = lambda: "", num_polls: int = 1
) -> list[str]:
    """The lines of a display that has asked for events `num_polls` times before it is closed, and once when it is."""
    waiting, left, done = list(events), [num_polls - 1], threading.Event()

    def poll() -> list[dict]:
        found, waiting[:] = list(waiting), []
        left[0] -= 1
        if left[0] <= 0:
            done.set()
        return found

    with progress.Display(poll, 2, why_quiet):
        assert num_polls == 1 or done.wait(60)
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def soon_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look that finds no events is one too many."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)


def test_steps_epochs_and_messages_are_plain_lines(capsys: pytest.CaptureFixture) -> None:
    more = {"validation_loss": 1.25, "validation_accuracy": 0.5, "num_validation_correct": 5, "num_validation": 10}
    assert shown([{"message": "hello"}, STEP, {**STEP, "epoch_done": 0, **more}], capsys) == [
        "hello",
        "epoch 1/2 step 2/4: loss 1.5000 accuracy 25.00% 10.0 images/s data wait 1.0%",
        "epoch 1/2 done: loss 1.5000 accuracy 25.00% 10.0 images/s data wait 1.0% | validation loss 1.2500 accuracy "
        "50.00% (5/10)",
    ]


def test_steps_follow_each_other_with_a_pause_and_an_estimate(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    second, third = {**STEP, "global_step": 3, "step": 3}, {**STEP, "global_step": 4, "step": 4}
    assert len(shown([STEP, second, third], capsys)) == 1
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    lines = shown([STEP, second, third], capsys)
    assert [line.partition(":")[0] for line in lines] == [f"epoch 1/2 step {step}/4" for step in (2, 3, 4)]
    assert ["ETA" in line for line in lines] == [False, True, True]


@pytest.mark.usefixtures("soon_quiet")
def test_silence_of_the_workers_is_said_each_time_it_has_lasted(capsys: pytest.CaptureFixture) -> None:
    assert shown([], capsys) == [SILENT]
    repeated = shown([], capsys, num_polls=3)
    assert len(repeated) >= 3
    assert set(repeated) == {SILENT}


@pytest.mark.usefixtures("soon_quiet")
def test_what_the_workers_wait_for_is_said_instead(capsys: pytest.CaptureFixture) -> None:
    assert shown([], capsys, lambda: "waiting for nodes") == ["waiting for nodes"]


@pytest.mark.usefixtures("soon_quiet")
def test_workers_that_spoke_and_went_are_waited_for_but_not_called_late(capsys: pytest.CaptureFixture) -> None:
    assert shown([{"message": "hello"}], capsys) == ["hello"]
    assert shown([{"message": "hello"}], capsys, lambda: "waiting for nodes") == ["hello", "waiting for nodes"]


def test_short_silence_is_no_news(capsys: pytest.CaptureFixture) -> None:
    assert shown([], capsys, lambda: "waiting for nodes", num_polls=2) == []
