"""SIGTERM and Ctrl-C: the first signal ends the job in good order, a second signal ends it at once."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
received = 0  # the signal that asked this process to end, 0 before


def listen(is_job: bool = True) -> None:
    """Makes both signals raise KeyboardInterrupt in the main thread. If uncaught, the process ends with the sentence.

    Call it again after ray.init(), which installs its own handlers. Python lets only the main thread set handlers, so
    in other threads it does nothing."""
    if is_job and threading.current_thread() is threading.main_thread():
        sys.excepthook = _end
        for number in SIGNALS:
            signal.signal(number, _handle)


def _handle(number: int, _frame: FrameType | None) -> None:
    global received  # noqa: PLW0603 - signals are global to the process
    if received:
        os._exit(128 + number)  # the guardian ends a local cluster (launch/local_cluster.py)
    received = number
    raise KeyboardInterrupt


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Serves as sys.excepthook: an uncaught KeyboardInterrupt prints the sentence and ends the process."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print(sentence(), file=sys.stderr, flush=True)
    os._exit(exit_code())


def exit_code() -> int:
    """Returns the shell's exit code: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (received or signal.SIGINT)


def sentence() -> str:
    name = " by SIGTERM" if received == signal.SIGTERM else ""
    return f"interrupted{name}; run the same command to go on from what is stored"
