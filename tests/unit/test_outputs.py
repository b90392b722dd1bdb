"""An evaluation replaces files of its own, and leaves those of others alone."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cifar_dist.errors import UserError
from cifar_dist.evaluate.outputs import predictions_name, refuse_foreign

PREDICTIONS = predictions_name("run", "test+flip")


def parquet(*columns: str) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: [1] for name in columns}), buffer)
    return buffer.getvalue()


OURS = {
    "report.json": b'{"format_version": 2, "data": {}, "deck": null, "runs": []}',
    "report.html": b"<html><head><title>cifar_dist report</title></head></html>",
    PREDICTIONS: parquet("id", "label", "prediction_1", "probability_1", "loss"),
}


def test_files_of_an_evaluation_may_be_replaced(tmp_path):
    (tmp_path / "predictions").mkdir()
    refuse_foreign(str(tmp_path), [PREDICTIONS])
    for name, content in OURS.items():
        (tmp_path / name).write_bytes(content)
        refuse_foreign(str(tmp_path), [PREDICTIONS])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            ("report.json", b'{"title": "mine"}'),
            ("report.json", b"[]"),
            ("report.json", b"\xff"),
            ("report.json", b""),
        ),
        *(("report.html", b"<title>Quarterly report</title>"), ("report.html", b"")),
        *((PREDICTIONS, parquet("id", "label")), (PREDICTIONS, b"PAR1"), (PREDICTIONS, b"")),
    ],
)
def test_a_file_of_somebody_else_is_named(tmp_path, name, content):
    (tmp_path / "predictions").mkdir()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="is in the way: no evaluation wrote it") as error:
        refuse_foreign(str(tmp_path), [PREDICTIONS])
    assert str(tmp_path / name) in str(error.value)
    assert "--overwrite" in str(error.value)
    assert (tmp_path / name).read_bytes() == content


def test_predictions_of_other_runs_are_nobody_s_business(tmp_path):
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "other-test.parquet").write_bytes(b"mine")
    refuse_foreign(str(tmp_path), [PREDICTIONS])
