"""Shows how a preparation goes on: a bar in a terminal, else a line now and then."""

import sys
import time

LINE_SECONDS = 10.0


class Progress:
    """Shows how many of `total` pictures are done, how fast, how long it takes yet, and how many were left out."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm  # noqa: PLC0415 - slow import, not needed for help

        self._total, self._terminal = total, sys.stderr.isatty()
        self._bar = tqdm(total=total, desc="prepare", unit=" images", disable=not self._terminal)
        self._start = self._said = time.monotonic()
        self._first: int | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, num_done: int, num_bad: int) -> None:
        if self._first is None:
            self._first = num_done  # done before an interruption: not done at the speed of now
            self._bar.initial = num_done
        if self._terminal:
            if num_bad:
                self._bar.set_postfix_str(f"{num_bad:,} left out", refresh=False)
            self._bar.update(num_done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._said >= LINE_SECONDS and num_done > self._first:
            self._said = now
            rate = (num_done - self._first) / (now - self._start)
            left = (self._total - num_done) / rate
            bad = f", {num_bad:,} left out" if num_bad else ""
            print(
                f"prepared {num_done:,} of {self._total:,} images, {rate:,.0f} images/s, {left:,.0f} s left{bad}",
                flush=True,
            )
