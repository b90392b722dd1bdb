"""Integer counts that merge by addition, and scores computed from the counts."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_BINS = 15  # of confidence, for the calibration error (15 as in Guo et al. 2017)
MICRO = 1_000_000


@dataclass(frozen=True)
class Counts:
    """Counts of a set of predictions, all int64, so that sums are exact in any order.

    confusion [C, C]: rows are labels, columns predictions. top_k [K]: labels among the first 1..K predictions.
    bins [NUM_BINS, 3]: by confidence bin, the images, the correct images and the summed confidence in millionths.
    loss_micro: summed cross-entropy in millionths of a nat.
    """

    confusion: np.ndarray
    top_k: np.ndarray
    bins: np.ndarray
    loss_micro: int

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.confusion + other.confusion,
            self.top_k + other.top_k,
            self.bins + other.bins,
            self.loss_micro + other.loss_micro,
        )

    @property
    def num_images(self) -> int:
        return int(self.confusion.sum())

    def to_dict(self) -> dict[str, Any]:
        return {
            "confusion": self.confusion.tolist(),
            "top_k": self.top_k.tolist(),
            "bins": self.bins.tolist(),
            "loss_micro": self.loss_micro,
        }


def count(
    labels: np.ndarray, predictions: np.ndarray, confidence: np.ndarray, loss: np.ndarray, num_classes: int
) -> Counts:
    """Returns the counts of n predictions. labels: int64 [n]. predictions: int64 [n, K], best first.

    confidence: float [n] in 0..1, of the first predictions. loss: float [n] in nats."""
    confusion = np.bincount(labels * num_classes + predictions[:, 0], minlength=num_classes**2)
    hits = (predictions == labels[:, None]).cumsum(1) > 0
    at = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    columns = (np.ones(len(labels), np.int64), hits[:, 0], np.rint(confidence.astype(np.float64) * MICRO))
    bins = np.zeros((NUM_BINS, 3), np.int64)
    for i, column in enumerate(columns):
        np.add.at(bins[:, i], at, column.astype(np.int64))
    loss_micro = int(np.rint(loss.astype(np.float64) * MICRO).astype(np.int64).sum())
    return Counts(confusion.reshape(num_classes, num_classes), hits.sum(0), bins, loss_micro)


def wilson_interval(num_correct: int, n: int) -> tuple[float, float]:
    """Returns the 95% confidence interval of a proportion (Wilson 1927, z = 1.96)."""
    z, share = 1.959964, num_correct / n
    centre = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - reach) / (1 + z * z / n)), min(1.0, (centre + reach) / (1 + z * z / n))


def scores(counts: Counts, class_names: list[str]) -> dict[str, Any]:
    """Returns accuracy with interval, top-k, loss, calibration error (ECE), and precision, recall and F1 by class.

    Recall and F1 of a class without images are None, as is its precision if it was never predicted. The macro F1 is the
    mean over the classes that have images.
    """
    n, confusion = counts.num_images, counts.confusion
    correct = confusion.diagonal()
    per_class: list[dict[str, Any]] = []
    for i, name in enumerate(class_names):
        predicted, actual = int(confusion[:, i].sum()), int(confusion[i].sum())
        precision = int(correct[i]) / predicted if predicted else 0.0
        recall = int(correct[i]) / actual if actual else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        values: dict[str, Any] = {"precision": precision, "recall": recall, "f1": f1, "num_images": actual}
        if not actual:
            values |= {"precision": 0.0 if predicted else None, "recall": None, "f1": None}
        per_class.append({"name": name, **values})
    f1_scores = [c["f1"] for c in per_class if c["num_images"]]
    gaps = np.abs(counts.bins[:, 1] - counts.bins[:, 2] / MICRO)
    num_correct = int(correct.sum())
    return {
        "num_images": n,
        "num_correct": num_correct,
        "accuracy": num_correct / n,
        "accuracy_95": wilson_interval(num_correct, n),
        "top_k_accuracy": [int(hits) / n for hits in counts.top_k],
        "loss": counts.loss_micro / MICRO / n,
        "macro_f1": sum(f1_scores) / len(f1_scores),
        "ece": float(gaps.sum() / n),
        "per_class": per_class,
    }
