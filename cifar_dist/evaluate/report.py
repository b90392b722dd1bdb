"""The report: report.json and one self-contained report.html."""

import base64
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageOps

from cifar_dist.config import Config
from cifar_dist.data.sources import encode_png
from cifar_dist.data.store import Manifest, StagedSplit, read_manifest, stage
from cifar_dist.deck import DECK, choices, differences
from cifar_dist.evaluate import plots
from cifar_dist.evaluate.driver import Evaluation
from cifar_dist.evaluate.scores import scores
from cifar_dist.storage import Folder, absolute_uri, join_uri, to_json
from cifar_dist.train.metrics import read_lines
from cifar_dist.train.setup import weights_notice

# CIFAR-10: images per class, pixels a side, and the mean pixel (0 to 255) of each class of test, least first. Computed
# from the 10,000 test images saved as JPEG; the mean over all, 121.51, is that of the original pixels within 0.03.
CIFAR10_COUNTS, CIFAR10_SIDE = {"train": 5000, "test": 1000}, 32
CIFAR10_MEANS = (107.38, 110.08, 115.98, 116.73, 119.75, 120.11, 120.18, 125.80, 133.62, 145.46)
CIFAR10_TOLERANCE = 0.5  # grey levels: what lossy encodings change
NUM_MISTAKES = 24
THUMBNAIL_SIDE = 192


def write_report(evaluations: list[Evaluation], data_uri: str, out_uri: str, staging_folder: str | None = None) -> str:
    """Writes OUT/report.json and OUT/report.html; returns the page's URI."""
    data_uri = absolute_uri(data_uri)
    manifest = read_manifest(data_uri)
    test = stage(data_uri, "test", staging_folder, manifest)
    runs = [run_report(e, manifest.class_names) for e in evaluations]
    compared = is_cifar10(manifest, test)
    data = {
        "uri": data_uri,
        "source": manifest.source,
        "sha256": manifest.sha256,
        "class_names": manifest.class_names,
        "num_rows": {split: manifest.num_rows(split) for split in ("train", "test")},
        "num_skipped": manifest.num_skipped,
        "is_cifar10": compared,
    }
    deck = {name: asdict(stated) for name, stated in DECK.items()} if compared else None
    report = {"format_version": 2, "data": data, "deck": deck, "runs": runs}
    folder = Folder(out_uri)
    folder.write("report.json", to_json(report))
    figures = [run_figures(e, test) for e in evaluations]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(report=report, figures=figures, zip=zip)
    folder.write("report.html", page.encode())
    return join_uri(folder.uri, "report.html")


def is_cifar10(manifest: Manifest, test: StagedSplit) -> bool:
    """Whether the data set is CIFAR-10, by its counts, its images' size and the mean pixel of each class of test.

    The names of the classes do not matter, nor the order in which they are numbered.
    """
    for split, count in CIFAR10_COUNTS.items():
        counted = manifest.splits[split]["num_rows_per_class"] == [count] * len(CIFAR10_MEANS)
        if not counted or manifest.image_shape(split) != (CIFAR10_SIDE, CIFAR10_SIDE):
            return False
    means = np.array([pixels_of(test.encoded(i)).mean() for i in range(len(test))])
    by_class = sorted(means[test.labels == label].mean() for label in range(len(CIFAR10_MEANS)))
    return bool(np.abs(np.array(by_class) - CIFAR10_MEANS).max() <= CIFAR10_TOLERANCE)


def run_report(evaluation: Evaluation, class_names: list[str]) -> dict[str, Any]:
    """One run's part of report.json: scores and raw counts per split, epochs, throughput, warnings, run card."""
    lines, meta = read_lines(Folder(evaluation.run_uri)), evaluation.checkpoint.meta
    epochs = [line for line in lines if line["kind"] == "epoch"]
    config = Config.from_dict(meta["config"])
    notice = weights_notice(config, meta["weights"])
    seconds = sum(e["seconds"] for e in epochs)
    rate, wait = (
        sum(e[name] * e["seconds"] for e in epochs) / seconds if seconds else 0.0
        for name in ("images_per_second", "data_wait_share")
    )
    return {
        "name": evaluation.name,
        "model": meta["model"],
        "checkpoint": evaluation.checkpoint.name,
        "weights": meta["weights"],
        "splits": {
            split: {**scores(counts, class_names), "counts": counts.to_dict()}
            for split, counts in evaluation.counts.items()
        },
        "epochs": epochs,
        "warnings": [notice] * bool(notice) + [line["message"] for line in lines if line["kind"] == "warning"],
        "throughput": {
            "images_per_second": rate,
            "data_wait_share": wait,
            # Not the logged seconds: an epoch that was continued logs its last part only.
            "seconds_per_epoch": meta["num_train"] / rate if rate else 0.0,
        },
        "differs_from_deck": differences(config),
        "run_card": {
            **{k: v for k, v in meta.items() if k not in ("class_names", "totals", "metrics")},
            "chosen_where_the_deck_is_silent": choices(config),
        },
    }


def run_figures(evaluation: Evaluation, test: StagedSplit) -> dict[str, Any]:
    """The page's plots and pictures of one run, for its test split (or the last one that was evaluated)."""
    split = "test" if "test" in evaluation.counts else list(evaluation.counts)[-1]
    counts, names = evaluation.counts[split], evaluation.checkpoint.meta["class_names"]
    return {
        "split": split,
        "curves": plots.curves(read_lines(Folder(evaluation.run_uri))),
        "confusion": plots.confusion(counts.confusion, names),
        "calibration": plots.calibration(counts.bins),
        "mistakes": worst_mistakes(evaluation, test, names) if split == "test" else [],
    }


def worst_mistakes(evaluation: Evaluation, test: StagedSplit, class_names: list[str]) -> list[dict[str, Any]]:
    """The test images that the model got wrong with the most confidence, with their pictures as data URIs."""
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


def pixels_of(encoded: np.ndarray) -> np.ndarray:
    """Uint8 [H, W, 3]."""
    return np.asarray(upright_image(encoded))


def thumbnail(encoded: np.ndarray) -> str:
    """The image as a data URI: a PNG of at most THUMBNAIL_SIDE pixels a side."""
    upright = upright_image(encoded)
    upright.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return f"data:image/png;base64,{base64.b64encode(encode_png(upright)).decode()}"
