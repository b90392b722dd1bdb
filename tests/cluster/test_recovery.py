"""A run may be killed anywhere and moved to another number of workers: it ends as if nothing had happened.

Real raylets, real signals; each test leaves as many nodes as it found.
"""

import gzip
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs
import pytest
import torch
from job_process import Job, assert_same_run, free_port, read_metrics, run_job, train_args, wait_until
from ray_cluster import Nodes, raylet_pid

from cifar_dist.config import Config
from cifar_dist.data import order
from cifar_dist.data.staged import DataSet
from cifar_dist.run.checkpoint import Checkpoint
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.network import image_spec
from cifar_dist.run.splits import split_ids

NUM_NODES = 3  # of the shared cluster


def newest(run: Path) -> Checkpoint | None:
    return Checkpoints(str(run)).latest()


def wait_for_attempt(run: Path, attempt: int, job: Job) -> None:
    """Until that attempt has written a checkpoint."""

    def is_there() -> bool:
        assert job.process.poll() is None, job.wait()
        checkpoint = newest(run)
        return checkpoint is not None and checkpoint.meta["attempt"] >= attempt

    wait_until(is_there)


def wait_for_size(run: Path, num_workers: int, job: Job) -> None:
    """Until so many workers have written a checkpoint."""

    def is_there() -> bool:
        assert job.process.poll() is None, job.wait()
        checkpoint = newest(run)
        return checkpoint is not None and checkpoint.meta["world_size"] == num_workers

    wait_until(is_there)


def assert_every_sample_once(run: Path, data: str, num_steps: int | None = None) -> None:
    """The recorded ids and flips of every step are those that the cursor alone determines, without gaps or repeats."""
    recorded = [line for line in read_metrics(run) if line["kind"] == "samples"]
    assert [line["global_step"] for line in recorded] == list(range(1, len(recorded) + 1))
    assert len(recorded) == num_steps if num_steps else recorded
    checkpoint = newest(run)
    assert checkpoint is not None
    config = Config.from_dict(checkpoint.meta["config"])
    data_set = DataSet.open(data)
    ids, _ = split_ids(config, data_set.manifest, data_set.stage("train").labels)
    size, seed = config.loop.global_batch_size, config.loop.seed
    steps_per_epoch = order.num_steps(len(ids), size)
    for line in recorded:
        step = line["global_step"] - 1 - line["epoch"] * steps_per_epoch
        expected = ids[order.epoch_order(seed, line["epoch"], len(ids))][step * size : (step + 1) * size]
        assert line["ids"] == expected.tolist()
        drawn = image_spec(config, torch.device("cpu")).draw(seed, line["epoch"], expected)
        assert line["flips"] == drawn.flips.tolist()


def test_killed_at_every_place_it_ends_with_the_same_bits(
    nodes: Nodes, whole_run: tuple[Path, str], tiny_uri: str, tmp_path: Path
) -> None:
    """One worker, then all of them, then the driver, then a worker's raylet, one after the other in one run."""
    run = tmp_path / "run"
    more = ["--checkpoint-every-steps", "1", "--max-failures", "2"]
    job = Job(*train_args(tiny_uri, tmp_path, "run", 2, *more))
    wait_for_attempt(run, 1, job)
    os.kill(nodes.train_workers()[0], signal.SIGKILL)
    wait_for_attempt(run, 2, job)
    for pid in nodes.train_workers():
        os.kill(pid, signal.SIGKILL)
    wait_for_attempt(run, 3, job)
    job.process.kill()
    job.wait()
    job = Job(*train_args(tiny_uri, tmp_path, "run", 2, *more))
    wait_for_attempt(run, 4, job)
    nodes.kill(nodes.of_process(nodes.train_workers()[0]))
    code, output = job.wait()
    nodes.add()
    assert code == 0, output
    assert "(attempt 5)" in output
    assert_same_run(run, whole_run[0])


@pytest.mark.slow
def test_fan_with_muon_an_average_and_factors_ends_with_the_same_bits(
    nodes: Nodes, tiny_uri: str, tmp_path: Path
) -> None:
    """A worker, then the driver, each inside the one epoch: a checkpoint waits until the one before it is stored."""
    fan = ("--recipe", "quickstart_fan", "--optimizer", "muon", "--ema-decay", "0.9", "--keep-checkpoints", "1")
    steps = ("--epochs", "1", "--train-images", "48", "--global-batch-size", "4", "--validation-fraction", "0.15")
    few = [*fan, *steps, "--checkpoint-every-steps", "0"]
    code, output = run_job(*train_args(tiny_uri, tmp_path, "whole", 2, *few, "--profile"))
    assert code == 0, output
    (trace,) = tmp_path.glob("whole/profile/*")
    assert b"FactoredBackward" in gzip.decompress(trace.read_bytes())
    run = tmp_path / "run"
    job = Job(*train_args(tiny_uri, tmp_path, "run", 2, *few, "--checkpoint-every-steps", "2"))
    wait_for_attempt(run, 1, job)
    os.kill(nodes.train_workers()[0], signal.SIGKILL)
    wait_for_attempt(run, 2, job)
    job.process.kill()
    job.wait()
    stored = newest(run)
    assert stored is not None
    assert stored.cursor.epoch == 0
    code, output = run_job(*train_args(tiny_uri, tmp_path, "run", 2, *few))
    assert code == 0, output
    assert f"continuing from {stored.name} (attempt 3)" in output
    assert_same_run(run, tmp_path / "whole")


def test_another_number_of_workers_sees_the_same_batches(tiny_uri: str, tmp_path: Path) -> None:
    """2 workers, then 1, then 3, each but the last one killed inside an epoch."""
    run = tmp_path / "run"
    more = ["--checkpoint-every-steps", "1", "--record-samples"]
    for attempt, num_workers in enumerate((2, 1), 1):
        job = Job(*train_args(tiny_uri, tmp_path, "run", num_workers, *more))
        wait_for_attempt(run, attempt, job)
        job.process.kill()
        job.wait()
    code, output = run_job(*train_args(tiny_uri, tmp_path, "run", 3, *more))
    assert code == 0, output
    assert "(attempt 3)" in output
    assert_every_sample_once(run, tiny_uri, num_steps=16)


@pytest.mark.slow
def test_elastic_workers_shrink_with_the_cluster_and_grow_again(nodes: Nodes, tiny_uri: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["--epochs", "1000", "--checkpoint-every-steps", "1", "--record-samples", "--resize-seconds", "3"]
    args = train_args(tiny_uri, tmp_path, "run", 3, *more)
    args[args.index("3")] = "1:3"
    job = Job(*args)
    wait_for_size(run, 3, job)
    nodes.kill(nodes.of_process(nodes.train_workers()[0]))
    wait_for_size(run, 2, job)
    nodes.add()
    wait_for_size(run, 3, job)
    job.process.kill()
    job.wait()
    assert_every_sample_once(run, tiny_uri)


@pytest.mark.slow
def test_a_node_that_dies_before_the_run_starts_is_left_out(nodes: Nodes, tiny_uri: str, tmp_path: Path) -> None:
    """A raylet that has stopped answering counts as alive for some seconds more."""
    node = nodes.nodes[-1]
    os.kill(raylet_pid(node), signal.SIGSTOP)
    try:
        code, output = run_job(*train_args(tiny_uri, tmp_path, "run", 1, "--workers", "1:3", "--epochs", "1"))
    finally:
        nodes.replace(node)
    assert code == 0, output
    assert re.search(r"answers .*warning", output), output
    assert "run run finished" in output


@pytest.mark.slow
def test_a_preemption_notice_stores_a_checkpoint(
    nodes: Nodes, whole_run: tuple[Path, str], tiny_uri: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = Job(*train_args(tiny_uri, tmp_path, "run", 2, "--checkpoint-every-steps", "0"))
    wait_until(lambda: newest(run))  # of the first epoch
    node = nodes.of_process(nodes.train_workers()[0])
    nodes.drain(node, deadline_seconds=8)
    code, output = job.wait()
    nodes.replace(node)
    assert code == 0, output
    assert "a node is about to be taken away: storing a checkpoint" in output
    assert_same_run(run, whole_run[0])


@pytest.mark.slow
def test_a_worker_that_hangs_is_found(nodes: Nodes, whole_run: tuple[Path, str], tiny_uri: str, tmp_path: Path) -> None:
    more = ["--collective-timeout-seconds", "8", "--checkpoint-every-steps", "1"]
    job = Job(*train_args(tiny_uri, tmp_path, "run", 2, *more))
    wait_for_attempt(tmp_path / "run", 1, job)
    os.kill(nodes.train_workers()[-1], signal.SIGSTOP)
    code, output = job.wait()
    assert code == 0, output
    assert "(attempt 2)" in output
    assert_same_run(tmp_path / "run", whole_run[0])


def wait_for_phrase(nodes: Nodes, job: Job, phrase: str, num_said: int) -> None:
    """Until both workers are there, and the job has said it once more."""
    wait_until(lambda: len(nodes.train_workers()) == 2 and (not phrase or job.output().count(phrase) > num_said))


# Where a rank is stopped: after so many seconds from the moment its process is there, or from what the job says.
MOMENTS = [
    *(
        ("epoch 1/4 done", 0.0),
        ("continuing from", 0.0),
        ("continuing from", 2.0),
    ),  # after validation, features, a step
    *(("", 0.0), ("", 3.0)),  # the process group, imports, staging, reading a checkpoint
]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("rank", [0, -1])
def test_a_worker_that_is_stopped_at_any_wait_is_found(
    nodes: Nodes, whole_run: tuple[Path, str], tiny_uri: str, tmp_path: Path, rank: int
) -> None:
    """One after the other in one run. A hang costs the limit and what a start takes, in which it has to be found."""
    limit = 8
    more = ["--collective-timeout-seconds", str(limit), "--checkpoint-every-steps", "1", "--max-failures", "9"]
    job = Job(*train_args(tiny_uri, tmp_path, "run", 2, *more))
    for phrase, seconds in MOMENTS:
        wait_for_phrase(nodes, job, phrase, job.output().count(phrase))
        time.sleep(seconds)
        stopped = nodes.train_workers()[rank]
        os.kill(stopped, signal.SIGSTOP)
        start = time.monotonic()
        while stopped in nodes.train_workers():
            assert time.monotonic() - start < 90 + 2 * limit, f"{seconds} s after {phrase!r}: {job.output()}"
            time.sleep(0.1)
        print(f"{seconds} s after {phrase!r}: ended after {time.monotonic() - start:.1f} s")
    code, output = job.wait()
    assert code == 0, output
    assert_same_run(tmp_path / "run", whole_run[0])


def test_a_newer_start_of_a_run_takes_over_from_an_older_one(tiny_uri: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["--record-samples", "--checkpoint-every-steps", "1"]
    older = Job(*train_args(tiny_uri, tmp_path, "run", 1, "--epochs", "1000", *more))
    wait_for_attempt(run, 1, older)
    newer = Job(*train_args(tiny_uri, tmp_path, "run", 1, "--epochs", "1000", *more))
    code, output = older.wait()
    assert code == 1
    assert "was taken over as attempt 2 by process" in output
    assert "Traceback" not in output
    wait_for_attempt(run, 2, newer)
    newer.process.kill()
    newer.wait()
    assert_every_sample_once(run, tiny_uri)


@pytest.mark.slow
def test_two_starts_of_a_run_at_once_leave_one_that_goes_on(tiny_uri: str, tmp_path: Path) -> None:
    args = train_args(tiny_uri, tmp_path, "run", 1, "--epochs", "1", "--record-samples")
    jobs = [Job(*args), Job(*args)]
    outcomes = [job.wait() for job in jobs]
    codes = sorted(code for code, _ in outcomes)
    assert codes in ([0, 0], [0, 1]), outcomes  # both end well where one comes after the other has finished
    for code, output in outcomes:
        assert "is it shared?" not in output
        assert "Traceback" not in output
        assert "was taken over as attempt" in output or code == 0, output
    assert_every_sample_once(tmp_path / "run", tiny_uri, num_steps=4)
    assert not (tmp_path / "run" / "preflight").exists()


def test_preflight_prints_what_it_found(tiny_uri: str, tmp_path: Path) -> None:
    code, output = run_job(*train_args(tiny_uri, tmp_path, "run", 2, "--preflight-only"))
    assert code == 0, output
    for check in ("versions", "storage", "data set", "disk", "/dev/shm"):
        assert len(re.findall(rf"^{check} .* ok ", output, re.MULTILINE)) == NUM_NODES, output
    assert "2 of 1 CPU" in output
    assert not Checkpoints(str(tmp_path / "run")).all()


SECRET = "very-secret-key"


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[subprocess.Popen, str]]:
    """(process, URI of a bucket): a server that speaks S3, on loopback, as a process that can be stopped."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    port = free_port()
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    query = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    fs, _ = pyarrow.fs.FileSystem.from_uri(f"s3://bucket?{query}&allow_bucket_creation=true")
    wait_until(lambda: can_create(fs))
    yield server, f"s3://bucket/runs?{query}"
    server.kill()


def can_create(fs: object) -> bool:
    try:
        fs.create_dir("bucket")  # type: ignore[attr-defined]
        return True
    except OSError:
        return False


@pytest.mark.slow
def test_object_storage_that_is_away_for_a_while_costs_nothing(
    s3_server: tuple[subprocess.Popen, str], whole_run: tuple[Path, str], tiny_uri: str, tmp_path: Path
) -> None:
    """The server is frozen in the middle of a run, then the driver is killed and the run continued."""
    server, storage = s3_server
    uri = storage.replace("/runs", "/runs/run")
    args = train_args(tiny_uri, storage, "run", 2, "--checkpoint-every-steps", "0")
    job = Job(*args, local=True)  # so that the workers have the credentials
    wait_until(lambda: Checkpoints(uri).latest())
    server.send_signal(signal.SIGSTOP)
    time.sleep(12)
    assert job.process.poll() is None
    server.send_signal(signal.SIGCONT)
    stuck = Checkpoints(uri).latest()
    assert stuck is not None
    wait_until(lambda: Checkpoints(uri).latest() != stuck)
    job.process.kill()
    job.wait()
    code, output = run_job(*args, local=True)
    assert code == 0, output
    assert "continuing from" in output
    copy = tmp_path / "run"
    checkpoints = Checkpoints(uri)
    run = checkpoints.folder.fs
    for info in run.get_file_info(pyarrow.fs.FileSelector("bucket/runs/run", recursive=True)):
        if info.is_file:
            target = tmp_path / Path(info.path).relative_to("bucket/runs")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(run.open_input_stream(info.path).read())
            assert SECRET.encode() not in target.read_bytes(), info.path
    assert SECRET not in output
    assert_same_run(copy, whole_run[0])


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_said_and_costs_nothing(whole_run: tuple[Path, str], tiny_uri: str, tmp_path: Path) -> None:
    """The disk holds one checkpoint of about 100 MB and not two; then there is room again."""
    storage = tmp_path / "small"
    storage.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", str(storage)], check=True)
    try:
        args = train_args(tiny_uri, storage, "run")
        code, output = run_job(*args)
        assert code == 1
        assert "cannot write" in output
        assert "Traceback" not in output
        kept = newest(storage / "run")
        assert kept is not None
        Checkpoints(str(storage / "run")).load(kept)
        subprocess.run(["mount", "-o", "remount,size=900m", str(storage)], check=True)
        code, output = run_job(*args)
        assert code == 0, output
        assert f"continuing from {kept.name}" in output
        assert_same_run(storage / "run", whole_run[0])
        subprocess.run(["mount", "-o", "remount,ro", str(storage)], check=True)
        code, output = run_job(*train_args(tiny_uri, storage, "other"))
        assert code == 1
        assert "Read-only file system" in output
        assert "Traceback" not in output
    finally:
        subprocess.run(["umount", str(storage)], check=True)
