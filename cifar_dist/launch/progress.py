"""Carries the progress of a run from rank 0 to the driver's terminal and to Prometheus."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.metrics import Gauge
from tqdm import tqdm

PLAIN_LINE_SECONDS = 10.0
QUIET_SECONDS = 60.0  # without an event from the workers; they usually start within 20 s


def format_line(values: dict[str, Any]) -> str:
    loss, accuracy = values["train_loss"], values["train_accuracy"]
    speed, wait = values["images_per_second"], values["data_wait_share"]
    return f"loss {loss:.4f} accuracy {accuracy:.2%} {speed:.1f} images/s data wait {wait:.1%}"


class Display:
    """Shows the events that `poll` returns (step values, epoch summaries, messages) in a thread, until closed.

    After QUIET_SECONDS without an event it shows the text of `idle_reason`, unless that is empty.
    """

    def __init__(
        self, poll: Callable[[], list[dict[str, Any]]], num_epochs: int, idle_reason: Callable[[], str] = lambda: ""
    ) -> None:
        self._poll, self._num_epochs, self._idle_reason = poll, num_epochs, idle_reason
        self._bar = tqdm(total=0, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self._plain_at = 0.0
        self._started: tuple[float, int] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Display":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self._bar.close()

    def _follow(self) -> None:
        stopping, has_started, quiet_until = False, False, time.monotonic() + QUIET_SECONDS
        while not stopping:
            stopping = self._stop.wait(0.5)
            for values in self._poll():
                has_started, quiet_until = True, time.monotonic() + QUIET_SECONDS
                self._show(values)
            if time.monotonic() > quiet_until:
                quiet_until = time.monotonic() + QUIET_SECONDS
                busy = "" if has_started else "no worker has started yet: is the cluster busy with other jobs?"
                if reason := self._idle_reason() or busy:
                    self._print(reason)

    def _show(self, values: dict[str, Any]) -> None:
        if "message" in values:
            self._print(values["message"])
        elif "epoch_done" in values:
            self._print(
                f"epoch {values['epoch_done'] + 1}/{self._num_epochs} done: {format_line(values)} | validation "
                f"loss {values['validation_loss']:.4f} accuracy {values['validation_accuracy']:.2%} "
                f"({values['num_validation_correct']}/{values['num_validation']})"
            )
        else:
            self._show_step(values)

    def _show_step(self, values: dict[str, Any]) -> None:
        done, total = values["global_step"], values["steps_per_epoch"] * self._num_epochs
        if self._bar.disable:
            now = time.monotonic()
            self._started = self._started or (now, done)
            if now - self._plain_at < PLAIN_LINE_SECONDS:
                return
            self._plain_at = now
            per_step = (now - self._started[0]) / max(done - self._started[1], 1)
            eta = f" ETA {tqdm.format_interval(per_step * (total - done))}" if done > self._started[1] else ""
            place = f"epoch {values['epoch'] + 1}/{self._num_epochs} step {values['step']}/{values['steps_per_epoch']}"
            self._print(f"{place}: {format_line(values)}{eta}")
        else:
            if self._bar.total != total:
                self._bar.reset(total)
                self._bar.initial = self._bar.n = done
            self._bar.set_description(f"epoch {values['epoch'] + 1}/{self._num_epochs}")
            self._bar.set_postfix_str(format_line(values), refresh=False)
            self._bar.update(done - self._bar.n)

    def _print(self, text: str) -> None:
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)


# Gauge ray_cifar_dist_NAME (Ray adds the `ray_`) -> its help text. The first gauges are values of metrics.jsonl.
GAUGES = {
    "images_per_second": "Images trained per second by all workers together, since the epoch's start",
    "train_loss": "Mean training loss of this epoch so far",
    "train_accuracy": "Share of training images classified correctly, this epoch so far",
    "validation_loss": "Mean validation loss after the last epoch",
    "validation_accuracy": "Share of validation images classified correctly after the last epoch",
    "learning_rate": "Learning rate of the last step",
    "data_wait_share": "Share of the epoch's time that rank 0 waited for input",
    "communication_share": "Share of the epoch's time that rank 0 waited for the other workers' gradients",
    "checkpoint_stall_seconds": "Seconds that checkpoints held up training in the last epoch",
    "epoch": "Epoch that is being trained, from 0",
    "global_step": "Steps trained since the run's beginning",
    "num_workers": "Workers that train",
    "recoveries": "How often the run was started again, by Ray Train or by a new driver",
}


class Telemetry:
    """The gauges of one run, tagged with its name and network. They exist as long as the process that set them."""

    def __init__(self, run: str, model: str) -> None:
        tags = {"run": run, "model": model}
        self._gauges = {
            name: Gauge(f"cifar_dist_{name}", text, tuple(tags)).set_default_tags(tags) for name, text in GAUGES.items()
        }

    def set(self, values: dict[str, Any]) -> None:
        """Sets the gauges that have a number in `values`, which has the keys of a line of metrics.jsonl."""
        if values.get("seconds"):
            values = {**values, "communication_share": values["communication_seconds"] / values["seconds"]}
        for name in GAUGES.keys() & values.keys():
            self._gauges[name].set(values[name])


@ray.remote(num_cpus=0)
class Progress:
    """A mailbox between rank 0 and the driver, on the driver's node. It exports metrics to Prometheus."""

    def __init__(self, run: str, model: str) -> None:
        self.events: list[dict[str, Any]] = []
        self.num_starts = self.num_updates = 0
        self.is_training = self.is_stopping = False
        self.telemetry = Telemetry(run, model)

    def measured(self, values: dict[str, Any]) -> None:
        """Exports metrics that the display does not show."""
        self.telemetry.set(values)

    def update(self, values: dict[str, Any]) -> None:
        self.num_updates += 1
        self.telemetry.set(values)
        self.events.append(values)

    def say(self, message: str) -> None:
        self.events.append({"message": message})

    def started(self) -> int:
        """Counts a start of the workers. Returns the number of starts under this driver."""
        self.num_starts += 1
        return self.num_starts

    def updates(self) -> int:
        """Returns the number of steps and epochs logged."""
        return self.num_updates

    def trains(self) -> None:
        """Notes that training has begun, so that a stop can store a checkpoint."""
        self.is_training = True

    def stop(self) -> bool:
        """Asks the workers to store a checkpoint and to end. Returns whether training has begun."""
        self.is_stopping = True
        return self.is_training

    def asks_to_stop(self) -> bool:
        return self.is_stopping

    def drain(self) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events
