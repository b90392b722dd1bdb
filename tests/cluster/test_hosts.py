"""A head and two workers as separate hosts: trained over the network, cut off, killed, joined again, evaluated."""

import os
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet
import pytest
from hosts import Hosts
from job_process import SMALL, read_metrics, wait_until
from test_recovery import assert_every_sample_once

from cifar_dist.run.checkpoints import Checkpoints

WORKERS = ("w1", "w2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(not shutil.which("ip"), reason="needs ip (Debian's iproute2)"),
]


def network_names() -> str:
    shown = [["ip", "netns", "list"], ["ip", "-brief", "link"]]
    return "".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in shown)


def test_two_hosts_train_lose_their_link_or_their_power_and_evaluate(tiny_uri: str, tmp_path: Path) -> None:
    run, checkpoints = tmp_path / "run", Checkpoints(str(tmp_path / "run"))
    elastic = ("--workers", "1:2", "--resize-seconds", "3", "--collective-timeout-seconds", "20")
    with Hosts(tmp_path, WORKERS) as hosts:
        staging = ("--staging-folder", str(hosts.own))

        def submit(*more: str, epochs: int) -> tuple[int, str]:
            where = ("--data", tiny_uri, "--storage", str(tmp_path), "--name", "run", *staging)
            settings = (*SMALL, "--epochs", str(epochs), "--record-samples", "--checkpoint-every-steps", "1")
            command = ("python", "jobs/train.py", *where, *settings, *elastic, "--max-failures", "20")
            return hosts.job("submit", "--working-dir", ".", *more, "--", *command)

        def wait_for_workers(number: int, attempt: int) -> int:
            """Until so many train, in a later attempt than `attempt`; returns that one."""

            def trains() -> bool:
                found = checkpoints.latest()
                return bool(found) and found.meta["world_size"] == number and found.meta["attempt"] > attempt

            wait_until(trains)
            found = checkpoints.latest()
            assert found is not None
            return found.meta["attempt"]

        code, output = submit("--submission-id", "first", "--no-wait", epochs=500)
        assert code == 0, output
        attempt = wait_for_workers(2, 0)
        staged = {name: hosts.files(name) for name in WORKERS}
        assert all(any("train" in path for path in files) for files in staged.values()), staged
        assert not any(hosts.own.iterdir())  # each host has its own

        hosts.link("w2", "down")
        attempt = wait_for_workers(1, attempt)
        hosts.link("w2", "up")
        hosts.kill("w2")  # Ray ends a node that was given up; a supervisor starts it again
        hosts.start("w2")
        attempt = wait_for_workers(2, attempt)
        hosts.kill("w1")
        attempt = wait_for_workers(1, attempt)
        hosts.start("w1")
        wait_for_workers(2, attempt)

        code, output = hosts.job("stop", "first")
        assert code == 0, output
        stored = checkpoints.latest()
        assert stored is not None
        code, output = submit(epochs=stored.cursor.epoch + 2)
        assert code == 0, output
        assert "continuing from" in output
        assert "2 workers of 1 CPU threads each" in output
        steps = [line["global_step"] for line in read_metrics(run) if line["kind"] == "step"]
        assert steps == list(range(1, 4 * (stored.cursor.epoch + 2) + 1))
        assert_every_sample_once(run, tiny_uri)

        before = {name: hosts.files(name) for name in WORKERS}
        where = ("--runs", str(run), "--data", tiny_uri, "--out", str(tmp_path / "report"), *staging)
        command = ("python", "jobs/evaluate.py", *where, "--shards", "2", "--splits", "train", "test")
        code, output = hosts.job("submit", "--working-dir", ".", "--", *command)
        assert code == 0, output
        after = {name: hosts.files(name) for name in WORKERS}
        for name in WORKERS:  # what training had staged was not staged again
            kept = {path: state for path, state in before[name].items() if "train" in path}
            assert kept
            assert kept.items() <= after[name].items()
            assert any("test" in path for path in after[name])
        predictions = pyarrow.parquet.read_table(tmp_path / "report" / "predictions" / "run-test.parquet")
        assert sorted(predictions["id"].to_pylist()) == list(range(40))
        tag = hosts.tag
        assert tag in network_names()
    assert tag not in network_names()


def test_hosts_are_taken_down_whatever_happens(tmp_path: Path) -> None:
    def fail() -> None:
        with Hosts(tmp_path, ()) as hosts:
            tags.append(hosts.tag)
            raise KeyError("a test that fails")

    tags: list[str] = []
    with pytest.raises(KeyError):
        fail()
    assert tags[0] not in network_names()
