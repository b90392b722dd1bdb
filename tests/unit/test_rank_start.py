"""How two ranks start: one reads storage for both, and both compile before either waits for the other."""

import functools
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_worker import Rank, Stored, everything, stopped, without_ray
from torch._dynamo.testing import CompileCounter

from cifar_dist.errors import UserError
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.network import Precision, expected_of
from cifar_dist.train import assemble, rank_state
from cifar_dist.train import worker as worker_module
from cifar_dist.train.loop import train_epoch
from cifar_dist.train.step import Step

LIMIT_SECONDS = 60
STOP_AT = 4  # inside the first epoch, where each rank has statistics of its own


def in_group(rank: int, act: Callable[[int, Path], Any], folder: Path) -> None:
    """One of two processes. What it returns goes into a file."""
    torch.set_num_threads(1)
    without_ray(setattr)
    place, limit = f"file://{folder}/group", timedelta(seconds=LIMIT_SECONDS)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=limit)
    found = act(rank, folder)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def both(act: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    multiprocessing.set_forkserver_preload([worker_module.__name__])
    torch.multiprocessing.start_processes(in_group, (act, folder), 2, start_method="forkserver")
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in (0, 1)]  # noqa: S301 - its own


def read_by_one(rank: int, folder: Path) -> Any:
    """Trains a little on shared storage, then starts again where only rank 0 sees it."""
    stopped(folder / "run", STOP_AT if rank == 0 else 1e9, rank, 2)
    worker = Stored(folder / ("run" if rank == 0 else "nowhere"), rank, 2)
    expect = expected_of(worker.plan.config, worker.manifest)
    worker.resume(worker.run_folder.checkpoints.load_newest(expect) if rank == 0 else None)
    if worker.saver:
        worker.saver.close()
    return everything(worker), worker.state.totals.tolist()


def test_a_checkpoint_is_read_by_one_rank_and_sent_to_the_other(tmp_path):
    found = both(read_by_one, tmp_path)
    assert not (tmp_path / "nowhere").exists()
    checkpoints = Checkpoints(str(tmp_path / "run"))
    checkpoint = checkpoints.latest()
    for rank, (state, totals) in enumerate(found):
        alone = Rank(rank, 2, seed=1)  # as if it had read the checkpoint itself
        alone.state.precision = Precision("fp32", torch.device("cpu"))
        alone.restore(checkpoint, checkpoints.load(checkpoint))
        assert state[0::3] == everything(alone)[0::3]
        assert state[1] == everything(alone)[1]
        assert totals == alone.state.totals.tolist()
    assert found[0][0][0] != found[1][0][0]  # the moving statistics


def send(rank: int, _folder: Path) -> Any:
    state = Rank(rank, 2).state
    tree = {
        "floats": torch.arange(6.0).view(2, 3),
        "channels last": torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        "others": [torch.tensor(7), torch.tensor([True, False]), {"scalar": torch.tensor(2**30, dtype=torch.float32)}],
        "plain": [1, "two", None, (3, 4)],
        "empty": torch.zeros(0, 5),
        "halves": torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
    }
    received = rank_state.from_rank_zero(tree if rank == 0 else None, state)
    return received, rank_state.from_rank_zero(None, state)


def test_trees_arrive_as_they_were_sent(tmp_path):
    (sent, _), (received, nothing) = both(send, tmp_path)
    assert nothing is None
    assert received.keys() == sent.keys()
    assert received["plain"] == sent["plain"]
    flat = [[tree[n] for n in ("floats", "channels last", "empty", "halves")] for tree in (sent, received)]
    for tree, values in zip((sent, received), flat, strict=True):
        values += [*tree["others"][:2], tree["others"][2]["scalar"]]
    for one, other in zip(*flat, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one, other)


def compiled(rank: int, folder: Path) -> Any:
    """Rank 1 compiles when rank 0 is done, so neither waits for the other."""
    counter = CompileCounter()
    torch.compile = functools.partial(torch.compile, backend=counter)
    worker = Stored(folder / "run", rank, 2, compile="on", epochs=1)
    state = worker.state
    before = everything(worker)
    assemble.wrap(state, len(worker.images.train_ids))
    start = time.monotonic()
    while rank == 1 and not (folder / "first").exists():
        assert time.monotonic() - start < LIMIT_SECONDS / 2
        time.sleep(0.05)
    assemble.compile_now(state, worker.images)
    if rank == 0:
        (folder / "first").touch()
    num_compiled = counter.frame_count
    is_as_before = everything(worker) == before and all(p.grad is None for p in state.model.parameters())
    train_epoch(Step(state), worker.images.train_batches(state.cursor), lambda _clock: None)
    return num_compiled, counter.frame_count, is_as_before, everything(worker) != before


def test_ranks_compile_before_the_first_step_without_waiting_for_each_other(tmp_path):
    for num_before, num_after, is_as_before, has_trained in both(compiled, tmp_path):
        assert num_before == num_after > 0
        assert is_as_before
        assert has_trained


def test_nothing_is_compiled_where_nothing_is_to_be(tmp_path):
    worker = Stored(tmp_path, compile="off")
    worker.images = None
    assemble.compile_now(worker.state, worker.images)


def test_torch_s_compiler_takes_what_the_worker_sets_up(tmp_path):
    """In a fresh process, up to the end of what assemble() sets of torch."""
    program = f"""
import os
from types import SimpleNamespace as Values
from cifar_dist.train import assemble
from cifar_dist.config import Config

class Enough(Exception):
    pass

def stop(_job):
    raise Enough

assemble.open_data, assemble.num_cpus = stop, lambda: 3
plan = Values(config=Config(), data=Values(staging=Values(folder={str(tmp_path)!r})))
try:
    assemble.assemble(Values(plan=plan, num_cpus_per_worker=3), None, rank=0, world=1, local_world=1)
except Enough:
    pass
import torch._inductor.config as config
from torch._inductor.runtime.cache_dir_utils import cache_dir
print(config.compile_threads, cache_dir())
"""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False)
    folder = tmp_path / f"cifar_dist-staged-{os.geteuid()}" / "compiled"
    assert done.stdout.split() == ["3", str(folder)], done.stderr
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_compiler_is_set_up_only_where_the_user_has_not(monkeypatch):
    names = ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is unset again after the test
        monkeypatch.delenv(name)
    assemble.set_up_compiler("/a/folder", 3)
    assert [os.environ[name] for name in names] == ["/a/folder", "3"]
    assemble.set_up_compiler("/another", 4)
    assert [os.environ[name] for name in names] == ["/a/folder", "3"]


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_of_different_precision_are_refused(world, monkeypatch):
    def gather(found: list[Any], own: str) -> None:
        found[:] = [own, "fp32"][:world]

    monkeypatch.setattr(rank_state.dist, "all_gather_object", gather)
    state = Rank(0, world).state  # fp16
    if world == 1:
        rank_state.check_precision(state)
    else:
        with pytest.raises(UserError, match="the workers' processors differ: --precision auto means"):
            rank_state.check_precision(state)
