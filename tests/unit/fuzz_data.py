"""Fuzzing of a data set at rest and on a node. What is read equals what was prepared, or is refused."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from fuzzing import Group, Refused, outcome, require, tree
from mutations import change_bytes, change_file, change_json, change_parquet, change_values, put_json, sha256

from cifar_dist.data import making, parts, sources, store
from cifar_dist.data.loader import Loader
from cifar_dist.data.manifest import MANIFEST, read_manifest
from cifar_dist.data.order import ImageSpec, eval_plans
from cifar_dist.data.private import Staging
from cifar_dist.data.staged import STAGED, DataSet
from cifar_dist.sealed_json import to_json
from cifar_dist.train.features import FeatureCache

SPLITS = ("train", "test")
FREE = ("source", "num_skipped", "sha256")  # what the manifest says and no file can tell
FREE_OF_SPLIT = ("encodings", "height", "width")  # the sizes are held against the pixels, see `loader`


class Base:
    """As much of a frozen base as a cache of features looks at."""

    dtype, num_features = torch.float32, 4


class Data(Group):
    areas = ("manifest", "files", "staged", "manifest", "files", "staged", "loader", "again", "features")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        parts.ROWS_PER_FILE, making.ROWS_PER_GROUP = 12, 5  # several files and batches of few rows
        self.source = sources.shapes(20, 20)
        store.prepare(self.source, str(self.original / "data"))
        (self.original / "data" / "notes.txt").write_text("mine")
        self.prepared = read_manifest(str(self.original / "data"))
        self.wanted = self.read(self.original / "data", self.original / "staged", "first")
        self.images = self.load(self.original / "data", self.original / "staged", "first", "decoded")

    def read(self, data: Path, staging_folder: Path, job: str) -> dict[str, Any]:
        """All that is told of a data set: the manifest's words, and each split's rows."""
        data_set = DataSet.open(str(data), Staging(job=job, folder=staging_folder, limit_seconds=1.0))
        manifest, staged = data_set.manifest, {s: data_set.stage(s) for s in SPLITS}
        rows = {
            s: [(bytes(split.encoded(i)), split.path(i), int(split.labels[i])) for i in range(len(split))]
            for s, split in staged.items()
        }
        words = {name: value for name, value in asdict(manifest).items() if name not in FREE}
        for split in words["splits"].values():
            for name in FREE_OF_SPLIT:
                split.pop(name)
            for file in split["files"]:
                file["sha256"] = file["num_bytes"] = ""  # held against the file: the same rows may lie there otherwise
        _ = [manifest.image_shape(split) for split in SPLITS]
        return {"words": to_json(words), "rows": rows}

    def load(self, data: Path, staging_folder: Path, job: str, cache: str) -> np.ndarray:
        """The test split as it is trained on."""
        data_set = DataSet.open(str(data), Staging(job=job, folder=staging_folder, limit_seconds=1.0))
        settings = {"device": torch.device("cpu"), "num_threads": 1, "max_batch_size": 8, "cache": cache}
        loader = Loader(data_set, "test", ImageSpec(image_size=32), **settings)
        return np.concatenate([b.images.numpy() for b in loader.batches(eval_plans(np.arange(20), 8, 0, 1))])

    def assess(self, random: Random, copy: Path) -> None:
        """Reads the copy as it is, as a new job or as the one that has staged it."""
        before = tree(copy / "data")
        job = random.choice(["second", "second", "first", ""])
        found = outcome(lambda: self.read(copy / "data", copy / "staged", job))
        if not isinstance(found, Refused):
            require(found["rows"] == self.wanted["rows"], f"other rows: {self.said}")
            require(found == self.wanted, f"other words than the files have: {self.said}")
        found = outcome(lambda: store.whole(str(copy / "data"), "shapes"))
        require(tree(copy / "data") == before, "reading has changed the data set")

    def manifest_of(self, random: Random, copy: Path) -> None:
        """Damages the manifest of the copy."""
        path = copy / "data" / MANIFEST
        kind = random.choice(["json"] * 6 + ["resealed"] * 6 + ["swap", "file"])
        if kind == "file":
            self.said = change_file(random, path, self.outside / "outside.txt")
            return
        content = path.read_bytes()
        if kind == "swap":
            values = json.loads(content)
            files = [file for split in SPLITS for file in values["splits"][split]["files"]]
            one, other = random.sample(files, 2)
            names = random.choice([["name"], list(one), ["sha256"], ["name", "sha256"], ["num_rows"], ["rows_sha256"]])
            for name in names:
                one[name], other[name] = other[name], one[name]
                if random.random() < 0.3:  # twice the same
                    other[name] = one[name]
            put_json(path, values)
            self.said = f"{names} of two files swapped"
            return
        changed, self.said = change_json(random, content, reseal=kind == "resealed" or None)
        path.write_bytes(changed)

    def manifest(self, random: Random, copy: Path) -> None:
        if random.random() < 0.7:
            shutil.rmtree(copy / "staged")
        self.manifest_of(random, copy)
        self.assess(random, copy)

    def files_of(self, random: Random, copy: Path) -> None:
        """Damages a Parquet file of the copy, with its right checksum in the manifest or without."""
        data = copy / "data"
        names = store.file_names(self.prepared)
        path = data / random.choice(names)
        match kind := random.choice(["file", "bytes", "table", "table", "swap"]):
            case "file":
                self.said = change_file(random, path, random.choice([data / names[0], data / names[-1]]))
            case "bytes" | "table":
                self.said = change_parquet(random, path, kind)
            case "swap":
                other = data / random.choice(names)
                one, two = path.read_bytes(), other.read_bytes()
                path.write_bytes(two)
                other.write_bytes(one)
                self.said = f"{path.name} and {other.name} swapped"
        if random.random() < 0.6 and path.is_file():
            values = asdict(self.prepared)
            for split in values["splits"].values():
                for file in split["files"]:
                    if (data / file["name"]).is_file():
                        content = (data / file["name"]).read_bytes()
                        file |= {"sha256": sha256(content), "num_bytes": len(content)}
            put_json(data / MANIFEST, values)
            self.said += ", sealed again"

    def files(self, random: Random, copy: Path) -> None:
        shutil.rmtree(copy / "staged")
        self.files_of(random, copy)
        self.assess(random, copy)

    def staged_of(self, random: Random, copy: Path, names: tuple[str, ...]) -> None:
        """Damages what lies on the node."""
        (folder,) = (copy / "staged").glob("*/*")
        said = []
        for _ in range(random.choice([1, 1, 2])):
            path = folder / random.choice(names)
            if path.suffix == ".arrow" and random.random() < 0.5 and path.is_file():
                changed, what = forged_arrow(random, path.read_bytes())
                path.write_bytes(changed)
                said.append(f"{path.name}: {what}")
            elif not path.is_dir():
                said.append(change_file(random, path, self.outside / "outside.txt"))
        self.said = ", ".join(said)

    def staged(self, random: Random, copy: Path) -> None:
        parts = [f"{split}.arrow{suffix}" for split in SPLITS for suffix in ("", "", "", ".sha256", ".holder", ".lock")]
        self.staged_of(random, copy, (*parts, "train.arrow.part-1", "test.arrow.part-999999"))
        self.assess(random, copy)

    def loader(self, random: Random, copy: Path) -> None:
        """The pixels that a network is given."""
        if random.random() < 0.5:
            path = copy / "data" / MANIFEST
            values = json.loads(path.read_bytes())
            if random.random() < 0.3:
                values["splits"]["test"], self.said = change_values(random, values["splits"]["test"])
            else:
                sides = [[32, 32], [31, 31], [64, 64], [1, 32], [2**40, 2**40]]
                sizes = {"height": random.choice(sides), "width": random.choice(sides)}
                values["splits"]["test"] |= sizes
                self.said = f"{sizes}"
            put_json(path, values)
        else:
            self.staged_of(random, copy, ("test.decoded", "test.decoded", "test.arrow", "test.decoded.sha256"))
        job, cache = random.choice(["second", "first"]), random.choice(["decoded", "decoded", "encoded"])
        found = outcome(lambda: self.load(copy / "data", copy / "staged", job, cache))
        require(isinstance(found, Refused) or np.array_equal(found, self.images), "other pixels")

    def again(self, random: Random, copy: Path) -> None:
        """Prepared once more: the same data set, or a sentence; what is nobody's stays."""
        random.choice([self.manifest_of, self.files_of])(random, copy)
        before = tree(copy / "data")
        found = outcome(lambda: store.prepare(self.source, str(copy / "data")))
        after = tree(copy / "data")
        require(after.get("notes.txt") == b"mine", "notes.txt was changed")
        if isinstance(found, Refused):
            after = {name: content for name, content in after.items() if not name.startswith(store.PREPARING)}
            require(after == before, "refused and changed")
        else:
            wanted, manifest = tree(self.original / "data"), MANIFEST
            require(found[0] == self.prepared, "prepared to something else")
            require({**after, manifest: 0} == {**wanted, manifest: 0}, "other files than it says")
            require(read_manifest(str(copy / "data")) == self.prepared, "another manifest than it says")

    def features(self, random: Random, copy: Path) -> None:
        folder = copy / "staged"
        path = folder / "features-0.bin"
        base: Any = Base()
        rows, values = np.arange(6), torch.from_numpy(np.float32(np.arange(6 * 4 * 9).reshape(6, 4, 3, 3)))
        cache = FeatureCache(path, 8, 1, base, 3, 0)
        cache.put(rows, values)
        cache.checks.flush()
        del cache
        changed = random.choice([path, path.with_suffix(".crc32"), path.with_suffix(".lock")])
        self.said = change_file(random, changed, self.outside / "outside.txt")

        def read() -> tuple:
            return FeatureCache(path, 8, 1, base, 3, 0).take(np.arange(8))

        found = outcome(read)
        if not isinstance(found, Refused):
            features, there = found
            require(not there[6:].any() and torch.equal(features[there], values[there[:6]]), "other features")


def forged_arrow(random: Random, content: bytes) -> tuple[bytes, str]:
    """A staged file whose columns say that they lie elsewhere, or hold something else."""
    try:
        reader = pa.ipc.open_file(pa.BufferReader(content))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (pa.ArrowException, OSError):  # damaged before
        return change_bytes(random, content)
    at = random.randrange(len(batches))
    batch = batches[at]
    columns = {name: batch[name] for name in batch.schema.names}
    n = len(batch)
    if batch.schema != STAGED or random.random() < 0.2:  # forged before
        return change_bytes(random, content)
    name, width = random.choice([("bytes", np.int64), ("path", np.int32)])
    _, offsets, data = columns[name].buffers()
    if random.random() < 0.5:
        values = np.frombuffer(offsets, width, n + 1).copy()
        place = content.index(values.tobytes())
        forged = random.choice([0, -1, len(data), len(data) + 1, 2**31 - 1, 2**30])
        values[random.randrange(n + 1)] = forged
        return content[:place] + values.tobytes() + content[place + values.nbytes :], f"offset {forged} of {name}"
    match kind := random.choice(["labels", "order", "schema", "rows", "nulls"]):
        case "labels":
            labels = columns["label"].to_numpy().copy()
            labels[random.randrange(n)] = random.choice([0, 1, -1, 2**40])
            columns["label"] = pa.array(labels)
        case "order":
            random.shuffle(batches)
        case "schema":
            columns = random.choice([{"label": columns["label"]}, {**columns, "path": columns["label"]}])
            batches, at = batches[:1], 0
        case "rows":
            del batches[at]
        case "nulls":
            columns["label"] = pa.array([None] * n, pa.int64())
    if kind not in ("order", "rows"):
        batches[at] = pa.record_batch(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batches[0].schema if batches else STAGED) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes(), f"forged {kind} in batch {at}"


def make(folder: Path) -> Group:
    return Data(folder)
