"""Counts and scores against plain Python over single predictions, known intervals, and any partition."""

import functools
import itertools
import operator

import numpy as np
import pytest

from cifar_dist.evaluate.scores import MICRO, NUM_BINS, Counts, count, scores, wilson_interval

C, K, N = 7, 3, 500


def predictions(n: int = N, seed: int = 0) -> tuple[np.ndarray, ...]:
    """labels, predictions [n, K] (right about half of the time), confidence and loss."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, C, n)
    ranked = np.argsort(random.random((n, C)) - 0.6 * (np.arange(C) == labels[:, None]), 1)[:, :K]
    return labels, ranked, random.random(n).astype(np.float32), random.exponential(2, n).astype(np.float32)


@pytest.fixture(scope="module")
def counted() -> Counts:
    return count(*predictions(), C)


def equal(a: Counts, b: Counts) -> bool:
    return a.to_dict() == b.to_dict()


def test_counts_by_hand():
    labels = np.array([0, 0, 1, 2])
    ranked = np.array([[0, 1], [1, 0], [1, 2], [0, 1]])
    confidence = np.array([1.0, 0.5, 0.05, 0.0], np.float32)
    counts = count(labels, ranked, confidence, np.array([0.0, 0.25, 2.0, 1e-7], np.float32), 3)
    assert counts.confusion.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert counts.top_k.tolist() == [2, 3]
    assert {i: row for i, row in enumerate(counts.bins.tolist()) if row[0]} == {
        0: [2, 1, 50_000],  # 0.05 was right, 0.0 was not; 0.05 as float32 rounds to 50,000 millionths
        7: [1, 0, 500_000],
        NUM_BINS - 1: [1, 1, MICRO],  # a confidence of 1 belongs to the last bin
    }
    assert (counts.loss_micro, counts.num_images) == (2_250_000, 4)


def test_confusion_and_top_k(counted):
    labels, ranked, _, _ = predictions()
    expected = np.zeros((C, C), int)
    for label, row in zip(labels, ranked, strict=True):
        expected[label, row[0]] += 1
    assert np.array_equal(counted.confusion, expected)
    hits = [sum(label in row[: k + 1] for label, row in zip(labels, ranked, strict=True)) for k in range(K)]
    assert counted.top_k.tolist() == hits
    assert hits == sorted(hits)
    assert scores(counted, list("abcdefg"))["top_k_accuracy"] == [h / N for h in hits]


def test_calibration_error(counted):
    """ECE: over the bins, the share of images times the gap of accuracy and mean confidence."""
    labels, ranked, confidence, _ = predictions()
    right, confidence = ranked[:, 0] == labels, confidence.astype(np.float64)
    edges, expected = np.linspace(0, 1, NUM_BINS + 1), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence >= low) & (confidence < high)
        expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert scores(counted, list("abcdefg"))["ece"] == pytest.approx(expected, abs=1e-6)


def test_perfect_calibration_has_no_error():
    right = np.arange(10) < 5
    counts = count(np.zeros(10, int), np.where(right, 0, 1)[:, None], np.full(10, 0.5), np.zeros(10), 2)
    assert scores(counts, ["a", "b"])["ece"] == pytest.approx(0)


def test_loss_is_the_mean(counted):
    assert scores(counted, list("abcdefg"))["loss"] == pytest.approx(predictions()[3].mean(dtype=np.float64), abs=1e-6)


def test_accuracy_and_per_class_scores(counted):
    labels, ranked, _, _ = predictions()
    first, found = ranked[:, 0], scores(counted, list("abcdefg"))
    assert (found["num_images"], found["num_correct"]) == (N, (first == labels).sum())
    assert found["accuracy"] == (first == labels).mean()
    assert found["accuracy_95"] == wilson_interval(found["num_correct"], N)
    for i, values in enumerate(found["per_class"]):
        precision, recall = (labels[first == i] == i).mean(), (first[labels == i] == i).mean()
        assert (values["name"], values["num_images"]) == ("abcdefg"[i], (labels == i).sum())
        assert (values["precision"], values["recall"]) == pytest.approx((precision, recall))
        assert values["f1"] == pytest.approx(2 / (1 / precision + 1 / recall))
    assert found["macro_f1"] == pytest.approx(np.mean([values["f1"] for values in found["per_class"]]))


def test_class_never_predicted_scores_zero_and_class_without_images_has_no_scores():
    counts = count(np.array([0, 0, 3]), np.array([[0], [1], [0]]), np.full(3, 0.9), np.zeros(3), 4)
    found = scores(counts, ["a", "b", "c", "d"])
    values = {c["name"]: (c["precision"], c["recall"], c["f1"]) for c in found["per_class"]}
    assert values == {"a": (0.5, 0.5, 0.5), "b": (0, None, None), "c": (None, None, None), "d": (0, 0, 0)}
    assert [c["num_images"] for c in found["per_class"]] == [2, 0, 0, 1]
    assert found["macro_f1"] == 0.25  # over a and d


def test_a_split_of_one_image_has_finite_scores():
    found = scores(count(np.array([1]), np.array([[1, 0]]), np.array([0.75]), np.array([0.5]), 2), ["a", "b"])
    assert (found["accuracy"], found["macro_f1"], found["loss"], found["ece"]) == (1, 1, 0.5, 0.25)
    low, high = found["accuracy_95"]
    assert 0 < low < high == 1


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    [
        *((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval_has_its_known_values(correct, n, low, high):
    assert wilson_interval(correct, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize("correct", [0, 1, 499, 500])
def test_wilson_interval_holds_the_share_and_stays_within_0_and_1(correct):
    low, high = wilson_interval(correct, 500)
    assert 0 <= low <= correct / 500 + 1e-12
    assert correct / 500 - 1e-12 <= high <= 1


@pytest.mark.parametrize("num_parts", [1, 2, 3, 17, N])
def test_merging_any_partition_gives_the_same_integers(counted, num_parts):
    random = np.random.default_rng(num_parts)
    parts = np.array_split(random.permutation(N), num_parts)
    counts = [count(*(column[rows] for column in predictions()), C) for rows in parts]
    random.shuffle(counts)
    merged = functools.reduce(operator.add, counts)
    assert equal(merged, counted)
    assert {merged.confusion.dtype, merged.top_k.dtype, merged.bins.dtype} == {np.dtype(np.int64)}
    assert isinstance(merged.loss_micro, int)


def test_an_empty_part_adds_nothing(counted):
    empty = count(*predictions(0), C)
    assert empty.num_images == 0
    assert equal(empty + counted, counted)
