"""The data sets that the growth benchmark makes are sound ones."""

import os
from pathlib import Path

import numpy as np
import pytest

from cifar_dist.data import manifest
from cifar_dist.data.private import Staging
from cifar_dist.data.staged import DataSet

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_repeated_data_set_holds_every_row_so_often(
    shapes_uri: str, tmp_path: Path, staging_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from growth import repeat

    made = repeat(shapes_uri, 3, tmp_path / "data")
    assert manifest.read_manifest(str(tmp_path / "data")) == made  # which checks its checksum
    one, three = (
        DataSet.open(uri, Staging(folder=staging_folder)).stage("train") for uri in (shapes_uri, str(tmp_path / "data"))
    )
    assert (three.labels == np.tile(one.labels, 3)).all()
    assert all(three.encoded(i).tobytes() == one.encoded(i % 200).tobytes() for i in range(600))
    assert made.splits["train"]["num_rows_per_class"] == np.bincount(three.labels).tolist()
    assert len(DataSet.open(str(tmp_path / "data"), Staging(folder=staging_folder)).stage("test")) == 100
    assert os.path.samefile(tmp_path / "data" / "train-00002.parquet", Path(shapes_uri, "train-00000.parquet"))
