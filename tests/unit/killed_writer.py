"""Run as a script: kills a process at many points while its saver writes a second checkpoint, and looks what is left.

Torch is imported once: every process here is forked from one that has started no threads. Usage: killed_writer.py
FOLDER NUM_POINTS; prints a JSON list with what became of each process.
"""

import json
import os
import resource
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from checkpoint_states import EXPECT, meta_of, optimizer_state, same, state, without_log

import cifar_dist
from cifar_dist.run.checkpoint import Cursor, Mark
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.folder import Run
from cifar_dist.run.log import LOG, read_lines
from cifar_dist.run.ownership import Attempts
from cifar_dist.storage import Folder
from cifar_dist.train.saver import Saver
from cifar_dist.versions import package_versions

OURS = str(Path(cifar_dist.__file__).parent)
# Bytes after which no file may grow: the kernel kills in the midst of a write. The files are 100 to 4000 bytes long.
FILE_SIZES = (0, 50, 150, 300, 800, 2000)
OnEvent = Callable[[str, FrameType], None]


def forked(act: Callable[[], object]) -> int:
    """The wait status of a process that did it; 0 if that went well."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            act()
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return os.waitpid(process, 0)[1]


def saver_of(run: str, driver: str, attempt: int, num_kept: int) -> Saver:
    """Goes on behind the newest checkpoint."""
    newest = Checkpoints(run).latest()
    mark = Mark(**newest.meta["log"]) if newest else None
    saver = Saver(Run(run), driver, attempt, device=torch.device("cpu"), global_step=0, mark=mark, num_kept=num_kept)
    assert not saver.log.lost
    return saver


def save(saver: Saver, epoch: int) -> None:
    """With a line of the log, of which TensorBoard is told nothing: its local file may not grow either."""
    saver.log.add("samples", epoch, epoch, ids=[epoch])
    saver.save(Cursor(epoch, 0), state(epoch), meta_of())
    saver.wait()


def prepare(run: str) -> None:
    """Two checkpoints: the next one makes the first one go, and the second one too once it is whole."""
    attempt = Attempts(Folder(run), "aaaaaaaa").claim(takeover=True)
    saver = saver_of(run, "aaaaaaaa", attempt, 2)
    save(saver, 0)
    save(saver, 1)


def write_second(run: str, on_event: OnEvent | None = None, file_size: int | None = None) -> None:
    """`on_event` sees each function call, in Python or C, that opens the log, then those of the thread that stores."""

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if on_event and event in ("call", "c_call"):
            on_event(event, frame)

    sys.setprofile(profile)
    saver = saver_of(run, "aaaaaaaa", 1, 1)
    sys.setprofile(None)
    threading.setprofile(profile)
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    save(saver, 2)


def killer(point: int) -> OnEvent:
    num_seen = 0

    def on_event(_event: str, _frame: FrameType) -> None:
        nonlocal num_seen
        num_seen += 1
        if num_seen == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_event


def record_events(run: str, target: Path) -> None:
    """Into `target`, for each event in turn whether it is a call of a function of ours."""
    ours = []
    write_second(run, lambda event, frame: ours.append(event == "call" and frame.f_code.co_filename.startswith(OURS)))
    target.write_text(json.dumps(ours))


def logged(run: str) -> list[int]:
    """The epochs that the log has lines of."""
    return [epoch for line in read_lines(Folder(run)) for epoch in line["ids"]]


def look(run: str) -> int:
    """The epoch of the checkpoint that a resume goes on from; raises unless all is as it must be."""
    notes: list[tuple[str, str]] = []
    found = Checkpoints(run).load_newest(EXPECT, lambda *note: notes.append(note))
    assert found is not None, "no checkpoint is left"
    checkpoint, loaded = found
    epoch = checkpoint.cursor.epoch
    assert notes == [(checkpoint.name, "")], notes
    assert epoch in (1, 2), checkpoint.name
    assert same(without_log(loaded), without_log(state(epoch))), f"{checkpoint.name} is another one than was written"
    assert logged(run) in ([0, 1], [0, 1, 2])
    attempt = Attempts(Folder(run), "bbbbbbbb").claim(takeover=True)
    save(saver_of(run, "bbbbbbbb", attempt, 1), 3)
    assert logged(run) == [*range(epoch + 1), 3]
    again, loaded = Checkpoints(run).load_newest(EXPECT) or (None, None)
    assert again is not None
    assert again.cursor.epoch == 3
    assert same(without_log(loaded), without_log(state(3)))
    files = {str(p.relative_to(run)) for p in (Path(run) / "checkpoints").rglob("*") if p.is_file()}
    expected = {f"checkpoints/{again.name}/{file}" for file in (*again.meta["files"], "meta.json")}
    assert files == expected, f"not cleaned up: {files - expected}"
    return epoch


def look_at_all(runs: list[str], target: Path) -> None:
    """Into `target`, for each run the epoch, or what is wrong with it."""
    found: list[int | str] = []
    for run in runs:
        try:
            found.append(look(run))
        except Exception:
            found.append(traceback.format_exc())
    target.write_text(json.dumps(found))


def spread(things: list[int], num: int) -> set[int]:
    """`num` of them, the first and the last included."""
    return {things[round(i * (len(things) - 1) / (num - 1))] for i in range(num)}


def main(folder: Path, num_points: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    torch.save(optimizer_state(), folder / "warm.pt")  # what is imported at the first use is imported once
    package_versions()
    assert forked(lambda: prepare(str(folder / "start"))) == 0
    shutil.copytree(folder / "start", folder / "counted")
    assert forked(lambda: record_events(str(folder / "counted"), folder / "events")) == 0
    ours = [event for event, is_ours in enumerate(json.loads((folder / "events").read_text()), 1) if is_ours]
    # Most events are of libraries that read package versions: as many points again between the steps of our own.
    points = spread(list(range(1, ours[-1] + 1)), num_points) | spread(ours, num_points)
    acts: dict[str, dict[str, Any]] = {f"event {p} of {ours[-1]}": {"on_event": killer(p)} for p in sorted(points)}
    in_log = (folder / "start" / LOG).stat().st_size + 20  # in the midst of a line
    acts |= {f"file of {size} bytes": {"file_size": size} for size in (*FILE_SIZES, in_log)}
    signals, runs = [], []
    for options in acts.values():
        runs.append(str(folder / f"run-{len(runs)}"))
        shutil.copytree(folder / "start", runs[-1])
        status = forked(lambda: write_second(runs[-1], **options))  # noqa: B023 - called at once
        signals.append(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
    assert (Path(runs[-1]) / LOG).stat().st_size == in_log
    assert forked(lambda: look_at_all(runs, folder / "found")) == 0
    rows = zip(acts, signals, json.loads((folder / "found").read_text()), strict=True)
    return [{"where": where, "signal": number, "found": found} for where, number, found in rows]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
