"""Names the files that an evaluation writes, and refuses to replace files that no evaluation wrote."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from cifar_dist.errors import UserError
from cifar_dist.sealed_json import from_json
from cifar_dist.storage import Folder
from cifar_dist.uris import join_uri

TITLE = "<title>cifar_dist report</title>"
REPORT_KEYS = {"format_version", "data", "deck", "runs"}
PREDICTION_COLUMNS = {"id", "label", "prediction_1", "probability_1"}


def predictions_name(run: str, split: str) -> str:
    return f"predictions/{run}-{split}.parquet"


def refuse_foreign(out_uri: str, predictions: list[str]) -> None:
    """Raises UserError if the report or one of the `predictions` would replace a file that no evaluation wrote."""
    folder = Folder(out_uri)
    for name in ["report.json", "report.html", *predictions]:
        try:
            content = folder.read(name)
        except FileNotFoundError:
            continue
        if not is_ours(name, content):
            raise UserError(
                f"{join_uri(folder.uri, name)} is in the way: no evaluation wrote it, so it is left alone; use another "
                "--out, or --overwrite to replace such files"
            )


def is_ours(name: str, content: bytes) -> bool:
    if name.endswith(".html"):
        return TITLE.encode() in content
    try:
        if name.endswith(".json"):
            return from_json(content).keys() == REPORT_KEYS
        return set(pq.read_schema(io.BytesIO(content)).names) >= PREDICTION_COLUMNS
    except (ValueError, AttributeError, pa.ArrowException):
        return False
