"""A run's record: metrics.jsonl and TensorBoard events, rewritten whole so that both match the checkpoints."""

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from cifar_dist.errors import UserError
from cifar_dist.storage import Folder, join_uri

FLUSH_SECONDS = 10.0


class RunLog:
    """Lines of a run from `global_step` on; later lines of an earlier attempt are dropped, so none repeats.

    Each line is a JSON object with `kind` (step, epoch or warning), `epoch`, `global_step` and what was measured.
    """

    def __init__(self, run_uri: str, global_step: int) -> None:
        self.run = Folder(run_uri)
        self.lines = [line for line in read_lines(self.run) if line["global_step"] <= global_step]
        self._events = tempfile.TemporaryDirectory(prefix="cifar_dist-events-")
        # Not SummaryWriter: it writes from a thread, and its flush does not wait for that.
        self._writer = EventsWriter(f"{self._events.name}/events", f".{global_step}")
        self._writer.write_event(Event(step=global_step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._flushed = time.monotonic()

    def add(self, kind: str, epoch: int, global_step: int, **values: Any) -> None:
        self.lines.append({"kind": kind, "epoch": epoch, "global_step": global_step, **values})
        for name, value in values.items():
            if isinstance(value, int | float):
                summary = scalar(f"{kind}/{name}", value)
                self._writer.write_event(Event(wall_time=time.time(), step=global_step, summary=summary))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Stores what was added so far; called before each checkpoint."""
        self.run.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self._writer.flush()
        self.run.create("tensorboard")
        for file in Path(self._events.name).iterdir():
            self.run.upload(file, f"tensorboard/{file.name}")
        self._flushed = time.monotonic()


def read_lines(run: Folder) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none if there is no such file. Raises UserError for a damaged one."""
    try:
        return [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{join_uri(run.uri, 'metrics.jsonl')} is damaged ({error}); mend or remove it") from error


def chance_warning(
    train: float, validation: float | None, num_seen: int, num_classes: int, momentum: float
) -> tuple[str, str] | None:
    """(kind, message) if an accuracy over `num_seen` images is within 3 standard errors of chance, else None.

    `train` and `validation` are shares in 0..1, `validation` None where there is none yet; `momentum` is BatchNorm's.
    """
    chance = 1 / num_classes
    limit = chance + 3 * math.sqrt(chance * (1 - chance) / num_seen)
    if limit > (1 + chance) / 2:  # too few images to tell
        return None
    if train <= limit:
        return "train_at_chance", (
            f"training accuracy is {train:.1%}, chance is {chance:.1%}: the network is not learning. Likely causes: a "
            "learning rate that is too high or too low, an --input-range that the weights were not made for, or labels "
            "that do not belong to their images"
        )
    if validation is not None and validation <= limit:
        return "validation_at_chance", (
            f"validation accuracy is {validation:.1%}, chance is {chance:.1%}, while training accuracy is {train:.1%}. "
            f"Likely causes: BatchNorm's moving statistics lag behind the weights (momentum {momentum:g}; train on, or "
            "lower --batchnorm-momentum), or overfitting"
        )
    return None
