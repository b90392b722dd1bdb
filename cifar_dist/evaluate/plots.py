"""Draws the report's plots as SVG text."""

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from cifar_dist.evaluate.scores import MICRO, NUM_BINS

TRAIN, VALIDATION = "#1f6feb", "#d1630c"


def svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # the browser draws the text, in any script
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def curves(lines: list[dict[str, Any]]) -> str:
    """Plots loss and accuracy over optimizer steps, from lines of metrics.jsonl. Validation is per epoch."""
    figure = Figure(figsize=(9, 3))
    steps = [line for line in lines if line["kind"] == "step"]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    for i, (name, title) in enumerate((("loss", "Loss"), ("accuracy", "Accuracy"))):
        axes = figure.add_subplot(1, 2, i + 1, title=title, xlabel="optimizer step")
        axes.plot([s["global_step"] for s in steps], [s[f"train_{name}"] for s in steps], color=TRAIN, alpha=0.35)
        at = [e["global_step"] for e in epochs]
        axes.plot(
            at, [e[f"train_{name}"] for e in epochs], "o-", color=TRAIN, label="train (running mean of the epoch)"
        )
        axes.plot(at, [e[f"validation_{name}"] for e in epochs], "s-", color=VALIDATION, label="validation")
        axes.grid(alpha=0.3)
        if name == "accuracy":
            axes.set_ylim(0, 1)
            axes.legend(fontsize=8)
    figure.tight_layout()
    return svg(figure)


def confusion(matrix: np.ndarray, class_names: list[str]) -> str:
    """Plots the confusion matrix [C, C], rows are labels. Shade: the share of the row. Numbers: up to 20 classes."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    n = len(class_names)
    figure = Figure(figsize=(5.5, 5))
    axes = figure.add_subplot(xlabel="predicted", ylabel="label")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if n <= 20:
        axes.set_xticks(range(n), class_names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(n), class_names, parse_math=False)
        for row, column in np.ndindex(n, n):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7, color=color)
    return svg(figure)


def calibration(bins: np.ndarray) -> str:
    """Plots a reliability diagram from counts [NUM_BINS, 3]: accuracy over mean confidence, point size by images."""
    filled = bins[bins[:, 0] > 0].astype(float)
    confidence, accuracy = filled[:, 2] / MICRO / filled[:, 0], filled[:, 1] / filled[:, 0]
    figure = Figure(figsize=(5, 5))
    axes = figure.add_subplot(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.plot([0, 1], [0, 1], "--", color="gray", label="perfectly calibrated")
    axes.bar(confidence, accuracy, width=0.7 / NUM_BINS, color=TRAIN, alpha=0.35)
    axes.scatter(confidence, accuracy, 20 + 200 * filled[:, 0] / bins[:, 0].sum(), color=TRAIN, label="this model")
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(alpha=0.3)
    return svg(figure)
