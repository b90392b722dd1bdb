"""`ray job submit` as the README shows it, to a cluster that asks for a token."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from head_node import HeadNode
from job_process import ROOT, SMALL, read_metrics, wait_until

from cifar_dist.run.checkpoints import Checkpoints

TRAIN = ("python", "jobs/train.py", *SMALL, "--checkpoint-every-steps", "1")


@pytest.fixture(scope="module")
def head() -> Iterator[HeadNode]:
    node = HeadNode()
    yield node
    node.stop()


def train(data: str, storage: Path, *more: str, submit: tuple[str, ...] = ()) -> list[str]:
    where = ["--data", data, "--storage", str(storage), "--name", "run", "--workers", "2"]
    return [*submit, "--working-dir", ".", "--", *TRAIN, *where, *more]


def test_without_the_token_jobs_are_refused(head: HeadNode) -> None:
    code, output = head.job("submit", "--", "echo", "taken", token=False)
    assert code != 0
    assert "taken" not in output
    assert "token" in output.lower()
    assert head.answer_without_token("/api/jobs/") == 401
    assert head.answer_without_token("/api/gcs_healthz") == 200  # Kubernetes's probes have none


def test_a_run_is_uploaded_small_and_says_what_it_does_in_plain_lines(
    head: HeadNode, tiny_uri: str, tmp_path: Path
) -> None:
    before = set(head.uploads())
    code, output = head.job("submit", *train(tiny_uri, tmp_path))
    assert code == 0, output
    (upload,) = set(head.uploads()) - before
    files = [file for file in upload.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    top = {file.relative_to(upload).parts[0] for file in files}
    assert {"jobs", "cifar_dist", "pyproject.toml", "uv.lock"} <= top
    assert not top & {".git", ".venv", ".uv", "tests", "benchmarks", "docs", "k8s", "demo"}
    assert sum(file.stat().st_size for file in files) < 2 << 20
    assert "\r" not in output
    assert re.search(r"^epoch 4/4 done: loss [\d.]+ accuracy .* images/s", output, re.MULTILINE)
    assert re.search(r"^run run finished: best", output, re.MULTILINE)


def test_a_failed_job_fails_the_submission(head: HeadNode, tmp_path: Path) -> None:
    submit = ("--submission-id", "fails")
    code, output = head.job("submit", *train(str(tmp_path / "nothing"), tmp_path, submit=submit))
    assert code == 1
    assert "nothing" in output
    assert "Traceback" not in output
    assert (head.details("fails")["status"], head.details("fails")["driver_exit_code"]) == ("FAILED", 1)
    code, output = head.job("submit", "--submission-id", "mistyped", "--", *TRAIN, "--epoch", "1")
    assert code == 1
    assert "--epochs" in output
    assert head.details("mistyped")["driver_exit_code"] == 2


def test_a_stopped_job_leaves_no_worker_and_a_run_that_goes_on(head: HeadNode, tiny_uri: str, tmp_path: Path) -> None:
    submit = ("--submission-id", "stopped", "--no-wait")
    code, output = head.job("submit", *train(tiny_uri, tmp_path, "--epochs", "500", submit=submit))
    assert code == 0, output
    checkpoints = Checkpoints(str(tmp_path / "run"))
    wait_until(lambda: checkpoints.latest() is not None)
    assert len(head.processes("RayTrainWorker")) == 2
    code, output = head.job("stop", "stopped")
    assert code == 0, output
    assert head.details("stopped")["status"] == "STOPPED"
    wait_until(lambda: not head.processes("RayTrainWorker"), timeout=30)
    stored = checkpoints.latest()
    assert stored is not None
    time.sleep(2)
    assert checkpoints.latest() == stored  # nobody trains on
    epochs = stored.cursor.epoch + 1
    code, output = head.job("submit", *train(tiny_uri, tmp_path, "--epochs", str(epochs)))
    assert code == 0, output
    assert f"continuing from {stored.name}" in output
    steps = [line["global_step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "step"]
    assert steps == list(range(1, 4 * epochs + 1))


@pytest.mark.slow
def test_nodes_without_the_image_get_the_environment_from_uv(head: HeadNode, tiny_uri: str, tmp_path: Path) -> None:
    """The locked environment is made in the uploaded folder, for the driver and for the workers."""
    assert shutil.which("uv", path=head.environment["PATH"]), "make installs uv into .uv where it is not on PATH"
    environment = '{"py_executable": "uv run --locked --no-dev --extra cuda13"}'
    words = train(tiny_uri, tmp_path, submit=("--runtime-env-json", environment))
    place = words.index("--")
    before = set(head.uploads())
    run = ("uv", "run", "--locked", "--no-dev", "--extra", "cuda13")
    code, output = head.job("submit", *words[: place + 1], *run, *words[place + 1 :])
    assert code == 0, output
    assert "run run finished: best" in output
    # The upload is the same as before unless a file has changed, so its folder may be too.
    upload = (set(head.uploads()) - before or before).pop()
    python = next((upload / ".venv" / "bin").glob("python"))
    show = [str(python), "-c", "import cifar_dist; print(cifar_dist.__file__)"]
    shown = subprocess.run(show, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(upload) in shown.stdout
    assert not (ROOT / "jobs" / ".venv").exists()
