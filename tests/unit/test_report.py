"""From checkpoint to report: any number of shards gives the same integers, and the page is whole, safe and offline."""

import base64
import dataclasses
import hashlib
import io
import json
import re
import shutil
import tarfile
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cifar_dist import models
from cifar_dist.cli.evaluate import evaluate
from cifar_dist.data import sources, store
from cifar_dist.data.card import CARD, FACTS, data_card, read_card, write_card
from cifar_dist.data.manifest import SPLITS, Manifest, read_manifest
from cifar_dist.data.private import Staging
from cifar_dist.data.staged import DataSet, StagedSplit
from cifar_dist.errors import UserError
from cifar_dist.evaluate import driver, report
from cifar_dist.evaluate.driver import Evaluation, choose, merge
from cifar_dist.evaluate.scores import count, wilson_interval
from cifar_dist.evaluate.shard import FLIPPED, Shard, evaluate_shard
from cifar_dist.job_settings import ClusterSettings, EvaluationSettings
from cifar_dist.recipes import recipe_config
from cifar_dist.run import folder as run_folder
from cifar_dist.run.checkpoint import Checkpoint, CheckpointState, Cursor, Mark
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.log import RunLog
from cifar_dist.run.splits import ids_of
from cifar_dist.storage import Folder

NO_OPTIMIZER = {"optimizers": [], "scaler": {}}
NUM_TRAIN, NUM_TEST, SIZE = 60, 250, 96  # three batches of test images, so that three shards have one each
REAL = Path(__file__).parents[3] / "shared/data/cifar10-jpeg.tar.gz"
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src="http://example.org/x.png">',
    "</title></svg></style>",
    "{{ 7 * 7 }}",
    r"$\nosuchcommand{$",
    "--> <b>",
    "a & b",
    "'onerror='x",
    "naïve 名",
    "plain",
]


def prepare(folder: Path, class_names: list[str], first: int = 0) -> str:
    """Drawn shapes under other names; the files are named after their class."""

    def items(split: str, n: int, key: int) -> list[sources.Item]:
        draw = [partial(sources.draw_shape, i % 10, (key, first + i)) for i in range(n)]
        return [sources.Item(f"{split}/{class_names[i % 10]}/{i}.png", i % 10, draw[i]) for i in range(n)]

    splits = {"train": items("train", NUM_TRAIN, 0), "test": items("test", NUM_TEST, 1)}
    store.prepare(sources.Source.of("drawn", class_names, splits), str(folder))
    return str(folder)


@dataclasses.dataclass
class Run:
    data_uri: str
    run_uri: str
    staging: str
    checkpoint: Checkpoint

    def shard(self, index: int, num_shards: int, **options) -> dict:
        place = {"run": run_folder.Run(self.run_uri), "checkpoint": self.checkpoint, "data": self.data_set()}
        return evaluate_shard(Shard(**place, splits=SPLITS, index=index, num_shards=num_shards, **options))

    def data_set(self, uri: str = "") -> DataSet:
        return DataSet.open(uri or self.data_uri, Staging(folder=self.staging))

    def merge(self, parts: list[dict], splits: tuple[str, ...] = SPLITS) -> dict:
        manifest = read_manifest(self.data_uri)
        staged = {split: self.data_set().stage(split) for split in manifest.splits}
        return merge(parts, self.checkpoint, splits, {s: staged[s].labels for s in staged}, manifest)


def pixels(data_uri: str, staging: str, ids: range) -> torch.Tensor:
    """Test images as the model wants them, without DALI: -1..1, resized by torch."""
    staged = DataSet.open(data_uri, Staging(folder=Path(staging))).stage("test")
    images = np.stack([np.asarray(Image.open(io.BytesIO(staged.encoded(i).tobytes()))) for i in ids])
    images = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    return F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("report")
    return trained(folder, prepare(folder / "data", HOSTILE), HOSTILE)


def trained(folder: Path, data_uri: str, class_names: list[str]) -> Run:
    """A run with one checkpoint of a ResNet whose average of weights differs from its weights."""
    staging = str(folder / "staged")
    config = recipe_config("quickstart_resnet50v2", validation_fraction=0.2, ema_decay=0.5)
    model = models.build("resnet50v2", finetune=True, batchnorm_momentum=0.0)
    with torch.no_grad():
        model(pixels(data_uri, staging, range(20)))  # moving statistics that fit, so that predictions vary
        model.classifier[-1].weight *= 3
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: tensor if "running" in name else tensor * 0 for name, tensor in average.items()}
    run_uri = str(folder / "runs" / "first-run")
    (folder / "runs" / "first-run").mkdir(parents=True)
    log = RunLog(Folder(run_uri), 0)
    rates = {"images_per_second": 20.0, "data_wait_share": 0.25, "seconds": 4.0}
    scores = {"train_loss": 2.0, "train_accuracy": 0.3, "validation_loss": 2.1, "validation_accuracy": 0.25}
    log.add("warning", 0, 0, warning="random_weights", message="starts from RANDOM weights <not> ImageNet's")
    log.add("step", 0, 5, step=5, **scores, **rates)
    log.add("epoch", 0, 10, **scores, **rates)
    log.add("epoch", 1, 20, **scores, **{**rates, "images_per_second": 40.0, "data_wait_share": 0.0, "seconds": 12.0})
    taken = log.take()
    log.store(taken)
    log.close()
    meta = {
        "model": "resnet50v2",
        "num_classes": 10,
        "global_step": 20,
        "metrics": scores,
        "config": config.to_dict(),
        "manifest_sha256": read_manifest(data_uri).sha256,
        "data_uri": data_uri,
        "class_names": class_names,
        "weights": None,
        "totals": [0.0, 0.0, 0.0],
        "precision": "fp32",
        "device": "cpu",
        "world_size": 2,
        "num_train": 280,
        "num_threads_per_worker": 1,
        "git_commit": "unknown",
    }
    state = CheckpointState(model=weights, average=average, ranks={}, optimizer=NO_OPTIMIZER, log=taken.mark)
    checkpoint = Checkpoints(run_uri).write(Cursor(2, 0), 1, state, meta)
    return Run(data_uri, run_uri, staging, checkpoint)


@pytest.fixture(scope="module")
def whole(run) -> dict:
    return run.shard(0, 1)


@pytest.fixture(scope="module")
def thirds(run) -> list[dict]:
    return [run.shard(i, 3) for i in range(3)]


@pytest.fixture(scope="module")
def flipped(run) -> dict:
    """The last third, with flip test-time augmentation: 50 test images and all of train and validation."""
    return run.shard(2, 3, flip_tta=True)


@pytest.fixture(scope="module")
def merged(run, whole) -> dict:
    return run.merge([whole])


# Evaluation.


def test_one_and_three_shards_give_the_same(run, merged, thirds):
    assert [len(part["test"][0]) for part in thirds] == [100, 100, 50]  # each did its part
    for parts in (thirds, thirds[::-1]):
        again = run.merge(parts)
        for split in SPLITS:
            assert again[split][1].to_dict() == merged[split][1].to_dict(), split
            assert again[split][0].equals(merged[split][0]), split


def test_in_bf16_other_numbers_come_of_the_same_images(run, thirds):
    """The precision is really used, and does not break what is counted."""
    exact, coarse = thirds[0]["test"][0], run.shard(0, 3, precision="bf16")["test"][0]
    assert coarse["id"].equals(exact["id"])
    assert coarse["label"].equals(exact["label"])
    apart = np.abs(np.array(coarse["probability_1"]) - np.array(exact["probability_1"]))
    assert 1e-3 < apart.mean() < 0.4  # a random network tells images apart by little
    again = run.shard(0, 3, precision="bf16")["test"][0]
    assert again.equals(coarse)


@pytest.mark.parametrize(
    ("trained", "wanted", "gpu", "used"),
    [
        *(("bf16", "run", False, "bf16"), ("bf16", "run", True, "bf16"), ("fp32", "run", True, "fp32")),
        *(("fp16", "run", True, "fp16"), ("fp16", "run", False, "fp32")),  # CPUs have no instructions for it
        *(("bf16", "fp32", True, "fp32"), ("fp16", "fp32", False, "fp32")),
    ],
)
def test_the_precision_is_that_of_training_or_fp32(run, trained, wanted, gpu, used):
    checkpoint = Checkpoint(run.checkpoint.name, {**run.checkpoint.meta, "precision": trained})
    assert driver.precision_of(checkpoint, wanted, gpu=gpu) == used


def test_every_image_of_each_split_comes_once(run, merged):
    sizes = {split: (len(table), counts.num_images) for split, (table, counts) in merged.items()}
    assert sizes == {"train": (50, 50), "validation": (10, 10), "test": (NUM_TEST, NUM_TEST)}
    ids = {split: table["id"].to_pylist() for split, (table, _) in merged.items()}
    assert ids["test"] == list(range(NUM_TEST))
    assert sorted(ids["train"] + ids["validation"]) == list(range(NUM_TRAIN))
    labels = DataSet.open(run.data_uri, Staging(folder=Path(run.staging))).stage("test").labels
    assert merged["test"][0]["label"].to_pylist() == labels.tolist()


def test_predictions_are_those_of_the_averaged_weights(run, merged):
    """Computed again without DALI, the loader and the shard: catches mixed-up ids as well as the wrong weights."""
    model = models.build("resnet50v2")
    model.load_state_dict(Checkpoints(run.run_uri).load(run.checkpoint).average)
    model.eval()
    with torch.inference_mode():
        expected = model(pixels(run.data_uri, run.staging, range(95, 110))).softmax(1).numpy()
    table = merged["test"][0].slice(95, 15).to_pydict()
    top = np.array([table[f"prediction_{k}"] for k in range(1, 6)]).T
    found = np.array([table[f"probability_{k}"] for k in range(1, 6)]).T
    assert len(np.unique(top[:, 0])) > 1  # a model that always says the same would prove little
    np.testing.assert_allclose(found, np.take_along_axis(expected, top, 1), atol=2e-3)
    np.testing.assert_allclose(found, -np.sort(-expected, 1)[:, :5], atol=2e-3)
    loss = -np.log(expected[np.arange(15), table["label"]])
    np.testing.assert_allclose(table["loss"], loss, atol=2e-2)


def with_test_table(parts: list[dict], table: pa.Table) -> list[dict]:
    return [{**parts[0], "test": (table, parts[0]["test"][1])}, *parts[1:]]


@pytest.mark.parametrize("fault", ["missing", "doubled", "replaced"])
def test_merge_refuses_what_is_not_exactly_once(run, thirds, fault):
    table = thirds[0]["test"][0]
    faulty = {
        "missing": table.slice(1),
        "doubled": pa.concat_tables([table, table.slice(0, 1)]),
        "replaced": pa.concat_tables([table.slice(1), table.slice(1, 1)]),
    }[fault]
    with pytest.raises(UserError, match=r"test: \d+ predictions came back for 250 images .* not exactly one each"):
        run.merge(with_test_table(thirds, faulty))


def test_flip_tta_adds_the_mean_of_the_logits_of_image_and_mirror_image(run, thirds, flipped):
    assert list(flipped) == [name for split in SPLITS for name in (split, split + FLIPPED)]
    for split in SPLITS:  # what is there without the option stays as it is
        assert flipped[split][0].equals(thirds[2][split][0])
        assert flipped[split][1].to_dict() == thirds[2][split][1].to_dict()
    model = models.build("resnet50v2")
    model.load_state_dict(Checkpoints(run.run_uri).load(run.checkpoint).average)
    model.eval()
    images = pixels(run.data_uri, run.staging, range(235, 250))
    with torch.inference_mode():
        logits = (model(images) + model(images.flip(-1))) / 2
    table, counts = flipped["test+flip"]
    assert (table["id"].to_pylist(), counts.num_images) == (list(range(200, 250)), 50)
    rows = table.slice(35).to_pydict()
    top = logits.softmax(1).amax(1)
    np.testing.assert_allclose(rows["probability_1"], top, atol=2e-3)
    loss = F.cross_entropy(logits, torch.tensor(rows["label"]), reduction="none")
    np.testing.assert_allclose(rows["loss"], loss, atol=2e-2)
    assert np.abs(np.array(thirds[2]["test"][0]["probability_1"])[35:] - top.numpy()).max() > 0.1


def test_flipped_predictions_are_checked_and_merged_too(run, flipped):
    splits = ("train", "train+flip", "validation+flip")
    merged = run.merge([flipped], splits)
    assert {split: merged[split][1].num_images for split in splits} == dict(zip(splits, (50, 50, 10), strict=True))
    with pytest.raises(UserError, match=r"test\+flip: 50 predictions came back for 250 images"):
        run.merge([flipped], ("test+flip",))


def test_merge_refuses_a_lost_and_a_repeated_shard(run, thirds):
    for parts in (thirds[:2], [*thirds, thirds[0]]):
        with pytest.raises(UserError, match="not exactly one each"):
            run.merge(parts)


def test_merge_refuses_counts_of_another_number_of_images(run, thirds):
    table, counts = thirds[0]["test"]
    faulty = [{**thirds[0], "test": (table, counts + counts)}, *thirds[1:]]
    with pytest.raises(UserError, match="not exactly one each"):
        run.merge(faulty)


def test_checkpoint_of_another_data_set_is_refused(run):
    meta = {**run.checkpoint.meta, "manifest_sha256": "0" * 64}
    foreign = dataclasses.replace(run, checkpoint=Checkpoint(run.checkpoint.name, meta))
    with pytest.raises(UserError, match=r"first-run was trained on another data set"):
        foreign.shard(0, 1)


def test_a_run_s_best_checkpoint_is_evaluated_not_its_latest(run, tmp_path):
    uri, state = (
        str(tmp_path / "runs" / "again"),
        CheckpointState(model={"a": torch.ones(1)}, average=None, ranks={}, optimizer=NO_OPTIMIZER),
    )
    for epoch, accuracy in enumerate((0.3, 0.9, 0.2), 1):
        scores = {"validation_accuracy": accuracy, "validation_loss": 1.0}
        meta = {key: run.checkpoint.meta[key] for key in ("model", "global_step", "world_size", "config")}
        meta |= {"manifest_sha256": run.checkpoint.meta["manifest_sha256"], "metrics": scores}
        Checkpoints(uri).write(Cursor(epoch, 0), 1, state, meta)
    chosen = choose([run.run_uri, uri], run.data_set())
    assert [chosen_run.name for chosen_run, _ in chosen] == ["first-run", "again"]
    assert [checkpoint.cursor.epoch for _, checkpoint in chosen] == [2, 2]
    with pytest.raises(UserError, match="must differ in name"):
        choose([uri, str(tmp_path / "elsewhere" / "again")], run.data_set())


def test_counts_are_those_of_the_table(merged):
    """Each column counted is the one that the table names."""
    for split, (table, counts) in merged.items():
        columns = {name: table[name].to_numpy() for name in table.column_names}
        ranked = np.stack([columns[f"prediction_{k}"] for k in range(1, 6)], 1)
        expected = count(columns["label"], ranked, columns["probability_1"], columns["loss"], 10)
        assert counts.to_dict() == expected.to_dict(), split


def test_splits_are_the_run_s_own(run):
    config, manifest = recipe_config("quickstart_resnet50v2", validation_fraction=0.2), read_manifest(run.data_uri)
    labels = np.arange(NUM_TRAIN) % 10
    train, validation = (ids_of(split, config, manifest, labels) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (50, 10)
    other = config.replace(split_seed=1)
    assert not np.array_equal(ids_of("validation", other, manifest, labels), validation)


# The report.


VOID = {"meta", "img", "br", "hr", "link", "input"}
FETCHING = {"src", "href", "xlink:href", "srcset", "data", "poster", "action", "background"}


class Page(HTMLParser):
    """Checks that tags close in order; collects text, tags, and what would be fetched."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.references, self.pictures, self.texts, self.attributes = [], [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.pictures += [dict(attrs)["src"]] if tag == "img" else []
        self.references += [value for name, value in attrs if name in FETCHING]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def evaluation(run: Run, merged: dict, name: str, model: str) -> Evaluation:
    checkpoint = Checkpoint(run.checkpoint.name, {**run.checkpoint.meta, "model": model})
    tables, counts = {s: t for s, (t, _) in merged.items()}, {s: c for s, (_, c) in merged.items()}
    named = Path(run.run_uri).with_name(name)
    if not named.exists():
        named.symlink_to(run.run_uri)
    named_run = run_folder.Run(str(named))
    return Evaluation(run=named_run, checkpoint=checkpoint, precision="bf16", predictions=tables, counts=counts)


@pytest.fixture(scope="module")
def written(run, merged, flipped, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    first = {**merged, "test+flip": flipped["test+flip"]}
    both = [evaluation(run, first, "first-run", "resnet50v2"), evaluation(run, merged, "second-run", "fan")]
    page = report.write_report(both, run.data_set(), str(out))
    assert page == f"{out}/report.html"
    return out


@pytest.fixture(scope="module")
def page(written) -> Page:
    return Page((written / "report.html").read_text())


def test_page_refers_to_nothing_outside_itself(written, page):
    assert page.references
    assert {r for r in page.references if not r.startswith(("data:image/", "#"))} == set()
    assert {"script", "link", "iframe", "object", "base", "form"} & set(page.tags) == set()
    style = re.findall(r"<style.*?</style>", (written / "report.html").read_text(), re.DOTALL)
    assert not [s for s in style if "@import" in s or "http" in s]
    urls = re.findall(r"url\((.*?)\)", (written / "report.html").read_text())
    assert {u for u in urls if not u.startswith(("#", "'#", '"#'))} == set()


def test_page_names_runs_and_shows_their_numbers_alone(page, merged):
    for words in ("first-run", "second-run", "resnet50v2", "fan"):
        assert words in page.text
    for words in ("deck states", "97.79%", "78.04%", "76.00%", "95.59%", "89.22%", "84.51%", "difference"):
        assert words not in page.text  # drawn shapes are not CIFAR-10
    for split, (_, counts) in merged.items():
        correct = int(counts.confusion.trace())
        assert f"{split} {100 * correct / counts.num_images:.2f}%" in page.text
        assert f"{correct} / {counts.num_images}" in page.text
    assert "35.0 images/s in training, 6.25% of the time waiting for data" in page.text  # weighted by seconds
    assert "8.0 s per epoch, on 2 worker(s)" in page.text


def test_page_shows_flip_tta_as_a_row_of_its_own(page, merged, flipped):
    for split, counts in (("test", merged["test"][1]), ("test+flip", flipped["test+flip"][1])):
        correct, n = int(counts.confusion.trace()), counts.num_images
        row = (
            rf"first-run \(resnet50v2\) {re.escape(split)} {100 * correct / n:.2f}% [\d.]+% to [\d.]+% {correct} / {n} "
        )
        assert len(re.findall(row, page.text)) == 1
    assert "+flip : flip test-time augmentation" in page.text


def test_page_says_what_must_be_said(page):
    assert page.text.count("starts from RANDOM weights <not> ImageNet's") == 2


def test_page_says_in_which_precision_each_run_was_evaluated(page):
    assert page.text.count("Evaluated in bf16.") == 2


def test_hostile_class_names_are_text(page):
    for name in HOSTILE:
        assert " ".join(name.split()) in page.text, name
    assert [name for name, _ in page.attributes if name.startswith("on")] == []


def test_worst_mistakes_are_pictures_of_the_test_images(run, merged, page):
    table = merged["test"][0].to_pydict()
    wrong = [i for i in range(NUM_TEST) if table["prediction_1"][i] != table["label"][i]]
    wrong.sort(key=lambda i: -table["probability_1"][i])
    staged = DataSet.open(run.data_uri, Staging(folder=Path(run.staging))).stage("test")
    mistakes = report.worst_mistakes(evaluation(run, merged, "first-run", "fan"), staged, HOSTILE)
    assert len(mistakes) == report.NUM_MISTAKES
    assert [m["id"] for m in mistakes] == wrong[: report.NUM_MISTAKES]
    assert [m["label"] for m in mistakes] == [HOSTILE[i % 10] for i in wrong[: report.NUM_MISTAKES]]
    assert page.pictures == [m["picture"] for m in mistakes] * 2
    first = page.pictures[0].removeprefix("data:image/png;base64,")
    assert base64.b64decode(first) == staged.encoded(wrong[0]).tobytes()


def test_plots_are_drawn(page):
    assert page.tags.count("svg") == 2 * 3


def test_a_run_with_a_loss_that_was_not_finite_is_reported(run, merged, tmp_path):
    """It is stored as null, in the log and in the checkpoint."""
    uri, meta = str(tmp_path / "null-run"), run.checkpoint.meta
    shutil.copytree(run.run_uri, uri)
    log = RunLog(Folder(uri), 20, Mark(**meta["log"]))
    assert not log.lost
    scores = {**meta["metrics"], "validation_loss": float("nan")}
    rates = {"images_per_second": 20.0, "data_wait_share": 0.25, "seconds": 4.0}
    log.add("epoch", 2, 30, **scores, **rates)
    log.store(log.take())
    log.close()
    state = Checkpoints(uri).load(run.checkpoint)
    checkpoint = Checkpoints(uri).write(Cursor(3, 0), 1, state, {**meta, "metrics": scores, "epoch": 3, "step": 0})
    odd = dataclasses.replace(
        evaluation(run, merged, "null-run", meta["model"]), run=run_folder.Run(uri), checkpoint=checkpoint
    )
    (tmp_path / "out").mkdir()
    report.write_report([odd], run.data_set(), str(tmp_path / "out"))
    stored = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    assert [epoch["validation_loss"] for epoch in stored["runs"][0]["epochs"]] == [2.1, 2.1, None]
    assert Page((tmp_path / "out" / "report.html").read_text()).tags.count("svg") == 3
    assert choose([uri], run.data_set())[0][1] == run.checkpoint  # the one before is the best


def test_json_holds_the_integers_and_is_strict(written, merged):
    def no_constants(name):
        raise AssertionError(f"{name} is no JSON")

    stored = json.loads((written / "report.json").read_text(), parse_constant=no_constants)
    assert [r["name"] for r in stored["runs"]] == ["first-run", "second-run"]
    for run in stored["runs"]:
        for split, (_, counts) in merged.items():
            assert run["splits"][split]["counts"] == counts.to_dict()
            assert run["splits"][split]["num_correct"] == counts.confusion.trace()
        assert run["run_card"]["world_size"] == 2
        assert run["run_card"]["config"]["loop"]["global_batch_size"] == 32
    assert stored["data"]["class_names"] == HOSTILE


# The section on the data.


def facts_of(split: str, num_rows: int, names: list[str]) -> pa.Table:
    """Facts about pictures whose files have hostile names. Every tenth picture is in each split."""
    rows = []
    for i in range(num_rows):
        content = i if i % 10 == 0 else f"{split}{i}"
        sha256 = hashlib.sha256(str(content).encode()).digest()
        sizes = {"height": 20, "width": 20 + i % 3, "num_bytes": 1000}
        other = {"encoding": "<i>GIF", "pixels_sha256": sha256, "perceptual_hash": 0x5A3C96E12D4BC387 + i % 2}
        row = {"path": f"{split}/{HOSTILE[i % 9]}/{i}.png", "label": i % len(names), **sizes, **other}
        rows.append({**row, "stored_as_png": True, "has_alpha": i == 0})
    return pa.Table.from_pylist(rows, schema=FACTS)


def card_for(run: Run, names: list[str] = HOSTILE, num_train: int = NUM_TRAIN) -> dict:
    splits = {"train": facts_of("train", num_train, names), "test": facts_of("test", NUM_TEST, names)}
    left_out = [{"kind": "<b>unreadable</b>", "path": HOSTILE[0], "reason": HOSTILE[1]}]
    facts = {"class_names": names, "layout": HOSTILE[2], "drawn": ["test"], "left_out": left_out}
    return data_card(source="drawn", manifest_sha256=read_manifest(run.data_uri).sha256, splits=splits, **facts)


def test_the_page_has_a_section_on_the_data(run, merged, page, tmp_path):
    card = card_for(run)
    write_card(Folder(run.data_uri), card)
    try:
        found = read_card(run.data_uri, read_manifest(run.data_uri))
    finally:
        (Path(run.data_uri) / CARD).unlink()
    report.write_report([evaluation(run, merged, "only", "fan")], run.data_set(), str(tmp_path), found)
    with_card = Page((tmp_path / "report.html").read_text())
    text = with_card.text
    for sentence in card["warnings"]:
        assert " ".join(sentence.split()) in text
    for words in (
        f"Read as {HOSTILE[2]}. Drawn from train: test.",
        "images 60 250 largest / smallest class 1.0 1.0 classes without images 0 0",
        "width 20 to 22 (median 21) 20 to 22 (median 21) height 20 20 width / height 1.00 to 1.10 1.00 to 1.10",
        "different sizes 3 3 most common sizes 20 x 20: 20 21 x 20: 20 22 x 20: 20 20 x 20: 84 21 x 20: 83 22 x 20: 83",
        "formats <i>GIF: 60 <i>GIF: 250 stored as PNG 60 250 with transparency 1 1 MB 0.1 0.2",
        "12 of 310 images have the same pixels as another one.",
        "test images that are also in train 6 (2.40%) 250 (100.00%)",
        f"test/{HOSTILE[0]}/0.png (test, {HOSTILE[0]}) = train/{HOSTILE[0]}/0.png (train, {HOSTILE[0]})",
        f"1 <b>unreadable</b> {HOSTILE[0]}: {HOSTILE[1]}",
        f"class train test {HOSTILE[0]} 6 25",
    ):
        assert words in text
    assert {r for r in with_card.references if not r.startswith(("data:image/", "#"))} == set()
    assert [name for name, _ in with_card.attributes if name.startswith("on")] == []
    assert {"script", "i"} & set(with_card.tags) == set()
    assert json.loads((tmp_path / "report.json").read_text())["data"]["card"] == card
    assert "The data" not in page.text  # nor in the report of a data set without a card


def test_a_damaged_card_stops_the_evaluation_before_it_starts(run, tmp_path):
    file = Path(run.data_uri) / CARD
    file.write_text("{")
    try:
        with pytest.raises(UserError, match=r"data_card\.json is damaged"):
            evaluate(
                [run.run_uri],
                run.data_uri,
                str(tmp_path / "out"),
                settings=EvaluationSettings(),
                where=ClusterSettings(address="nowhere:1"),
            )
    finally:
        file.unlink()


def test_a_thousand_classes_are_folded(run, merged, tmp_path):
    names = [f"class-{i}" for i in range(1000)]
    card = card_for(run, names, num_train=1990)  # the last ten classes have one train image, the others two
    report.write_report([evaluation(run, merged, "only", "fan")], run.data_set(), str(tmp_path), card)
    text = Page((tmp_path / "report.html").read_text()).text
    shown, _, folded = text.partition("Images per class ")[2].partition("All classes")
    assert re.findall(r"class-(\d+)", shown) == [str(i) for i in (*range(10), *range(990, 1000))]
    assert "The largest and the smallest 10 of 1,000 classes" in shown
    assert re.findall(r"class-(\d+)", folded.partition("Images held twice")[0]) == [str(i) for i in range(1000)]


@pytest.fixture
def taken_for_cifar10(run, monkeypatch) -> tuple[Manifest, StagedSplit]:
    """The drawn data set's own counts and mean pixels stand for those of CIFAR-10."""
    manifest = read_manifest(run.data_uri)
    test = DataSet(uri=run.data_uri, manifest=manifest, staging=Staging(folder=Path(run.staging))).stage("test")
    means = [
        np.mean([report.half_means(test.encoded(i)) for i in np.flatnonzero(test.labels == label)], axis=0)
        for label in (3, 1, 4, 5, 9, 2, 6, 0, 8, 7)  # their order does not matter
    ]
    monkeypatch.setattr(report, "CIFAR10_MEANS", means)
    monkeypatch.setattr(report, "CIFAR10_COUNTS", {"train": NUM_TRAIN // 10, "test": NUM_TEST // 10})
    return manifest, test


@pytest.mark.usefixtures("taken_for_cifar10")
def test_cifar10_is_compared_with_the_deck(run, merged, tmp_path):
    """Whatever its classes are called; both networks' statements are there, also where one of them was not run."""
    report.write_report([evaluation(run, merged, "only", "resnet50v2")], run.data_set(), str(tmp_path))
    text = Page((tmp_path / "report.html").read_text()).text
    assert "+flip" not in text
    counts = merged["test"][1]
    accuracy = 100 * counts.confusion.trace() / counts.num_images
    assert f"test {accuracy:.2f}% 84.51% {accuracy - 84.51:+.2f} " in text
    assert f"resnet50v2 26,159,370 128 3 95.59% 89.22% 84.51% {accuracy:.2f}% (only)" in text
    assert "fan 87,316,426 64 30 97.79% 78.04% 76.00% not in this report" in text
    other = text.partition("Other settings than the deck's: ")[2]
    for words in (
        "image_size 96 (deck: 224)",
        "batchnorm_momentum 0.8 (deck: 0.99)",
        "weights random (deck: ImageNet's)",
    ):
        assert words in other
    assert "input range: -1..1: the deck's code has no preprocessing" in text
    assert json.loads((tmp_path / "report.json").read_text())["data"]["is_cifar10"]


@pytest.mark.usefixtures("taken_for_cifar10")
@pytest.mark.parametrize("splits", [["validation"], ["train", "validation"], ["test", "test+flip"]])
def test_the_deck_is_shown_beside_the_splits_that_there_are(run, merged, flipped, splits, tmp_path):
    """The deck has no figures with flip test-time augmentation."""
    parts = {split: (merged | flipped)[split] for split in splits}
    report.write_report([evaluation(run, parts, "only", "resnet50v2")], run.data_set(), str(tmp_path))
    text = Page((tmp_path / "report.html").read_text()).text
    stated = {"train": "95.59%", "validation": "89.22%", "test": "84.51%"}
    for split in splits:
        counts = parts[split][1]
        accuracy = 100 * counts.confusion.trace() / counts.num_images
        deck = f"{stated[split]} {accuracy - float(stated[split][:-1]):+.2f} " if split in stated else ""
        low, _ = wilson_interval(int(counts.confusion.trace()), counts.num_images)
        assert f" {split} {accuracy:.2f}% {deck}{100 * low:.2f}% to " in text
    assert text.count("not in this report") == (1 if "test" in splits else 2)


def test_counts_sizes_and_content_make_cifar10_not_names(run, taken_for_cifar10, monkeypatch, tmp_path):
    manifest, test = taken_for_cifar10
    assert report.is_cifar10(manifest, test)
    other = prepare(tmp_path / "other", CIFAR10, first=1000)  # its names and counts, other pictures
    other_manifest = read_manifest(other)
    other_test = DataSet(uri=other, manifest=other_manifest, staging=Staging(folder=Path(run.staging))).stage("test")
    assert not report.is_cifar10(other_manifest, other_test)
    for split, key, value in (("train", "num_rows_per_class", [5] * 10), ("test", "width", [32, 33])):
        part = {**manifest.splits[split], key: value}
        assert not report.is_cifar10(dataclasses.replace(manifest, splits={**manifest.splits, split: part}), test)
    monkeypatch.undo()
    assert not report.is_cifar10(manifest, test)


@pytest.mark.slow
def test_the_real_cifar10_is_recognised(tmp_path):
    if not REAL.exists():
        pytest.skip("the real CIFAR-10 is not beside this clone")
    with tarfile.open(REAL) as archive:
        archive.extractall(tmp_path, filter="data")
    root = next(path.parent for path in tmp_path.rglob("train") if path.is_dir())
    for name in ("train", "test"):
        (root / name / "airplane").rename(root / name / "zeppelin")  # neither names nor their order matter
    store.prepare(sources.find_source("folder", str(root)), str(tmp_path / "data"))
    manifest = read_manifest(str(tmp_path / "data"))
    assert report.is_cifar10(
        manifest,
        DataSet(uri=str(tmp_path / "data"), manifest=manifest, staging=Staging(folder=tmp_path / "staged")).stage(
            "test"
        ),
    )
