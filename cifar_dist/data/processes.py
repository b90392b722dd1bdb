"""Makes parts of a data set in processes of this machine, one for each CPU."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from cifar_dist.data.check import Checker
from cifar_dist.data.making import make_part
from cifar_dist.data.parts import Made, Part
from cifar_dist.environment import frugal_memory
from cifar_dist.errors import UserError

POLL_SECONDS = 0.2


class Process:
    """What a process that makes parts keeps: the child that checks pictures, and what it shares with the job."""

    def __init__(self, num_done: Any, stop: Any) -> None:
        self.checker, self.num_done, self.stop = Checker(num_threads=1), num_done, stop

    def passed(self, num_pictures: int) -> None:
        with self.num_done.get_lock():
            self.num_done.value += num_pictures
        if self.stop.is_set():
            raise KeyboardInterrupt


PROCESS: list[Process] = []


def begin(num_done: Any, stop: Any) -> None:
    """Sets a new process up. It ends with the job, also if the job is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the job says when to stop
    PROCESS[:] = [Process(num_done, stop)]
    threading.Thread(target=end_with_the_job, daemon=True).start()


def end_with_the_job() -> None:
    job = multiprocessing.parent_process()
    assert job
    job.join()
    os._exit(1)


def make(part: Part, uri: str) -> Made | None:
    """Makes a part in this process; None if it was told to stop."""
    (process,) = PROCESS
    try:
        return make_part(part, uri, process.checker, process.passed)
    except KeyboardInterrupt:
        process.checker.stop()
        return None


def in_processes(parts: list[Part], uri: str, passed: Callable[[int], None], *, num_processes: int) -> Iterator[Made]:
    """Yields what is made of each part, in any order. A failure of one stops all."""
    context = multiprocessing.get_context("forkserver")  # a fork of this process would inherit locks of its threads
    context.set_forkserver_preload(["cifar_dist.data.making"])  # imported once, and shared by the processes
    num_done, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(num_processes, context, begin, (num_done, stop))
    waiting: set[Future[Made | None]] = set()
    left, num_told = iter(parts), 0
    try:
        while True:
            with frugal_memory():  # a process may start when it is first needed
                while len(waiting) < num_processes + 1 and (part := next(left, None)):
                    waiting.add(pool.submit(make, part.portable(), uri))
            if not waiting:
                return
            finished, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
            now = num_done.value
            passed(now - num_told)
            num_told = now
            yield from (made for future in finished if (made := future.result()))
    except BrokenProcessPool as error:
        raise UserError(
            "a process that prepares pictures was killed, perhaps because memory was short; run the same command again "
            "to go on, with fewer --tasks"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
