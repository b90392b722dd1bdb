"""Tables of labels beside pictures, CSV, TSV and JSON lines: which rows are read, and what is refused."""

import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from prepared import contents, listed, numbered, png, write_tree

from cifar_dist.data import sources
from cifar_dist.errors import UserError

NAMES = [f"{i}.png" for i in range(6)]
LABELS = ["cat", "dog", "cat", "dog", "cat", "dog"]
WANTED = {name: (png(i), label) for i, (name, label) in enumerate(zip(NAMES, LABELS, strict=True))}


def labelled(root: Path | str, labels: str | Path | None = None, **options: Any) -> sources.Source:
    return sources.find_source("folder", str(root), labels=str(labels) if labels else None, **options)


def text(*lines: str) -> bytes:
    return "\n".join(lines).encode()


def joined(mark: str, header: str = "path,label") -> list[str]:
    return [line.replace(",", mark) for line in [header, *map(",".join, zip(NAMES, LABELS, strict=True))]]


def json_lines(path: str = "path", label: str = "label") -> list[str]:
    return [json.dumps({path: name, label: c, "more": [1]}) for name, c in zip(NAMES, LABELS, strict=True)]


# What is read


TABLES = {
    "commas": ("l.csv", text(*joined(","))),
    "semicolons": ("l.csv", text(*joined(";"))),
    "tabs": ("l.tsv", text(*joined("\t"))),
    "tabs in a file named csv": ("l.csv", text(*joined("\t"))),
    "Windows": ("l.csv", b"\xef\xbb\xbf" + "\r\n".join(joined(",")).encode() + b"\r\n"),
    "no header": ("l.csv", text(*joined(",")[1:])),
    "quotes": ("l.csv", text("path,label", *(f'"{n}","{c}"' for n, c in zip(NAMES, LABELS, strict=True)))),
    "empty lines": ("l.csv", text(*joined(","), "", "")),
    "spaces": ("l.csv", text("path, label", *(f"{n}, {c}" for n, c in zip(NAMES, LABELS, strict=True)))),
    "Kaggle": ("l.csv", text("image_id,label", *(f"{i},{c}" for i, c in enumerate(LABELS)))),
    "other names": ("l.csv", text(*joined(",", "file_name,class"))),
    "upper case": ("l.csv", text(*joined(",", "Filename,Label"))),
    "another column": ("l.csv", text(*joined(",", "id,diagnosis"))),
    "leading ./": ("l.csv", text("path,label", *(f"./{n},{c}" for n, c in zip(NAMES, LABELS, strict=True)))),
    "JSON lines": ("l.jsonl", text(*json_lines())),
    "JSON lines of datasets": ("l.jsonl", text(*json_lines("file_name"))),
    "ndjson with a mark": ("l.ndjson", b"\xef\xbb\xbf" + text(*json_lines(), "")),
    "upper suffix": ("L.CSV", text(*joined(","))),
}


@pytest.mark.parametrize(("name", "content"), TABLES.values(), ids=TABLES)
def test_every_way_to_write_a_table_is_read(tmp_path: Path, name: str, content: bytes):
    root = write_tree(tmp_path / "pictures", numbered(*NAMES))
    (tmp_path / name).write_bytes(content)
    source = labelled(root, tmp_path / name, test_fraction=0.34)
    assert source.class_names == ["cat", "dog"]
    assert contents(source) == WANTED
    assert source.left_out == []
    assert source.layout == f"labels in {tmp_path / name}"


def test_columns_are_named_by_options(tmp_path: Path):
    root = write_tree(tmp_path, numbered(*NAMES))
    lines = [f"{n},{c},{i},x" for i, (n, c) in enumerate(zip(NAMES, LABELS, strict=True))]
    (tmp_path / "l.csv").write_bytes(text("a,b,c,d", *lines))
    options = {"image_column": "a", "label_column": "b", "test_fraction": 0.34}
    assert contents(labelled(root, "l.csv", **options)) == WANTED


def test_numbers_are_sorted_as_numbers(tmp_path: Path):
    root = write_tree(tmp_path, numbered(*NAMES))
    (tmp_path / "l.csv").write_bytes(text("path,label", *(f"{n},{(10, 9)[i % 2]}" for i, n in enumerate(NAMES))))
    source = labelled(root, "l.csv", test_fraction=0.34)
    assert source.class_names == ["9", "10"]
    assert contents(source) == {n: (png(i), str((10, 9)[i % 2])) for i, n in enumerate(NAMES)}


def test_a_column_of_splits_is_read(tmp_path: Path):
    root = write_tree(tmp_path, numbered(*NAMES))
    splits = ["train", "Train", "val", "dev", "test", "TEST"]
    lines = [",".join(row) for row in zip(NAMES, LABELS, splits, strict=True)]
    (tmp_path / "l.csv").write_bytes(text("path,label,split", *lines))
    source = labelled(root, "l.csv")
    found = list(zip(NAMES, LABELS, strict=True))
    assert listed(source) == {"train": found[:2], "validation": found[2:4], "test": found[4:]}
    assert source.drawn == []


@pytest.mark.parametrize("where", ["labels.csv", "sub/labels.csv"])
@pytest.mark.parametrize("relative", ["to the table", "to the root"])
def test_paths_are_relative_to_the_table_or_the_root(tmp_path: Path, where: str, relative: str):
    folder = where.rpartition("/")[0]
    names = [f"{folder}/{name}".lstrip("/") for name in NAMES]
    root = write_tree(tmp_path, numbered(*names))
    named = NAMES if relative == "to the table" else names
    (root / where).write_bytes(text("path,label", *(f"{n},{c}" for n, c in zip(named, LABELS, strict=True))))
    wanted = {name: value for name, value in zip(names, WANTED.values(), strict=True)}
    for labels in (where, root / where):  # below --path, or anywhere
        source = labelled(root, labels, test_fraction=0.34)
        assert contents(source) == wanted
        assert source.left_out == []


def test_pictures_that_the_table_does_not_name_are_left_out_and_told(tmp_path: Path):
    root = write_tree(tmp_path, numbered(*NAMES, "more.png", "notes.txt"))
    (tmp_path / "l.csv").write_bytes(text(*joined(",")))
    source = labelled(root, "l.csv", test_fraction=0.34)
    assert contents(source) == WANTED
    assert {out.path: out.kind for out in source.left_out} == {
        "more.png": "pictures that no table of labels names",
        "notes.txt": "notes and other files",
    }


def test_a_split_without_labels_is_left_out_and_told(tmp_path: Path):
    root = write_tree(tmp_path, numbered(*NAMES))
    lines = [f"{n},{c},train" for n, c in zip(NAMES[:4], LABELS, strict=False)] + [f"{n},,test" for n in NAMES[4:]]
    (tmp_path / "l.csv").write_bytes(text("path,label,split", *lines))
    source = labelled(root, "l.csv", test_fraction=0.5)
    assert source.notes == [f"test is left out: its {len(NAMES) - 4} rows have no labels"]
    assert source.drawn == ["test"]
    assert sum(len(items) for items in source.splits.values()) == 4


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "labels.csv", "labels.jsonl"])
@pytest.mark.parametrize("folder", ["", "images/"])
def test_a_table_of_a_usual_name_is_found_by_itself(tmp_path: Path, name: str, folder: str):
    names = [f"{folder}{n}" for n in NAMES]
    content = [json.dumps({"file_name": n, "label": c}) for n, c in zip(names, LABELS, strict=True)]
    if name.endswith(".csv"):
        content = ["file_name,label", *(f"{n},{c}" for n, c in zip(names, LABELS, strict=True))]
    source = labelled(write_tree(tmp_path, {**numbered(*names), name: text(*content)}), test_fraction=0.34)
    assert contents(source) == dict(zip(names, WANTED.values(), strict=True))
    assert source.layout == f"labels in {tmp_path / name}"


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_table_in_each_folder_of_a_split_is_found_by_itself(tmp_path: Path, name: str):
    """As the library `datasets` keeps such data sets."""
    files = numbered(*(f"{split}/{n}" for split in ("train", "val", "test") for n in NAMES))
    for split in ("train", "val", "test"):
        rows = zip(NAMES, LABELS, strict=True)
        lines = [json.dumps({"file_name": n, "label": c}) for n, c in rows]
        if name.endswith(".csv"):
            lines = ["file_name,label", *(f"{n},{c}" for n, c in zip(NAMES, LABELS, strict=True))]
        files[f"{split}/{name}"] = text(*lines)
    source = labelled(write_tree(tmp_path, files))
    assert {split: sorted(part) for split, part in listed(source).items()} == {
        split: [(f"{folder}/{n}", c) for n, c in zip(NAMES, LABELS, strict=True)]
        for split, folder in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    assert source.drawn == []


@pytest.mark.parametrize("name", ["metadata.csv", "train/metadata.csv"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_table_below_a_folder_around_all_is_found(tmp_path: Path, name: str, kind: str):
    folder = name.rpartition("/")[0]
    files = {f"mydata/{folder}/{n}".replace("//", "/"): content for n, content in numbered(*NAMES).items()}
    files[f"mydata/{name}"] = text(*joined(",", "file_name,label"))
    root = write_tree(tmp_path / "pictures", {**files, "notes.txt": b"x"})
    if kind == "zip":
        root = tmp_path / f"{name.replace('/', '')}.zip"
        with zipfile.ZipFile(root, "w") as archive:
            for path, content in {**files, "notes.txt": b"x"}.items():
                archive.writestr(path, content)
    source = labelled(root, test_fraction=0.34)
    assert {path.rpartition("/")[2]: found for path, found in contents(source).items()} == WANTED
    assert source.layout.endswith("metadata.csv, all in mydata/")
    assert [out.path for out in source.left_out] == ["notes.txt"]


def test_the_columns_of_a_table_found_by_itself_are_named_by_options(tmp_path: Path):
    lines = ["file_name,fine,coarse", *(f"{n},x{i},{c}" for i, (n, c) in enumerate(zip(NAMES, LABELS, strict=True)))]
    root = write_tree(tmp_path, {**numbered(*NAMES), "metadata.csv": text(*lines)})
    assert contents(labelled(root, label_column="coarse", test_fraction=0.34)) == WANTED


@pytest.mark.parametrize(
    "table", [None, ["file_name", "8.png", "9.png"], ["file_name,label", "8.png,", "9.png,"]], ids=str
)
def test_a_folder_of_test_pictures_without_labels_is_left_out_and_told(tmp_path: Path, table: list[str] | None):
    """Beside train/metadata.csv: without a table, without a column of labels, or without any label in it."""
    files = {f"train/{n}": content for n, content in numbered(*NAMES).items()}
    files |= {"train/metadata.csv": text(*joined(",", "file_name,label")), "test/8.png": png(8), "test/9.png": png(9)}
    if table:
        files["test/metadata.csv"] = text(*table)
    source = labelled(write_tree(tmp_path, files), test_fraction=0.34)
    assert {path.rpartition("/")[2]: found for path, found in contents(source).items()} == WANTED
    (note,) = source.notes
    assert note.startswith("test is left out: its 2 rows" if table else "test/ is left out: no table of labels names")
    assert source.drawn == ["test"]


def test_class_folders_of_test_are_not_left_out_beside_a_table_of_train(tmp_path: Path):
    files = {f"train/{n}": content for n, content in numbered(*NAMES).items()}
    files |= {
        "train/metadata.csv": text(*joined(",", "file_name,label")),
        **numbered("test/cat/9.png", "test/dog/9.png"),
    }
    with pytest.raises(UserError, match=r"train/0\.png lies in no class folder"):
        labelled(write_tree(tmp_path, files))


@pytest.mark.parametrize("start", ["{root}/", "pictures/"])
def test_paths_may_begin_with_the_folder(tmp_path: Path, start: str):
    root = write_tree(tmp_path / "pictures", numbered(*NAMES))
    lines = [f"{start.format(root=root)}{n},{c}" for n, c in zip(NAMES, LABELS, strict=True)]
    write_tree(tmp_path, {"l.csv": text("path,label", *lines)})
    assert contents(labelled(root, tmp_path / "l.csv", test_fraction=0.34)) == WANTED


@pytest.mark.parametrize("name", ["fold", "set"])
def test_a_column_of_numbers_is_no_column_of_splits(tmp_path: Path, name: str):
    lines = [f"{n},{c},{i % 3}" for i, (n, c) in enumerate(zip(NAMES, LABELS, strict=True))]
    root = write_tree(tmp_path, {**numbered(*NAMES), "l.csv": text(f"path,label,{name}", *lines)})
    assert contents(labelled(root, "l.csv", test_fraction=0.34)) == WANTED


@pytest.mark.parametrize(
    ("labels", "class_names"),
    [
        (["0.0", "1.0"], ["0", "1"]),
        (["0.0", "1"], ["0", "1"]),
        (["--1", "2"], ["--1", "2"]),
        (["9" * 5000, "2"], ["2", "9" * 5000]),
        (["-1", "1"], ["-1", "1"]),
    ],
    ids=range(5),
)
def test_odd_texts_are_labels(tmp_path: Path, labels: list[str], class_names: list[str]):
    lines = [f"{n},{labels[i % 2]}" for i, n in enumerate(NAMES)]
    root = write_tree(tmp_path, {**numbered(*NAMES), "l.csv": text("path,label", *lines)})
    assert labelled(root, "l.csv", test_fraction=0.34).class_names == class_names


def test_large_numbers_in_json_are_labels(tmp_path: Path):
    lines = [json.dumps({"path": n, "label": 10 ** (30 * (i % 2))}) for i, n in enumerate(NAMES)]
    root = write_tree(tmp_path, {**numbered(*NAMES), "l.jsonl": text(*lines)})
    assert labelled(root, "l.jsonl", test_fraction=0.34).class_names == ["1", str(10**30)]


def test_class_folders_are_not_overruled_by_a_table_beside_them(tmp_path: Path):
    names = [f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(2)]
    source = labelled(write_tree(tmp_path, {**numbered(*names), "labels.csv": text("path,label")}), test_fraction=0.5)
    assert source.layout == "folders train/CLASS/*"


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("labels", ["labels.csv", None])
def test_a_table_in_an_archive(tmp_path: Path, kind: str, labels: str | None):
    root = write_tree(tmp_path / "files", {**numbered(*NAMES), "labels.csv": text(*joined(","))})
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(root.iterdir()):
                archive.write(file, file.name)
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            archive.add(root, ".")
    assert contents(labelled(path, labels, test_fraction=0.34)) == WANTED


def test_a_table_elsewhere_for_an_archive(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in numbered(*NAMES).items():
            archive.writestr(name, content)
    (tmp_path / "l.csv").write_bytes(text(*joined(",")))
    assert contents(labelled(tmp_path / "a.zip", tmp_path / "l.csv", test_fraction=0.34)) == WANTED


# What is refused


def test_a_name_without_its_suffix_that_two_pictures_have_is_refused(tmp_path: Path):
    root = write_tree(tmp_path / "pictures", numbered("0.jpg", "0.png", "1.png"))
    (tmp_path / "l.csv").write_bytes(text("image_id,label", "0,cat", "1,dog"))
    with pytest.raises(UserError, match=f"{tmp_path}/l.csv line 2 names 0"):
        labelled(root, tmp_path / "l.csv", test_fraction=0.34)


REFUSED = {
    "a missing picture": (
        [*joined(","), "9.png,cat"],
        "line 8 names 9.png, and no such picture is below --path; correct",
    ),
    "a path outside": ([*joined(","), "../secret.png,cat"], "line 8 names ../secret.png, and no such picture"),
    "an absolute path": ([*joined(","), "/etc/passwd,cat"], "line 8 names /etc/passwd, and no such picture"),
    "a row twice": (
        [*joined(","), "0.png,cat"],
        "line 8 names 0.png again, as line 2 of .* does; name each picture once",
    ),
    "a contradiction": ([*joined(","), "0.png,dog"], "line 8 names 0.png as 'dog', and line 2 of .* as 'cat'"),
    "one picture by two paths": ([*joined(","), "./0.png,dog"], "line 8 names ./0.png as 'dog'"),
    "a row too short": ([*joined(","), "5.png"], "line 8 has 1 values for 2 columns"),
    "a row too long": ([*joined(","), "5.png,cat,1"], "line 8 has 3 values for 2 columns"),
    "no label": ([*joined(","), "5.png,"], "line 8 has no label"),
    "no path": ([*joined(","), ",cat"], "line 8 has no path"),
    "no rows": (["path,label"], "has no rows"),
    "nothing": ([""], "has no rows"),
    "a column twice": (["path,label,label", "0.png,a,b"], "names a column twice: path, label, label"),
    "no column of paths": (["x,y,label", "0.png,1,cat"], "has the columns x, y, label; which holds the paths"),
    "no column of labels": (["path,x,y", "0.png,1,2"], "has the columns x, y; which holds the labels"),
    "one class": (["path,label", "0.png,cat", "1.png,cat"], "holds 1 classes, 'cat'"),
    "an unknown split": (
        ["path,label,split", "0.png,cat,trian"],
        r"line 2 has the split 'trian' \(did you mean train\?\)",
    ),
    "no train": (["path,label,split", "0.png,cat,val"], "names no row of train; its splits are validation"),
    "an open quote": (["path,label", '"0.png,cat'], "is no CSV"),
}


@pytest.mark.parametrize(("lines", "message"), REFUSED.values(), ids=REFUSED)
def test_a_table_that_does_not_fit_is_refused_by_its_line(tmp_path: Path, lines: list[str], message: str):
    root = write_tree(tmp_path / "pictures", numbered(*NAMES))
    write_tree(tmp_path, {"l.csv": text(*lines), "secret.png": png(77)})
    with pytest.raises(UserError, match=message) as caught:
        labelled(root, tmp_path / "l.csv")
    assert str(caught.value).startswith(str(tmp_path / "l.csv"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.jsonl", b'{"path": "0.png", "label": "cat"}\n[1]', "line 2 is no JSON object such as"),
        ("l.jsonl", b'{"path": "0.png", "label"', "line 1 is no JSON"),
        ("l.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("l.jsonl", b'{"path": "0.png", "label": "a"}\n{"path": "1.png"}', "line 2 has no label"),
        ("l.jsonl", b'{"path": "0.png", "label": [1]}\n{"path": "1.png", "label": [2]}', "label"),
        ("l.jsonl", b'{"path": "0.png", "label": {"a": 1}}\n{"path": "1.png", "label": "b"}\n', "l.jsonl"),
        ("l.jsonl", b'{"path": "0.png", "label": 0.5}\n{"path": "1.png", "label": 1}', "0.5"),
        ("l.jsonl", b'{"path": "0.png", "label": Infinity}\n{"path": "1.png", "label": 1}', "label inf"),
        ("l.jsonl", b'{"path": "0.png", "label": 1e99}\n{"path": "1.png", "label": 1}', r"label 1e\+99"),
        ("l.csv", "path,label\n0.png,café".encode("latin-1"), "is not UTF-8 .* save it as UTF-8"),
        ("l.csv", "path,label\n0.png,cat".encode("utf-16"), "is not UTF-8"),
        ("l.txt", b"path,label\n0.png,cat", "is no table of labels; --labels names a .csv, .tsv or .jsonl file"),
        ("0.png", b"", "is no table of labels"),
    ],
    ids=range(13),
)
def test_what_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes, message: str):
    root = write_tree(tmp_path / "pictures", numbered(*NAMES))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        labelled(root, tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_table_that_is_not_there_is_refused(tmp_path: Path):
    root = write_tree(tmp_path, numbered(*NAMES))
    with pytest.raises(UserError, match=r"there is no file no.csv, neither here nor below --path"):
        labelled(root, "no.csv")


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path):
    root = write_tree(tmp_path / "pictures", numbered(*NAMES))
    lines = joined(",")
    (tmp_path / "a.csv").write_bytes(text(*lines))
    (tmp_path / "b.csv").write_bytes(text(lines[0], *reversed(lines[1:])))
    one, other = (labelled(root, tmp_path / f"{name}.csv", test_fraction=0.34) for name in "ab")
    assert one.class_names == other.class_names
    assert contents(one) == contents(other)
