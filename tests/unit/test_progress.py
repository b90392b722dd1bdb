"""What the driver shows of a run where there is no terminal."""

import time

import pytest

from cifar_dist.train import progress

STEP = {
    **{"global_step": 2, "steps_per_epoch": 4, "epoch": 0, "step": 2, "train_loss": 1.5, "train_accuracy": 0.25},
    **{"images_per_second": 10.0, "data_wait_share": 0.01},
}


def shown(events: list[dict], capsys: pytest.CaptureFixture, seconds: float = 0.0) -> str:
    waiting = list(events)

    def poll() -> list[dict]:
        found, waiting[:] = list(waiting), []
        return found

    with progress.Display(poll, num_epochs=2):
        time.sleep(seconds)
    return capsys.readouterr().out


def test_steps_epochs_and_messages_are_plain_lines(capsys: pytest.CaptureFixture) -> None:
    more = {"validation_loss": 1.25, "validation_accuracy": 0.5, "num_validation_correct": 5, "num_validation": 10}
    text = shown([{"message": "hello"}, STEP, {**STEP, "epoch_done": 0, **more}], capsys)
    assert text.splitlines() == [
        "hello",
        "epoch 1/2 step 2/4: loss 1.5000 accuracy 25.00% 10.0 images/s data wait 1.0%",
        "epoch 1/2 done: loss 1.5000 accuracy 25.00% 10.0 images/s data wait 1.0% | validation loss 1.2500 accuracy "
        "50.00% (5/10)",
    ]


def test_silence_of_the_workers_is_said_once(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.1)
    assert shown([], capsys, seconds=1.7).count("no worker has started") == 1


def test_workers_that_speak_are_not_called_silent(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.6)
    assert "no worker" not in shown([{"message": "hello"}], capsys, seconds=1.7)
