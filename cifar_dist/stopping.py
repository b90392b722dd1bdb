"""SIGTERM and Ctrl-C: the first one ends the job in good order, a second one ends it at once."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
received = 0  # the signal that asked this process to end, 0 before


def listen(is_job: bool = True) -> None:
    """Has both signals raise KeyboardInterrupt in the main thread, and one that nobody catches end the process with the
    sentence. To be called again after ray.init(), which puts handlers of its own in their place; another thread has
    none to put."""
    if is_job and threading.current_thread() is threading.main_thread():
        sys.excepthook = _end
        for number in SIGNALS:
            signal.signal(number, _handle)


def _handle(number: int, _frame: FrameType | None) -> None:
    global received  # noqa: PLW0603 - a signal is the process's own
    if received:
        os._exit(128 + number)  # what is left of a local cluster is ended by its guardian (launch/local_cluster.py)
    received = number
    raise KeyboardInterrupt


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As sys.excepthook."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print(sentence(), file=sys.stderr, flush=True)
    os._exit(exit_code())


def exit_code() -> int:
    """As a shell says it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (received or signal.SIGINT)


def sentence() -> str:
    name = " by SIGTERM" if received == signal.SIGTERM else ""
    return f"interrupted{name}; run the same command to go on from what is stored"
