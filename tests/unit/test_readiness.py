"""Ranks that wait for each other while they work: as long as the work goes on, and no longer than the limit if not."""

import os
import signal
import time
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cifar_dist.train.readiness import RankHangsError, Readiness

LIMIT_SECONDS = 2.0


def nothing() -> None:
    pass


def hang() -> None:
    time.sleep(600)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def work() -> None:
    """Longer than the limit."""
    end = time.monotonic() + 2.5 * LIMIT_SECONDS
    while time.monotonic() < end:
        sum(range(1000))


def fail() -> None:
    raise ValueError("a fault")


def act(rank: int, world: int, folder: Path, action: Any, results: Any) -> None:
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=limit)
    readiness, start, said = Readiness(LIMIT_SECONDS), time.monotonic(), "ready"
    try:
        with readiness.together():
            if rank == world - 1:
                action()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    results.put((rank, said, time.monotonic() - start))


@pytest.fixture
def ranks(tmp_path):
    """What each rank says, and after how many seconds, where the last one does `action`."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["cifar_dist.train.readiness"])
    processes = []

    def run(action: Any, world: int = 2, num_answers: int | None = None) -> dict[int, tuple[str, float]]:
        results = context.Queue()
        for rank in range(world):
            processes.append(context.Process(target=act, args=(rank, world, tmp_path, action, results)))
            processes[-1].start()
        answers = [results.get(timeout=60) for _ in range(num_answers or world)]
        return {rank: (said, seconds) for rank, said, seconds in answers}

    run.processes = processes
    yield run
    for process in processes:
        process.kill()
        process.join()


def test_ranks_that_are_ready_go_on_at_once(ranks):
    found = ranks(nothing, 3)
    assert {said for said, _ in found.values()} == {"ready"}


def test_work_that_goes_on_is_waited_for(ranks):
    """Beyond the limit."""
    found = ranks(work)
    assert {said for said, _ in found.values()} == {"ready"}
    assert found[0][1] > LIMIT_SECONDS


def test_a_call_that_hangs_is_named_and_its_process_ends(ranks):
    found = ranks(hang, 3, num_answers=2)
    for rank in (0, 1):
        assert found[rank][0].startswith("RankHangsError: rank 2 has done nothing for "), found
    ranks.processes[2].join(20)
    assert ranks.processes[2].exitcode == 1


def test_a_process_that_is_stopped_is_given_up(ranks):
    found = ranks(stop, num_answers=1)
    assert found[0][0] != "ready"
    assert LIMIT_SECONDS / 2 < found[0][1] < 30


def test_an_error_of_one_rank_ends_the_wait_of_the_others(ranks):
    found = ranks(fail)
    assert found[1][0] == "ValueError: a fault"
    assert found[0][0] != "ready"


def test_a_rank_alone_has_the_limit_too(ranks, tmp_path):
    assert ranks(nothing, 1)[0][0] == "ready"
    (tmp_path / "store").unlink()
    process = get_context("forkserver").Process(target=act, args=(0, 1, tmp_path, hang, None))
    process.start()
    process.join(30)
    assert process.exitcode == 1


def test_the_error_is_no_user_error():
    """So that Ray Train starts the group again."""
    assert not isinstance(RankHangsError(""), RuntimeError | SystemExit)
    assert RankHangsError.__mro__[1] is Exception
