"""A run's record: metrics.jsonl and TensorBoard events, rewritten whole; each checkpoint holds its lines so far."""

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
BOUND_SHARE = 0.1  # of the time, from which on waiting is worth mending


class RunLog:
    """Lines of a run that goes on at `global_step` after `lines`, those of the checkpoint that it resumes from.

    Each line is a JSON object with `kind` (step, epoch, warning or samples), `epoch`, `global_step` and what was
    measured.
    """

    def __init__(self, run_uri: str, global_step: int, lines: list[dict[str, Any]], retry_seconds: float = 0.0) -> None:
        self.run = Folder(run_uri, retry_seconds)
        self.lines = list(lines)
        self._events = tempfile.TemporaryDirectory(prefix="cifar_dist-events-")
        # Not SummaryWriter: it writes from a thread, and its flush does not wait for that.
        self._writer = EventsWriter(f"{self._events.name}/events", f".{global_step}")
        self._writer.write_event(Event(step=global_step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._taken = time.monotonic()

    def add(self, kind: str, epoch: int, global_step: int, **values: Any) -> None:
        self.lines.append({"kind": kind, "epoch": epoch, "global_step": global_step, **values})
        for name, value in values.items():
            if isinstance(value, int | float):
                summary = scalar(f"{kind}/{name}", value)
                self._writer.write_event(Event(wall_time=time.time(), step=global_step, summary=summary))

    @property
    def is_due(self) -> bool:
        """Whether the lines were last taken FLUSH_SECONDS ago."""
        return time.monotonic() - self._taken > FLUSH_SECONDS

    def take(self) -> list[dict[str, Any]]:
        """The lines so far, to be stored or put into a checkpoint, in any thread."""
        self._writer.flush()
        self._taken = time.monotonic()
        return list(self.lines)

    def store(self, lines: list[dict[str, Any]]) -> None:
        """Writes what was taken, and the events."""
        self.run.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        self.run.create("tensorboard")
        for file in Path(self._events.name).iterdir():
            self.run.upload(file, f"tensorboard/{file.name}")

    def close(self) -> None:
        """Removes the local copy of the events."""
        self._writer.close()
        self._events.cleanup()


def read_lines(run: Folder) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none if there is no such file. Raises UserError for a damaged one."""
    try:
        return [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{join_uri(run.uri, 'metrics.jsonl')} is damaged ({error}); mend or remove it") from error


def chance_warning(accuracy: float, num_seen: int, num_classes: int) -> str | None:
    """What to say of a training accuracy over `num_seen` images that is within 3 standard errors of chance."""
    chance = 1 / num_classes
    limit = chance + 3 * math.sqrt(chance * (1 - chance) / num_seen)
    if accuracy > limit or limit > (1 + chance) / 2:  # too few images to tell
        return None
    return (
        f"training accuracy is {accuracy:.1%}, chance is {chance:.1%}: the network is not learning. Likely causes: a "
        "learning rate that is too high or too low, an --input-range that the weights were not made for, or labels "
        "that do not belong to their images"
    )


def validation_lags(train: float, validation: float, num_classes: int) -> bool:
    """Whether validation accuracy stays near chance while training accuracy does not: training is at twice chance or
    better, and validation has less than a third of what training has gained over chance."""
    chance = 1 / num_classes
    return train > min(2 * chance, (1 + chance) / 2) and validation - chance < (train - chance) / 3


def validation_warning(train: float, validation: float, recalibrated: float, num_classes: int, momentum: float) -> str:
    """What lagging validation comes from; `recalibrated` is its accuracy with BatchNorm's statistics re-estimated."""
    found = (
        f"validation accuracy is {validation:.1%}, near chance ({1 / num_classes:.1%}), while training accuracy is "
        f"{train:.1%}. With BatchNorm's statistics re-estimated the same weights reach {recalibrated:.1%}: "
    )
    if recalibrated - validation > (train - validation) / 3:
        return found + (
            f"the moving statistics lag behind the weights (momentum {momentum:g}), the network itself is sound. It "
            "heals over some hundreds of steps; --recalibrate-batches 20 or a lower --batchnorm-momentum does it now"
        )
    return found + (
        "so it is not BatchNorm's moving statistics. Likely causes: overfitting (too few images, or none flipped), or "
        "validation images unlike the training images"
    )


def bottleneck_verdict(seconds: float, data_wait_seconds: float, communication_seconds: float) -> str:
    """What bounds a run: input or communication if training waited for it a tenth of the time or more, else compute."""
    shares = {"input": data_wait_seconds / seconds, "communication": communication_seconds / seconds}
    worst = max(shares, key=lambda name: shares[name])
    bound = worst if shares[worst] >= BOUND_SHARE else "compute"
    advice = {
        "input": "; --cache decoded, --dali-threads or more CPUs per worker feed it faster",
        "communication": "; a larger --global-batch-size or --gradient-dtype bf16 relieves it",
        "compute": "",
    }
    return (
        f"{bound}-bound: {1 - sum(shares.values()):.1%} computing, {shares['input']:.1%} waiting for input, "
        f"{shares['communication']:.1%} for gradients of other workers, of {seconds:.1f} s of training{advice[bound]}"
    )
