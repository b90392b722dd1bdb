"""jobs/prepare.py on a real Ray cluster: the same bytes as on one machine, with tasks that are killed."""

import contextlib
import io
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from job_process import Job, run_job, wait_until
from PIL import Image

from cifar_dist.data.parts import Part, parts_of
from cifar_dist.data.sources import Rules, find_source
from cifar_dist.errors import UserError
from cifar_dist.launch import preparation

NUM_ROWS = 16_000  # three files


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file of small pictures of two classes."""
    folder = tmp_path_factory.mktemp("table")
    pictures = []
    for number in range(50):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    images = [{"bytes": pictures[i % 50], "path": f"{i}.png"} for i in range(NUM_ROWS)]
    labels = [i % 2 for i in range(NUM_ROWS)]
    pq.write_table(pa.table({"image": images, "label": labels}), folder / "train.parquet", row_group_size=500)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tasks() -> list[int]:
    """Pids of the cluster's processes that make a part."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::make_on_node"):
                found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def local(table: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process on this machine makes of the table."""
    out = tmp_path_factory.mktemp("local") / "data"
    args = "--source", "parquet", "--path", str(table), "--out", str(out), "--tasks", "1", "--address", "local"
    code, output = run_job("prepare.py", *args)
    assert code == 0, output
    return files_of(out)


def test_all_nodes_make_the_same_bytes_and_a_killed_task_is_made_again(
    table: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    job = Job("prepare.py", "--source", "parquet", "--path", str(table), "--out", str(tmp_path / "data"))
    wait_until(lambda: len(tasks()) >= 2)
    for pid in tasks():
        os.kill(pid, signal.SIGKILL)
    code, output = job.wait()
    assert code == 0, output
    assert files_of(tmp_path / "data") == local
    assert sum(name.endswith(".parquet") for name in local) == 3


def test_a_killed_job_goes_on_from_the_parts_that_the_tasks_have_made(
    table: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "data"
    args = "prepare.py", "--source", "parquet", "--path", str(table), "--out", str(out)
    job = Job(*args)
    wait_until(lambda: list(out.glob(".cifar_dist-preparing/*.json")))
    os.kill(job.process.pid, signal.SIGKILL)
    job.wait()
    made = {path.name: path.stat().st_mtime_ns for path in out.glob(".cifar_dist-preparing/*.parquet")}
    assert made
    code, output = run_job(*args)
    assert code == 0, output
    assert files_of(out) == local


def test_a_task_names_its_node_where_a_file_is_missing(table: Path, tmp_path: Path) -> None:
    part, *_ = parts_of(find_source("parquet", str(table)), Rules(), near_duplicates=False, skip_bad=False)
    assert isinstance(part, Part)
    with pytest.raises(UserError, match=r"node .* does not see .*nowhere"):
        preparation.make_on_node(part, str(tmp_path / "nowhere"))
    (tmp_path / preparation.PREPARING).mkdir()
    moved = table.with_name("moved")
    table.rename(moved)
    try:
        with pytest.raises(UserError, match=r"train\.parquet.*\(on node .*--address local"):
            preparation.make_on_node(part, str(tmp_path))
    finally:
        moved.rename(table)
