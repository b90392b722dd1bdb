"""Writes the report: report.json and a self-contained report.html."""

import base64
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageOps

from cifar_dist.config import Config
from cifar_dist.data.manifest import Manifest
from cifar_dist.data.sources.picture import encode_png
from cifar_dist.data.staged import DataSet, StagedSplit
from cifar_dist.deck import DECK, choices, differences
from cifar_dist.errors import UserError
from cifar_dist.evaluate import plots
from cifar_dist.evaluate.driver import Evaluation
from cifar_dist.evaluate.scores import scores
from cifar_dist.run.folder import Run
from cifar_dist.run.log import LOG
from cifar_dist.run.network import weights_notice
from cifar_dist.run.splits import validation_source
from cifar_dist.sealed_json import to_json
from cifar_dist.storage import Folder
from cifar_dist.uris import join_uri

CIFAR10_COUNTS, CIFAR10_SIDE = {"train": 5000, "test": 1000}, 32  # images per class, side in pixels
# The mean pixel of each class of CIFAR-10's test split, 0 to 255: red, green, blue of the upper, then the lower half.
# Computed from images saved as JPEG, whose overall mean differs from the original's by 0.03.
CIFAR10_MEANS = (
    (142.5, 155.3, 168.0, 129.7, 136.3, 140.9),  # airplane
    (130.2, 128.4, 127.0, 109.8, 103.4, 101.6),  # automobile
    (125.9, 128.9, 112.5, 124.0, 123.5, 105.9),  # bird
    (123.4, 114.2, 104.0, 128.1, 118.0, 108.2),  # cat
    (114.7, 114.6, 94.8, 122.4, 119.7, 94.3),  # deer
    (126.5, 117.9, 105.4, 133.2, 124.1, 111.4),  # dog
    (120.3, 113.0, 87.8, 121.8, 112.5, 88.9),  # frog
    (128.9, 125.3, 117.2, 128.6, 121.3, 99.9),  # horse
    (142.0, 153.3, 163.8, 110.2, 114.2, 118.2),  # ship
    (145.4, 146.0, 147.5, 112.1, 103.9, 99.8),  # truck
)
CIFAR10_TOLERANCE = 0.6  # of 255, for the changes by lossy encodings
NUM_MISTAKES = 24
THUMBNAIL_SIDE = 192
MOST_CLASSES = 20  # that the page lists at first sight


def write_report(
    evaluations: list[Evaluation], data: DataSet, out_uri: str, data_card: dict[str, Any] | None = None
) -> str:
    """Writes OUT/report.json and OUT/report.html, with what read_card returned. Returns the URI of report.html."""
    manifest, test = data.manifest, data.stage("test")
    runs = [run_report(e, manifest) for e in evaluations]
    compared = is_cifar10(manifest, test)
    card = {
        "uri": data.uri,
        "source": manifest.source,
        "sha256": manifest.sha256,
        "class_names": manifest.class_names,
        "num_rows": {split: manifest.num_rows(split) for split in (*manifest.training_splits, "test")},
        "num_skipped": manifest.num_skipped,
        "is_cifar10": compared,
    }
    if data_card:
        card["card"] = data_card
    deck = {name: asdict(stated) for name, stated in DECK.items()} if compared else None
    report = {"format_version": 2, "data": card, "deck": deck, "runs": runs}
    folder = Folder(out_uri)
    folder.write("report.json", to_json(report))
    figures = [run_figures(e, test) for e in evaluations]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        report=report, figures=figures, class_table=class_table(data_card) if data_card else None, zip=zip
    )
    folder.write("report.html", page.encode())
    return join_uri(folder.uri, "report.html")


def class_table(card: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of the page's table of classes: `shown` at first sight, `all` in the order of the labels.

    A row has the class name, its number of images in each split, and `bar`: its train images by those of the largest
    class. Of many classes the largest and the smallest are shown.
    """
    per_split = [split["num_rows_per_class"] for split in card["splits"].values()]
    largest = max(per_split[0])
    rows = [
        {"name": name, "counts": counts, "bar": counts[0] / largest}
        for name, *counts in zip(card["class_names"], *per_split, strict=True)
    ]
    if len(rows) <= MOST_CLASSES:
        return {"shown": rows, "all": []}
    by_size = sorted(rows, key=lambda row: -row["bar"])
    return {"shown": by_size[: MOST_CLASSES // 2] + by_size[-MOST_CLASSES // 2 :], "all": rows}


def is_cifar10(manifest: Manifest, test: StagedSplit) -> bool:
    """Whether the data set is CIFAR-10, by the counts and sizes of both splits and the mean pixels of each test class.

    The names and the numbering of the classes do not matter.
    """
    for split, count in CIFAR10_COUNTS.items():
        counted = manifest.splits[split]["num_rows_per_class"] == [count] * len(CIFAR10_MEANS)
        if not counted or manifest.image_shape(split) != (CIFAR10_SIDE, CIFAR10_SIDE):
            return False
    halves = np.array([half_means(test.encoded(i)) for i in range(len(test))])
    found = [halves[test.labels == label].mean(0) for label in range(len(CIFAR10_MEANS))]
    # The expected rows are far apart, so no two rows can match the same class.
    distances = [[np.abs(row - mean).max() for mean in found] for row in np.array(CIFAR10_MEANS)]
    return bool(max(min(row) for row in distances) <= CIFAR10_TOLERANCE)


def half_means(encoded: np.ndarray) -> np.ndarray:
    """Returns float64 [6]: the mean red, green and blue of the image's upper half, then of its lower half."""
    pixels = np.asarray(upright_image(encoded))
    middle = len(pixels) // 2
    return np.concatenate([part.mean((0, 1)) for part in (pixels[:middle], pixels[middle:])])


# The fields of metrics.jsonl that the report reads, by kind of line. Losses and accuracies are null if not finite.
NUMBER: tuple[type, ...] = (int, float)
RATES = dict.fromkeys(("seconds", "images_per_second", "data_wait_share"), NUMBER)
TRAINED = dict.fromkeys(("train_loss", "train_accuracy"), (*NUMBER, type(None)))
VALIDATED = dict.fromkeys(("validation_loss", "validation_accuracy"), (*NUMBER, type(None)))
TEXT: tuple[type, ...] = (str,)
READ = {"step": TRAINED, "epoch": {**TRAINED, **VALIDATED, **RATES}, "warning": {"message": TEXT}}


def lines_of(run: Run) -> list[dict[str, Any]]:
    """Returns the lines of the run's log. Raises UserError if a line lacks a field that the report reads."""
    lines = run.lines()
    for line in lines:
        for name, types in READ.get(line["kind"], {}).items():
            if name not in line or type(line[name]) not in types:
                raise UserError(
                    f"{run.at(LOG)} is damaged (a line of the kind {line['kind']} has no {name}); mend or remove it"
                )
    return lines


def run_report(evaluation: Evaluation, manifest: Manifest) -> dict[str, Any]:
    """Returns a run's part of report.json: scores and counts by split, epochs, throughput, warnings, run card."""
    lines, meta = lines_of(evaluation.run), evaluation.checkpoint.meta
    epochs = [line for line in lines if line["kind"] == "epoch"]
    config = Config.from_dict(meta["config"])
    notice = weights_notice(config, meta["weights"])
    seconds = sum(e["seconds"] for e in epochs)
    rate, wait = (
        sum(e[name] * e["seconds"] for e in epochs) / seconds if seconds else 0.0
        for name in ("images_per_second", "data_wait_share")
    )
    return {
        "name": evaluation.run.name,
        "model": meta["model"],
        "checkpoint": evaluation.checkpoint.name,
        "evaluation_precision": evaluation.precision,
        "weights": meta["weights"],
        "validation_images": validation_source(config, manifest),
        "splits": {
            split: {**scores(counts, manifest.class_names), "counts": counts.to_dict()}
            for split, counts in evaluation.counts.items()
        },
        "epochs": epochs,
        "warnings": [notice] * bool(notice) + [line["message"] for line in lines if line["kind"] == "warning"],
        "throughput": {
            "images_per_second": rate,
            "data_wait_share": wait,
            # Not the logged seconds: a resumed epoch logs only its last part.
            "seconds_per_epoch": meta["num_train"] / rate if rate else 0.0,
        },
        "differs_from_deck": differences(config, meta["weights"]),
        "run_card": {
            **{k: v for k, v in meta.items() if k not in ("class_names", "totals", "metrics")},
            "chosen_where_the_deck_is_silent": choices(config, own_validation=manifest.has_validation),
        },
    }


def run_figures(evaluation: Evaluation, test: StagedSplit) -> dict[str, Any]:
    """Returns a run's plots and pictures for the page, from the test split if evaluated, else from the last split."""
    split = "test" if "test" in evaluation.counts else list(evaluation.counts)[-1]
    counts, names = evaluation.counts[split], evaluation.checkpoint.meta["class_names"]
    return {
        "split": split,
        "curves": plots.curves(lines_of(evaluation.run)),
        "confusion": plots.confusion(counts.confusion, names),
        "calibration": plots.calibration(counts.bins),
        "mistakes": worst_mistakes(evaluation, test, names) if split == "test" else [],
    }


def worst_mistakes(evaluation: Evaluation, test: StagedSplit, class_names: list[str]) -> list[dict[str, Any]]:
    """Returns the NUM_MISTAKES test images with the most confident wrong predictions, with pictures as data URIs."""
    table = evaluation.predictions["test"].to_pydict()
    wrong = np.flatnonzero(np.array(table["prediction_1"]) != np.array(table["label"]))
    order = wrong[np.argsort(-np.array(table["probability_1"])[wrong], kind="stable")][:NUM_MISTAKES]
    return [
        {
            "id": table["id"][i],
            "path": test.path(table["id"][i]),
            "label": class_names[table["label"][i]],
            "prediction": class_names[table["prediction_1"][i]],
            "confidence": table["probability_1"][i],
            "picture": thumbnail(test.encoded(table["id"][i])),
        }
        for i in order
    ]


def upright_image(encoded: np.ndarray) -> Image.Image:
    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def thumbnail(encoded: np.ndarray) -> str:
    """Returns the image as a data URI: a PNG of at most THUMBNAIL_SIDE pixels a side."""
    upright = upright_image(encoded)
    upright.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return f"data:image/png;base64,{base64.b64encode(encode_png(upright)).decode()}"
