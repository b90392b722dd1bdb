"""Live progress on the driver's terminal: a bar with ETA, or plain lines where there is no terminal."""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

PLAIN_LINE_SECONDS = 10.0
QUIET_SECONDS = 60.0  # without a word from the workers, which usually start in a third of it


@dataclass
class StartUp:
    """Seconds from a job's start to its first step, phase by phase; it travels from the driver to the workers."""

    at: float = field(default_factory=time.time)  # the end of the last phase
    phases: dict[str, float] = field(default_factory=dict)

    def end(self, phase: str) -> None:
        now = time.time()
        self.at, self.phases[phase] = now, now - self.at

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.phases.items())
        return f"first step after {sum(self.phases.values()):.1f} s: {parts}"


def format_line(values: dict[str, Any]) -> str:
    loss, accuracy = values["train_loss"], values["train_accuracy"]
    speed, wait = values["images_per_second"], values["data_wait_share"]
    return f"loss {loss:.4f} accuracy {accuracy:.2%} {speed:.1f} images/s data wait {wait:.1%}"


class Display:
    """Shows the events that `poll` returns (step values, epoch summaries, messages), in a thread until it is closed.

    Where nothing comes for QUIET_SECONDS it shows what `why_quiet` has to say, if anything.
    """

    def __init__(
        self, poll: Callable[[], list[dict[str, Any]]], num_epochs: int, why_quiet: Callable[[], str] = lambda: ""
    ) -> None:
        self._poll, self._num_epochs, self._why_quiet = poll, num_epochs, why_quiet
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
                if why := self._why_quiet() or busy:
                    self._print(why)

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
