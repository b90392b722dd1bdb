"""Fixtures that several test files share: small prepared data sets."""

from pathlib import Path

import pytest

from cifar_dist.data import sources, store


@pytest.fixture(scope="session")
def shapes_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared data set of 200 train and 100 test drawn shapes, 32 px PNG. Do not change it: copy it first."""
    folder = tmp_path_factory.mktemp("shapes") / "data"
    store.prepare(sources.shapes(num_train=200, num_test=100), str(folder))
    return str(folder)


@pytest.fixture
def staging_folder(tmp_path: Path) -> Path:
    return tmp_path / "staged"
