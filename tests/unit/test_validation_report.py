"""Evaluation and report where the data set has a validation split of its own, and splits lack classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_report import SIZE, Page, Run, evaluation, trained
from validation_data import draw, keep_rows, own_validation

from cifar_dist import models
from cifar_dist.data import sources
from cifar_dist.data.manifest import read_manifest
from cifar_dist.errors import UserError
from cifar_dist.evaluate import report
from cifar_dist.run.checkpoints import Checkpoints

NAMES = sources.shapes(20, 20).class_names
LABELS = [i % 7 for i in range(130)]  # two batches; three classes have no image


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("own")
    uri = own_validation(folder / "data", LABELS, num_test=30)
    keep_rows(folder / "data", "test", np.flatnonzero(np.arange(30) % 10 != 4))
    return trained(folder, uri, NAMES)


@pytest.fixture(scope="module")
def merged(run) -> dict:
    return run.merge([run.shard(0, 1)])


def test_each_image_of_the_split_comes_once_by_its_row(merged):
    ids = {split: table["id"].to_pylist() for split, (table, _) in merged.items()}
    assert ids == {"train": [*range(40)], "validation": [*range(130)], "test": [*range(27)]}
    assert merged["validation"][0]["label"].to_pylist() == LABELS
    assert merged["validation"][1].confusion.sum(1).tolist() == [19] * 4 + [18] * 3 + [0] * 3


def test_any_number_of_shards_gives_the_same(run, merged):
    again = run.merge([run.shard(i, 2) for i in (0, 1)])
    for split, (table, counts) in merged.items():
        assert again[split][0].equals(table), split
        assert again[split][1].to_dict() == counts.to_dict(), split
    with pytest.raises(UserError, match="validation: 100 predictions came back for 130 images"):
        run.merge([run.shard(0, 2)], ("validation",))


def test_predictions_are_of_the_split_s_pictures(run, merged):
    """Drawn anew and resized by torch; train's pictures would give others."""
    model = models.build("resnet50v2")
    model.load_state_dict(Checkpoints(run.run_uri).load(run.checkpoint).average)
    images = np.stack([draw(i, LABELS[i]) for i in range(12)])
    inputs = F.interpolate(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, (SIZE, SIZE), mode="bilinear")
    with torch.inference_mode():
        expected = model.eval()(inputs).softmax(1).amax(1).numpy()
    found, train = (np.array(merged[split][0]["probability_1"])[:12] for split in ("validation", "train"))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.abs(train - expected).max() > 0.05


@pytest.fixture(scope="module")
def written(run, merged, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    report.write_report([evaluation(run, merged, "first-run", "fan")], run.data_set(), str(out))
    return out


def test_the_report_says_where_validation_images_come_from(run, written):
    stored, page = (written / "report.json").read_text(), Page((written / "report.html").read_text())
    assert json.loads(stored)["data"]["num_rows"] == {"train": 40, "validation": 130, "test": 27}
    assert json.loads(stored)["runs"][0]["validation_images"] == "the data set's own split (130 images)"
    assert ": 40 train, 130 validation and 27 test images, 10 classes" in page.text
    assert "Validation images: the data set's own split (130 images)." in page.text
    silent = json.loads(stored)["runs"][0]["run_card"]["chosen_where_the_deck_is_silent"]
    assert silent["validation split"] == "the data set's own"
    assert read_manifest(run.data_uri).has_validation


def test_classes_without_images_have_no_recall_and_are_not_averaged(written, merged):
    def no_constants(name):
        raise AssertionError(f"{name} is no JSON")

    splits = json.loads((written / "report.json").read_text(), parse_constant=no_constants)["runs"][0]["splits"]
    for split, absent in (("validation", NAMES[7:]), ("test", [NAMES[4]]), ("train", [])):
        per_class = splits[split]["per_class"]
        assert [c["name"] for c in per_class if c["recall"] is None] == absent
        assert [c["name"] for c in per_class if c["f1"] is None] == absent
        f1_scores = [c["f1"] for c in per_class if c["num_images"]]
        assert splits[split]["macro_f1"] == pytest.approx(np.mean(f1_scores))
    page = Page((written / "report.html").read_text())
    was_predicted = merged["test"][1].confusion[:, 4].sum() > 0
    assert f"{NAMES[4]} 0 {'0.00%' if was_predicted else 'n/a'} n/a n/a" in page.text
    assert "n/a: the split has no images of this class. The macro F1 leaves it out." in page.text
    assert page.tags.count("svg") == 3
    assert "nan" not in page.text.lower()
