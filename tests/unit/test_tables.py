"""Tables of pictures, Parquet and Arrow: which files, columns and labels are read, and what is refused."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import contents, png, read, rows, sentence_of

from cifar_dist.data import sources
from cifar_dist.data.card_words import HARMLESS
from cifar_dist.data.sources.archives import TarTree
from cifar_dist.data.sources.table_readers import ArrowTable
from cifar_dist.errors import UserError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def metadata(names: list[str], label: str = "label", image: str = "image") -> dict[str, str]:
    features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def images(num: int, first: int = 0) -> pa.Array:
    """Pictures `first`, `first` + 1 and so on, in the Hugging Face layout."""
    return pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in range(first, first + num)], IMAGE)


def table(labels: Any, names: list[str] | None = None, first: int = 0, **columns: pa.Array) -> pa.Table:
    labels = labels if isinstance(labels, pa.Array) else pa.array(labels)
    made = pa.table({"image": images(len(labels), first), "label": labels, **columns})
    return made.replace_schema_metadata(metadata(names)) if names else made


def put(path: Path, content: pa.Table, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path, **options)
    return path


def parquet(root: Path | str, **options: Any) -> sources.Source:
    return sources.find_source("parquet", str(root), **options)


def classes(source: sources.Source, split: str = "train") -> list[str]:
    """The class of each row."""
    return [source.class_names[label] for label in source.splits[split]["label"].to_pylist()]


# Which files are read


LAYOUTS = {
    "hub": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"],
    "hub with checksums": [
        "data/train-00000-of-00002-0123456789abcdef.parquet",
        "data/train-00001-of-00002-fedcba9876543210.parquet",
        "data/test-00000-of-00001-00112233445566aa.parquet",
    ],
    "hub, one data set of a repository": [
        "cifar10/train-00000.parquet",
        "cifar10/train-1.parquet",
        "cifar10/test-0.parquet",
    ],
    "hub, converted": ["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"],
    "hub, converted in part": ["d/partial-train/0000.parquet", "d/partial-train/0001.parquet", "d/test/0000.parquet"],
    "plain": ["train.parquet", "train_more.parquet", "test.parquet"],
    "Spark": [
        "train.parquet/part-00000-ab.parquet",
        "train.parquet/part-00001-cd.parquet",
        "test.parquet/part-0.parquet",
    ],
    "upper case": ["Train-0.parquet", "Train-1.parquet", "TEST.parquet"],
    "sets": ["trainset/train-0.parquet", "trainset/train-1.parquet", "testset/test.parquet"],
    "names of sets": ["trainset-0.parquet", "trainset-1.parquet", "testset.parquet"],
    "words": ["my training 1.parquet", "my training 2.parquet", "evaluation.parquet"],
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_the_splits_come_from_the_names_of_the_files(tmp_path: Path, names: list[str], kind: str):
    for i, name in enumerate(names):
        put(tmp_path / name, table([0, 1, 1], first=3 * i))
    (tmp_path / "README.md").write_text("a card")
    source = sources.find_source(kind, str(tmp_path))
    assert source.class_names == ["0", "1"]
    found = {split: [(r.path, r.label, r.encoded) for r in rows(source, split)] for split in source.splits}
    wanted = [(f"{i}.png", int(i % 3 > 0), png(i)) for i in range(9)]
    assert found == {"train": wanted[:6], "test": wanted[6:]}
    assert source.drawn == []
    assert [out.path for out in source.left_out] == ["README.md"]
    assert source.layout == "3 table files, pictures in column image, labels in column label"


def test_a_validation_split_is_read(tmp_path: Path):
    for i, split in enumerate(("train", "validation", "test")):
        put(tmp_path / "data" / f"{split}-00000-of-00001.parquet", table([0, 1], first=2 * i))
    found = parquet(tmp_path)
    assert {split: [r.path for r in rows(found, split)] for split in found.splits} == {
        "train": ["0.png", "1.png"],
        "validation": ["2.png", "3.png"],
        "test": ["4.png", "5.png"],
    }


@pytest.mark.parametrize("name", ["pictures.parquet", "0000.parquet", "default/0000.parquet"])
def test_files_that_name_no_split_are_train(tmp_path: Path, name: str):
    put(tmp_path / name, table([0, 1] * 5))
    for path in (tmp_path, tmp_path / name):
        source = parquet(path)
        assert source.drawn == ["test"]
        assert contents(source) == {f"{i}.png": (png(i), str(i % 2)) for i in range(10)}


def test_rows_of_several_groups_and_batches_keep_their_labels(tmp_path: Path):
    """The drawn splits take rows here and there."""
    put(tmp_path / "train-0.parquet", table([i % 3 for i in range(100)]), row_group_size=40)
    put(tmp_path / "train-1.parquet", table([i % 3 for i in range(50)], first=100), row_group_size=7)
    source = parquet(tmp_path, test_fraction=0.3)
    labels = [str(i % 3) for i in (*range(100), *range(50))]
    assert contents(source) == {f"{i}.png": (png(i), labels[i]) for i in range(150)}
    assert len(source.splits["test"]) == 45


def save_to_disk(folder: Path, tables: list[pa.Table]) -> None:
    """As the library `datasets` saves a data set."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, content in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, content.schema) as writer:
            writer.write_table(content, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


def test_what_datasets_saved_to_disk_is_read(tmp_path: Path):
    names = ["cat", "dog"]
    save_to_disk(tmp_path / "train", [table([0, 1, 0], names), table([1, 1, 0], names, first=3)])
    save_to_disk(tmp_path / "test", [table([1, 0], names, first=6)])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "train" / "cache-0123456789abcdef.arrow").write_bytes(b"a leftover of datasets")
    source = sources.find_source("folder", str(tmp_path))
    labels = [0, 1, 0, 1, 1, 0, 1, 0]
    assert contents(source) == {f"{i}.png": (png(i), names[label]) for i, label in enumerate(labels)}
    assert {split: len(items) for split, items in source.splits.items()} == {"train": 6, "test": 2}
    left_out = {out.path for out in source.left_out}
    assert {"dataset_dict.json", "train/state.json", "train/cache-0123456789abcdef.arrow"} <= left_out


@pytest.mark.parametrize("format", ["stream", "file"])
def test_an_arrow_file_alone_is_train(tmp_path: Path, format: str):
    made = table([0, 1] * 5, ["a", "b"])
    opened = pa.ipc.new_stream if format == "stream" else pa.ipc.new_file
    with pa.OSFile(str(tmp_path / "data-00000-of-00001.arrow"), "wb") as file, opened(file, made.schema) as writer:
        writer.write_table(made, max_chunksize=3)
    source = sources.find_source("folder", str(tmp_path))
    assert contents(source) == {f"{i}.png": (png(i), "ab"[i % 2]) for i in range(10)}


# Columns


@pytest.mark.parametrize("name", ["image", "img", "picture", "jpg", "whatever"])
@pytest.mark.parametrize("kind", [IMAGE, pa.struct([("bytes", pa.large_binary())]), pa.binary(), pa.large_binary()])
def test_pictures_are_found_by_name_or_type(tmp_path: Path, name: str, kind: pa.DataType):
    is_struct = pa.types.is_struct(kind)
    has_path = is_struct and kind.num_fields == 2
    values = [
        {"bytes": png(i), "path": f"{i}.png"} if has_path else {"bytes": png(i)} if is_struct else png(i)
        for i in range(4)
    ]
    put(tmp_path / "train.parquet", pa.table({name: pa.array(values, kind), "label": [0, 1, 0, 1], "id": ["x"] * 4}))
    source = parquet(tmp_path, test_fraction=0.5)
    assert contents(source) == {f"{i}.png" if has_path else f"row-{i}": (png(i), str(i % 2)) for i in range(4)}


def test_of_several_columns_that_fit_the_usual_name_or_the_named_column_is_read(tmp_path: Path):
    made = table([0, 1, 0, 1], depth=images(4, first=10), coarse_label=pa.array([7, 7, 8, 8]))
    put(tmp_path / "train.parquet", made)
    source = parquet(tmp_path, test_fraction=0.5)
    assert contents(source) == {f"{i}.png": (png(i), str(i % 2)) for i in range(4)}
    assert "(other columns that could be: coarse_label; --label-column)" in source.layout
    source = parquet(tmp_path, image_column="depth", label_column="coarse_label", test_fraction=0.5)
    assert contents(source) == {f"{i}.png": (png(i), str(7 + (i > 11))) for i in range(10, 14)}


def test_a_column_declared_as_the_label_is_read_whatever_its_name(tmp_path: Path):
    made = pa.table({"image": images(4), "kind": [0, 1, 0, 1], "weight": [1.0, 2.0, 3.0, 4.0]})
    put(tmp_path / "train.parquet", made.replace_schema_metadata(metadata(["a", "b"], label="kind")))
    assert parquet(tmp_path, test_fraction=0.5).class_names == ["a", "b"]


def test_columns_may_differ_in_name_between_files(tmp_path: Path):
    put(tmp_path / "train.parquet", table([0, 1]))
    put(tmp_path / "test.parquet", table([0, 1], first=2).rename_columns(["picture", "label"]))
    if (sentence := sentence_of(lambda: contents(parquet(tmp_path)))) is not None:
        assert str(tmp_path / "test.parquet") in sentence
        return
    assert contents(parquet(tmp_path)) == {f"{i}.png": (png(i), str(i % 2)) for i in range(4)}


# Labels


@pytest.mark.parametrize(
    ("labels", "class_names", "found"),
    [
        (pa.array(["dog", "cat", "dog", "cat"]), ["cat", "dog"], "dog cat dog cat"),
        (pa.array(["dog", "cat", "dog", "cat"], pa.large_string()), ["cat", "dog"], "dog cat dog cat"),
        (pa.array(["dog", "cat", "dog", "cat"]).dictionary_encode(), ["cat", "dog"], "dog cat dog cat"),
        (pa.array([10, 9, 10, 9]).dictionary_encode(), ["9", "10"], "10 9 10 9"),
        (pa.array([True, False, True, False]), ["false", "true"], "true false true false"),
        (pa.array([True, True, False, False]), ["false", "true"], "true true false false"),
        (pa.array([1.0, 0.0, 1.0, 0.0], pa.float32()), ["0", "1"], "1 0 1 0"),
        (pa.array([9, 5, 9, 5], pa.uint8()), ["5", "9"], "9 5 9 5"),
        (pa.array([3, -5, 3, -5], pa.int16()), ["-5", "3"], "3 -5 3 -5"),
        (pa.array([2**50, 1, 2**50, 1]), ["1", str(2**50)], f"{2**50} 1 {2**50} 1"),
        (pa.array(["10", "9", "10", "9"]), ["9", "10"], "10 9 10 9"),
        (pa.array(["10", "x", "10", "x"]), ["10", "x"], "10 x 10 x"),
    ],
    ids=str,
)
@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_labels_of_any_type_become_classes(
    tmp_path: Path, labels: pa.Array, class_names: list[str], found: str, format: str
):
    made = table(labels)
    if format == "parquet":
        put(tmp_path / "train.parquet", made)
        put(tmp_path / "test.parquet", made)
    else:
        save_to_disk(tmp_path / "train", [made])
        save_to_disk(tmp_path / "test", [made])
    source = sources.find_source("folder", str(tmp_path))
    assert source.class_names == class_names
    assert classes(source) == classes(source, "test") == found.split()


def test_class_names_come_from_the_metadata_in_their_order(tmp_path: Path):
    put(tmp_path / "train.parquet", table([1, 0, 1, 0], ["dog", "cat"]))
    source = parquet(tmp_path, test_fraction=0.5)
    assert source.class_names == ["dog", "cat"]
    assert {path: name for path, (_, name) in contents(source).items()} == {
        f"{i}.png": ["cat", "dog"][i % 2] for i in range(4)
    }


def test_class_names_in_another_order_are_matched_by_name(tmp_path: Path):
    put(tmp_path / "train.parquet", table([0, 1, 2], ["dog", "cat", "emu"]))
    put(tmp_path / "test.parquet", table([0, 1, 2], ["emu", "dog", "cat"]))
    source = parquet(tmp_path)
    assert classes(source) == ["dog", "cat", "emu"]
    assert classes(source, "test") == ["emu", "dog", "cat"]


def test_class_names_without_pictures_are_dropped_and_told(tmp_path: Path):
    put(tmp_path / "train.parquet", table([0, 2], ["dog", "cat", "emu"]))
    put(tmp_path / "test.parquet", table([2], ["dog", "cat", "emu"]))
    source = parquet(tmp_path)
    assert (source.class_names, classes(source), classes(source, "test")) == (["dog", "emu"], ["dog", "emu"], ["emu"])
    assert source.notes == ["1 of the 3 class names have no pictures and are dropped: cat"]


@pytest.mark.parametrize(
    "label", [pa.scalar(-1), pa.scalar(None, pa.int64()), pa.scalar(""), pa.scalar(None, pa.string())], ids=str
)
def test_a_test_split_without_labels_is_left_out_and_told(tmp_path: Path, label: pa.Scalar):
    texts = pa.types.is_string(label.type)
    put(tmp_path / "train.parquet", table(["a", "b"] * 4 if texts else [0, 1] * 4))
    put(tmp_path / "test.parquet", table(pa.array([label.as_py()] * 3, label.type), first=20))
    source = parquet(tmp_path)
    assert source.notes == ["test is left out: its 3 rows have no labels"]
    assert source.drawn == ["test"]
    assert contents(source).keys() == {f"{i}.png" for i in range(8)}


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.float32()], ids=str)
def test_labels_of_minus_1_and_1_are_two_classes(tmp_path: Path, kind: pa.DataType):
    put(tmp_path / "train.parquet", table(pa.array([-1, 1, -1], kind)))
    put(tmp_path / "test.parquet", table(pa.array([1, -1], kind)))
    put(tmp_path / "val.parquet", table(pa.array([-1, -1], kind)))
    source = parquet(tmp_path)
    assert source.class_names == ["-1", "1"]
    assert (classes(source), classes(source, "test")) == (["-1", "1", "-1"], ["1", "-1"])
    assert source.notes == ["validation is left out: its 2 rows have no labels"]


@pytest.mark.parametrize("test", [{}, {"label": pa.nulls(3)}, {"id": pa.array([7, 8, 9])}], ids=["none", "nulls", "id"])
@pytest.mark.parametrize("format", ["parquet", "arrow"])
@pytest.mark.parametrize("options", [{}, {"label_column": "label"}], ids=["by itself", "named"])
def test_a_test_table_without_a_column_of_labels_is_left_out_and_told(
    tmp_path: Path, test: dict[str, Any], format: str, options: dict[str, str]
):
    made = {"train": table([0, 1] * 4), "test": pa.table({"image": images(3, 20), **test})}
    for split, content in made.items():
        if format == "parquet":
            put(tmp_path / f"{split}.parquet", content)
        else:
            save_to_disk(tmp_path / split, [content])
    source = parquet(tmp_path, **options)
    assert source.notes == ["test is left out: its 3 rows have no labels"]
    assert source.drawn == ["test"]
    assert contents(source).keys() == {f"{i}.png" for i in range(8)}


@pytest.mark.parametrize("name", ["id", "index", "idx", "__index_level_0__", "uid"])
def test_a_column_of_row_numbers_is_no_label(tmp_path: Path, name: str):
    made = pa.table({"image": images(4), name: [0, 1, 2, 3]})
    put(tmp_path / "train.parquet", made)
    with pytest.raises(UserError, match="which holds the labels"):
        parquet(tmp_path)
    put(tmp_path / "train.parquet", made.append_column("kind", pa.array(["a", "b", "a", "b"])))
    assert parquet(tmp_path, test_fraction=0.5).class_names == ["a", "b"]
    assert parquet(
        put(tmp_path / "x" / "train.parquet", table([0, 1] * 2).rename_columns(["image", name])), label_column=name
    )


# What is refused


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, None, 1], [0], "train.parquet row 1 has the label None, which names no class"),
        ([0, 1, -1], [0], "train.parquet row 2 has the label -1, which names no class"),
        (["a", "", "b"], ["a"], "train.parquet row 1 has the label , which names no class"),
        ([0, 1], [0, -1], "test.parquet row 1 has the label -1, which names no class"),
        ([0, 1], [0, 2], "ROOT/test.parquet has pictures of class '2', and train has none; add some to train, or"),
        ([0, 1], ["a", "b"], "ROOT/test.parquet has pictures of class 'a', and train has none"),
        (
            [0.0, 0.5],
            [0.0],
            r"train.parquet row 1 has the label 0.5; a class needs a whole number below 2\^63 or a text",
        ),
        ([0.0, float("nan"), 1.0], [0.0], "train.parquet row 1 has the label nan; a class needs a whole number"),
        ([0.0, float("inf"), 1.0], [0.0], "train.parquet row 1 has the label inf; a class needs a whole number"),
        ([0.0, 1e300, 1.0], [0.0], r"train.parquet row 1 has the label 1e\+300; a class needs a whole number"),
        (pa.array([0, 1 << 63], pa.uint64()), [0], "train.parquet row 1 has the label 9223372036854775808; a class"),
        ([0, 0], [0], "ROOT holds 1 classes, '0'; a classifier needs 2 or more"),
        (pa.array([], pa.int64()), [0], "ROOT/test.parquet has pictures of class '0', and train has none"),
        (
            pa.array([[0], [1]]),
            [0],
            "train.parquet: column label holds lists; a classifier needs one label a picture; name",
        ),
    ],
    ids=str,
)
def test_labels_that_name_no_class_are_refused(tmp_path: Path, train: Any, test: Any, message: str):
    put(tmp_path / "train.parquet", table(train))
    put(tmp_path / "test.parquet", table(test))
    with pytest.raises(UserError, match=message.replace("ROOT", str(tmp_path))) as caught:
        parquet(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def two_pictures() -> pa.Table:
    return pa.table({"left": images(2), "right": images(2), "label": [0, 1]})


def two_labels() -> pa.Table:
    return pa.table({"image": images(2), "first": [0, 1], "second": [0, 1]})


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (
            two_pictures(),
            {},
            r"has the columns left \(struct\), right \(struct\), label \(int64\); which holds the pictures",
        ),
        (two_labels(), {}, "which holds the labels"),
        (
            table([0, 1]),
            {"label_column": "lable"},
            r"has no column lable \(did you mean label\?\); --label-column is one of",
        ),
        (table([0, 1]), {"image_column": "label"}, "column label holds no pictures; those are binary, or a struct"),
        (
            table([0, 1]),
            {"label_column": "image"},
            "column image holds no labels; those are numbers, texts or booleans",
        ),
        (table([0, 1]).drop_columns("label"), {}, "which holds the labels"),
        (table([0, 3], ["a", "b"]), {}, "row 1 has the label 3; 0 to 1 are valid"),
        (table([0, -2], ["a", "b"]), {}, "row 1 has the label -2; 0 to 1 are valid"),
        (table([0, 1], ["a", "a"]), {}, "class names are no list of names"),
    ],
    ids=range(9),
)
def test_columns_that_do_not_fit_are_refused(tmp_path: Path, made: pa.Table, options: dict[str, str], message: str):
    path = put(tmp_path / "train.parquet", made)
    with pytest.raises(UserError, match=message) as caught:
        parquet(tmp_path, **options)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a/train-0.parquet", "b/train-0.parquet"],
            "ROOT holds several data sets: a, b; name the folder of one of them",
        ),
        (["train-0.parquet", "b/train-0.parquet"], "ROOT holds several data sets: "),
        (
            ["a/train-0.parquet", "b/test-0.parquet"],
            "ROOT/b/test-0.parquet belongs to another data set than ROOT/a/train-0.parquet, which has no test",
        ),
        (["test-0.parquet"], "ROOT holds no table of train, only test-0.parquet"),
        (["_metadata.parquet"], "ROOT holds no Parquet or Arrow files"),
    ],
)
def test_files_whose_names_do_not_say_enough_are_refused(tmp_path: Path, names: list[str], message: str):
    for name in names:
        put(tmp_path / name, table([0, 1]))
    with pytest.raises(UserError, match=message.replace("ROOT", str(tmp_path))):
        parquet(tmp_path)


def test_tables_that_are_not_read_are_told(tmp_path: Path):
    """One is of a data set without train, the other names no split."""
    for i, name in enumerate(("a/train-0.parquet", "a/test-0.parquet", "b/test-0.parquet", "a/extra-0.parquet")):
        put(tmp_path / name, table([0, 1], first=2 * i))
    source = parquet(tmp_path)
    assert {out.path: out.kind for out in source.left_out} == dict.fromkeys(
        ("a/extra-0.parquet", "b/test-0.parquet"), "tables that are not read"
    )
    assert "tables that are not read" not in HARMLESS
    assert source.notes == [
        "a/extra-0.parquet is left out: its name says no split",
        "b/test-0.parquet is left out: it is of another data set",
    ]
    assert contents(source).keys() == {f"{i}.png" for i in range(4)}


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-30], lambda c: c[: len(c) // 2], lambda _: b"", lambda _: b"text" * 99]
)
@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_damaged_tables_are_named(tmp_path: Path, damage: Any, format: str):
    if format == "parquet":
        path = put(tmp_path / "train.parquet", table([0, 1]))
    else:
        save_to_disk(tmp_path / "train", [table([0, 1] * 9)])
        path = tmp_path / "train" / "data-00000-of-00001.arrow"
    path.write_bytes(damage(path.read_bytes()))
    if format == "arrow" and path.stat().st_size > 1000:  # a stream has no footer: what is cut off is noticed when read
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=f"{path} is not a readable {format.capitalize()} file"):
        rows(parquet(tmp_path))


def test_a_stream_cut_off_between_two_batches_is_noticed(tmp_path: Path):
    made = table([0, 1] * 4)
    with pa.OSFile(str(tmp_path / "data-0.arrow"), "wb") as file, pa.ipc.new_stream(file, made.schema) as writer:
        writer.write_table(made.slice(0, 4))
        whole_batches = file.tell()
        writer.write_table(made.slice(4))
    path = tmp_path / "data-0.arrow"
    path.write_bytes(path.read_bytes()[:whole_batches])
    with pytest.raises(UserError, match=f"{path} is not a readable Arrow file"):
        rows(parquet(tmp_path, test_fraction=0.5))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, r"row 1 is empty \(zero bytes\)"),
        ({"bytes": None, "path": None}, r"row 1 is empty \(zero bytes\)"),
        ({"bytes": b"", "path": "1.png"}, "row 1"),
        (
            {"bytes": None, "path": "/etc/passwd"},
            "row 1 names the file /etc/passwd and holds no bytes; store the pictures",
        ),
        ({"bytes": b"text", "path": "1.png"}, "row 1 is no"),
    ],
)
def test_a_bad_picture_is_named_by_file_and_row_and_can_be_skipped(tmp_path: Path, image: Any, message: str):
    values = pa.array([{"bytes": png(0), "path": "0.png"}, image, {"bytes": png(2), "path": "2.png"}], IMAGE)
    path = put(tmp_path / "train.parquet", pa.table({"image": values, "label": [0, 1, 1]}))
    put(tmp_path / "test.parquet", table([0, 1]))
    source = parquet(tmp_path)
    with pytest.raises(UserError, match=f"{path} {message}.*--skip-bad"):
        read(source)
    found, about = read(source, skip_bad=True)
    assert [row.path for row in found] == ["0.png", "2.png"]
    ((bad),) = about.bad
    assert bad["label"] == 1


def test_metadata_that_cannot_be_read_is_refused(tmp_path: Path):
    put(tmp_path / "train.parquet", table([0, 1]).replace_schema_metadata({"huggingface": "{"}))
    with pytest.raises(UserError, match=r"train.parquet has Hugging Face metadata that cannot be read"):
        parquet(tmp_path)


# How much is read


class Counting(io.BytesIO):
    """A file that counts the bytes that are read."""

    num_read = 0

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.num_read += len(content)
        return content


def large_pictures(num: int, num_bytes: int = 50_000) -> pa.Array:
    return pa.array([{"bytes": bytes([i]) * num_bytes, "path": f"{i}.png"} for i in range(num)], IMAGE)


def arrow_file(made: pa.Table, format: str = "stream", rows: int = 3, **options: Any) -> bytes:
    buffer = io.BytesIO()
    opener = pa.ipc.new_stream if format == "stream" else pa.ipc.new_file
    with opener(buffer, made.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(made, max_chunksize=rows)
    return buffer.getvalue()


LABELS = {
    "numbers": pa.array([4, 1, None, 3] * 5),
    "texts": pa.array(["a", "", None, "long " * 9] * 5),
    "booleans": pa.array([True, False, None, True] * 5),
    "a dictionary": pa.array(["a", "b", None, "c"] * 5).dictionary_encode(),
}
OTHERS = {
    "lists": pa.array([[1, 2], None, [], [3]] * 5),
    "fixed": pa.array([[1, 2]] * 20, pa.list_(pa.int8(), 2)),
    "nulls": pa.nulls(20),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("options", [{}, {"compression": "lz4"}], ids=["plain", "lz4"])
@pytest.mark.parametrize("format", ["stream", "file"])
def test_labels_and_pictures_of_arrow_files_are_found(format: str, options: dict[str, str], label: str, other: str):
    pictures = large_pictures(20, 100)
    made = pa.table({"other": OTHERS[other], "label": LABELS[label], "image": pictures})
    content = arrow_file(made, format, **options)
    table = ArrowTable(io.BytesIO(content))
    labels, sizes = table.labels_and_sizes("label", "image")
    assert labels.to_pylist() == LABELS[label].to_pylist()
    assert len(sizes) == 20
    for places in (table.find_places(), None):
        table.places = places
        found = dict[int, Any]()
        for first, batch in table.batches("image", np.array([4, 5, 13])):
            found |= {first + i: value for i, value in enumerate(batch.to_pylist())}
        assert [found[row] for row in (4, 5, 13)] == pictures.take(pa.array([4, 5, 13])).to_pylist()


@pytest.mark.parametrize("format", ["stream", "file"])
def test_labels_of_an_arrow_file_are_read_without_the_pictures(format: str):
    made = pa.table({"image": large_pictures(40), "label": [i % 2 for i in range(40)]})
    file = Counting(arrow_file(made, format))
    labels, sizes = ArrowTable(file).labels_and_sizes("label", "image")
    assert labels.to_pylist() == made["label"].to_pylist()
    assert 50_000 < sizes.min() < sizes.max() + 1 < 50_100
    assert file.num_read < 150_000


@pytest.mark.parametrize("format", ["stream", "file"])
def test_a_part_of_an_arrow_file_is_read_without_what_lies_before_it(format: str):
    made = pa.table({"image": large_pictures(40), "label": [i % 2 for i in range(40)]})
    file = Counting(arrow_file(made, format))
    table = ArrowTable(file)
    table.find_places()
    before = file.num_read
    ((first, batch),) = table.batches("image", np.array([30, 31]))
    assert (first, batch.to_pylist()) == (30, made["image"].to_pylist()[30:33])
    assert file.num_read - before < 200_000


def test_a_second_stream_behind_the_first_is_refused(tmp_path: Path):
    content = arrow_file(table([0, 1] * 4))
    (tmp_path / "data-0.arrow").write_bytes(content + content)
    with pytest.raises(UserError, match=r"data-0.arrow is not a readable Arrow file: it holds data behind its end"):
        parquet(tmp_path)


def test_any_damaged_byte_of_an_arrow_file_is_survived(tmp_path: Path):
    content = arrow_file(table([0, 1] * 4))
    path = tmp_path / "data-0.arrow"
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        sentence_of(lambda: [read() for read in all_reads(parquet(tmp_path, test_fraction=0.5))])


def test_a_path_that_is_not_utf_8_is_told(tmp_path: Path):
    paths = pa.array([b"0.png", b"\xff", b"2.png", b"3.png"]).view(pa.string())
    made = pa.StructArray.from_arrays([pa.array([png(i) for i in range(4)], pa.binary()), paths], ["bytes", "path"])
    put(tmp_path / "train.parquet", pa.table({"image": made, "label": [0, 1, 0, 1]}))
    put(tmp_path / "test.parquet", table([0, 1]))
    with pytest.raises(UserError, match=r"train.parquet row 1 cannot be read: its path is not UTF-8"):
        rows(parquet(tmp_path))


def all_reads(source: sources.Source) -> Any:
    return source.reader.reads(source.splits["train"])


@pytest.mark.parametrize("format", ["stream", "file", "parquet"])
def test_a_table_in_a_tar_is_read_in_place(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TarTree, "read", None)
    made = table([0, 1] * 10)
    name = "train-0.parquet" if format == "parquet" else "train-0.arrow"
    content = put(tmp_path / name, made).read_bytes() if format == "parquet" else arrow_file(made, format)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for path, data in {"notes.txt": b"x", name: content}.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    source = parquet(tmp_path / "a.tar", test_fraction=0.5)
    assert {path: int(name) for path, (_, name) in contents(source).items()} == {f"{i}.png": i % 2 for i in range(20)}
