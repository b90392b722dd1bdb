"""The Dockerfile by itself: a linter finds nothing, and only what is named goes into the build."""

import fnmatch
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def hadolint(text: str) -> str:
    command = [str(Path(sys.executable).with_name("hadolint")), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False).stdout


def test_hadolint_finds_nothing_and_would_find_a_fault() -> None:
    assert hadolint(DOCKERFILE) == ""
    assert "DL3002" in hadolint(DOCKERFILE + "USER root\n")


def test_the_context_is_what_the_dockerfile_copies() -> None:
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"  # all is left out but what comes next
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert allowed == copied
    assert fnmatch.fnmatch("cifar_dist/train/__pycache__", lines[-1])


def test_nvidia_s_paths_and_what_nccl_needs_for_rdma_are_in_the_image() -> None:
    last = DOCKERFILE.rpartition("FROM ")[2]
    assert "ENV PATH=/opt/venv/bin:/usr/local/nvidia/bin:$PATH" in last
    assert 'export PATH=/opt/venv/bin:/usr/local/nvidia/bin:\\$PATH"' in last  # KubeRay starts login shells
    assert "LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64" in last
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in last
    assert {"libibverbs1", "ibverbs-providers", "gcc"} <= set(last.split())


def test_a_build_argument_chooses_the_cuda_generation() -> None:
    assert "ARG CUDA=cuda13\n" in DOCKERFILE
    assert 'uv sync --locked --extra "${CUDA}" --no-dev' in DOCKERFILE


def test_whatever_base_is_given_is_used_in_every_stage() -> None:
    froms = [line.split()[1] for line in DOCKERFILE.splitlines() if line.startswith("FROM ")]
    assert froms == ["${BASE_IMAGE}", "environment", "${BASE_IMAGE}"]
    assert "ARG BASE_IMAGE=python:3.11-slim-bookworm\n" in DOCKERFILE
