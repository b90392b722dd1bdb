"""A run's record: metrics.jsonl and TensorBoard events, rewritten whole so that both match the checkpoints."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from cifar_dist.storage import Folder

FLUSH_SECONDS = 10.0


class RunLog:
    """Lines of a run from `global_step` on; later lines of an earlier attempt are dropped, so none repeats.

    Each line is a JSON object with `kind` (step, epoch or warning), `epoch`, `global_step` and what was measured.
    """

    def __init__(self, run_uri: str, global_step: int) -> None:
        self.run = Folder(run_uri)
        self.lines = [line for line in read_lines(self.run) if line["global_step"] <= global_step]
        self._events = Path(tempfile.mkdtemp(prefix="cifar_dist-events-"))
        self._writer = SummaryWriter(str(self._events), purge_step=global_step + 1, flush_secs=3600)
        self._flushed = time.monotonic()

    def add(self, kind: str, epoch: int, global_step: int, **values: Any) -> None:
        self.lines.append({"kind": kind, "epoch": epoch, "global_step": global_step, **values})
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{kind}/{name}", value, global_step)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def warned(self, kind: str) -> bool:
        return any(line["kind"] == "warning" and line["warning"] == kind for line in self.lines)

    def flush(self) -> None:
        """Stores what was added so far; called before each checkpoint."""
        self.run.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self._writer.flush()
        self.run.create("tensorboard")
        for file in self._events.iterdir():
            self.run.upload(file, f"tensorboard/{file.name}")
        self._flushed = time.monotonic()


def read_lines(run: Folder) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none if there is no such file."""
    try:
        return [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    except FileNotFoundError:
        return []
