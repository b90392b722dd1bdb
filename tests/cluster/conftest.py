"""Fixtures of the cluster tests: a tiny data set and a whole run of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from job_process import Job, run_job, train_args
from ray_cluster import Nodes

from cifar_dist.data import sources, store


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents:
            item.add_marker("cluster")


@pytest.fixture(scope="session", autouse=True)
def nodes() -> Iterator[Nodes]:
    """Three raylets that all tests share; each test leaves as many as it found."""
    cluster = Nodes(3)
    Job.address = cluster.address
    yield cluster
    cluster.stop()


@pytest.fixture(autouse=True)
def no_job_is_left_running() -> Iterator[None]:
    yield
    while Job.started:
        Job.started.pop().end()


@pytest.fixture(scope="session")
def tiny_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 train and 40 test drawn shapes."""
    folder = tmp_path_factory.mktemp("tiny") / "data"
    store.prepare(sources.shapes(num_train=60, num_test=40), str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def whole_run(tiny_uri: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run folder, output) of a small run of two workers that nothing interrupted."""
    storage = tmp_path_factory.mktemp("runs")
    code, output = run_job(*train_args(tiny_uri, storage, "whole"), local=True)
    assert code == 0, output
    return storage / "whole", output
