"""Fixtures that several test files share: small prepared data sets, and a server that speaks S3."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar_dist.data import sources, store


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which reads the mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process for each file's tests, and one for all on clusters: what a session or a file shares is made once."""
    for item in items:
        path = Path(item.fspath)
        item.add_marker(pytest.mark.xdist_group("clusters" if path.parent.name == "cluster" else path.stem))


@pytest.fixture(scope="session")
def shapes_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared data set of 200 train and 100 test drawn shapes, 32 px PNG. Do not change it: copy it first."""
    folder = tmp_path_factory.mktemp("shapes") / "data"
    store.prepare(sources.shapes(num_train=200, num_test=100), str(folder))
    return str(folder)


@pytest.fixture
def staging_folder(tmp_path: Path) -> Path:
    return tmp_path / "staged"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The query of a URI such as s3://bucket/prefix, on a real S3-protocol server on loopback; the bucket is there."""
    from moto.server import ThreadedMotoServer  # slow to import, and few tests need it
    from pyarrow import fs

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in credentials.items():
            patch.setenv(name, value)
        address = {"endpoint_override": f"{host}:{port}", "scheme": "http", "region": "us-east-1"}
        fs.S3FileSystem(**address, allow_bucket_creation=True).create_dir("bucket")
        yield "?" + "&".join(f"{name}={value}" for name, value in address.items())
    server.stop()


@pytest.fixture
def s3_uri(s3: str) -> str:
    """An empty place in a bucket."""
    return f"s3://bucket/{uuid.uuid4().hex}/first{s3}"
