"""Folders of pictures as people have them: what is read with which label, what is left out, what is refused."""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from prepared import contents, listed, numbered, png, read, write_tree

from cifar_dist.data import sources
from cifar_dist.data.card_words import HARMLESS
from cifar_dist.data.sources.formats import RAW_SUFFIXES, SUFFIXES
from cifar_dist.data.sources.names import NOTES, PICTURES
from cifar_dist.data.sources.told import found_lines
from cifar_dist.data.sources.trees import FolderTree
from cifar_dist.errors import UserError

TRAIN = [f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(2)]
TEST = ["test/cat/0.png", "test/dog/0.png"]


def folder(root: Path | str, **options: Any) -> sources.Source:
    return sources.find_source("folder", str(root), **options)


def left_out(source: sources.Source) -> dict[str, str]:
    return {out.path: out.kind for out in source.left_out}


def by_second(*names: str) -> list[tuple[str, str]]:
    """The class of SPLIT/CLASS/..., for each name."""
    return [(name, name.split("/")[1]) for name in names]


# What is read


def test_splits_and_classes_come_from_the_folders(tmp_path: Path):
    source = folder(write_tree(tmp_path, numbered(*TRAIN, *TEST)))
    assert source.class_names == ["cat", "dog"]
    assert listed(source) == {"train": by_second(*TRAIN), "test": by_second(*TEST)}
    assert (source.drawn, source.left_out, source.notes) == ([], [], [])
    assert source.layout == "folders train/CLASS/*, test/CLASS/*"
    assert contents(source) == {name: (png(i), name.split("/")[1]) for i, name in enumerate([*TRAIN, *TEST])}


def test_labels_follow_the_sorted_class_folders(tmp_path: Path):
    names = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("ant", "Zebra", "bee") for i in "21"]
    source = folder(write_tree(tmp_path, numbered(*names)))
    assert source.class_names == ["Zebra", "ant", "bee"]
    assert listed(source)["test"] == by_second(*(f"test/{name}/{i}.png" for name in source.class_names for i in "12"))


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Val", "VALIDATION"])
def test_a_validation_split_is_read_by_its_usual_names(tmp_path: Path, name: str):
    names = [f"{name}/cat/0.png", f"{name}/dog/0.png"]
    source = folder(write_tree(tmp_path, numbered(*TRAIN, *TEST, *names)))
    assert listed(source) == {"train": by_second(*TRAIN), "validation": by_second(*names), "test": by_second(*TEST)}
    assert source.drawn == []


@pytest.mark.parametrize("name", ["test", "testing", "eval", "evaluation", "Test"])
@pytest.mark.parametrize("train", ["train", "training", "Train"])
def test_train_and_test_are_read_by_their_usual_names(tmp_path: Path, name: str, train: str):
    names = [f"{name}/cat/0.png", f"{train}/cat/0.png", f"{train}/dog/0.png"]
    source = folder(write_tree(tmp_path, numbered(*names)))
    assert listed(source) == {"train": by_second(*names[1:]), "test": by_second(names[0])}


def test_with_validation_only_the_test_split_is_drawn_from_train(tmp_path: Path):
    val = ["val/cat/0.png", "val/dog/0.png"]
    source = folder(write_tree(tmp_path, numbered(*TRAIN, *val)), test_fraction=0.5)
    found = listed(source)
    assert list(found) == ["train", "validation", "test"]
    assert found["validation"] == by_second(*val)
    assert sorted(found["train"] + found["test"]) == sorted(by_second(*TRAIN))
    assert [name for _, name in found["test"]] == ["cat", "dog"]
    assert source.drawn == ["test"]


def test_classes_without_a_split_folder(tmp_path: Path):
    names = [f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(10)]
    source = folder(write_tree(tmp_path, numbered(*names)))
    found = listed(source)
    assert sorted(found["train"] + found["test"]) == [(name, name.split("/")[0]) for name in names]
    assert {split: len(part) for split, part in found.items()} == {"train": 16, "test": 4}
    assert source.layout == "folders CLASS/*"


def test_a_missing_test_split_is_drawn_by_class_with_the_seed(tmp_path: Path):
    names = [f"train/{c}/{i:02d}.png" for c, n in (("a", 20), ("b", 10)) for i in range(n)]
    root = write_tree(tmp_path, dict.fromkeys(names, png(0)))

    def drawn(seed: int, fraction: float = 0.2) -> dict[str, list[tuple[str, str]]]:
        return listed(folder(root, test_fraction=fraction, seed=seed))

    first = drawn(seed=0)
    assert [[c for _, c in first["test"]].count(name) for name in "ab"] == [4, 2]
    assert sorted(first["train"] + first["test"]) == by_second(*names)
    assert drawn(seed=0) == first
    assert drawn(seed=1)["test"] != first["test"]
    assert len(drawn(seed=0, fraction=0.5)["test"]) == 15


def test_subfolders_of_a_class_belong_to_it_and_equal_names_are_kept_apart(tmp_path: Path):
    train = [f"train/{c}/{site}1.png" for c in ("cat", "dog") for site in ("", "site_a/", "site_b/deep/")]
    source = folder(write_tree(tmp_path, numbered(*train, *TEST)))
    assert sorted(listed(source)["train"]) == sorted(by_second(*train))
    assert source.layout == "folders train/CLASS/**, test/CLASS/*"
    assert contents(source) == {name: (png(i), name.split("/")[1]) for i, name in enumerate([*train, *TEST])}


def test_a_folder_around_all_may_have_the_word_of_a_split_in_its_name(tmp_path: Path):
    source = folder(write_tree(tmp_path, numbered(*(f"my test data/{name}" for name in [*TRAIN, *TEST]))))
    assert source.layout == "folders train/CLASS/*, test/CLASS/*, all in my test data/"


@pytest.mark.parametrize("wrapper", ["data", "a/b/c"])
@pytest.mark.parametrize("names", [[*TRAIN, *TEST], ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]], ids=len)
def test_folders_around_all_are_looked_through(tmp_path: Path, wrapper: str, names: list[str]):
    files = numbered(*names)
    plain = folder(write_tree(tmp_path / "plain", files))
    wrapped = folder(write_tree(tmp_path / "wrapped", {f"{wrapper}/{name}": c for name, c in files.items()}))
    assert (listed(wrapped), wrapped.layout) == (listed(plain), f"{plain.layout}, all in {wrapper}/")
    assert contents(wrapped) == contents(plain)


def test_a_split_folder_in_a_folder_of_its_name_is_looked_through(tmp_path: Path):
    """As archives are often unpacked: train.zip, with train/ in it, into train/."""
    names = [name.replace("train/", "train/train/") for name in TRAIN]
    source = folder(write_tree(tmp_path, numbered(*names, *TEST)))
    assert listed(source)["train"] == [(name, name.split("/")[2]) for name in names]
    assert source.class_names == ["cat", "dog"]


@pytest.mark.parametrize("name", ["test/0.png", "test/unknown/0.png", "Test/images/b/0.png", "test/Test/0.png"])
def test_a_test_split_without_labels_is_left_out_and_told(tmp_path: Path, name: str):
    source = folder(write_tree(tmp_path, numbered(*TRAIN, name)), test_fraction=0.5)
    assert left_out(source) == {name: "pictures without a label"}
    (note,) = source.notes
    assert note.startswith(f"{name.partition('/')[0]}/ is left out: its 1 pictures lie in no folder")
    assert note.endswith("so they have no labels")
    assert source.drawn == ["test"]


def test_a_class_may_be_missing_in_test(tmp_path: Path):
    source = folder(write_tree(tmp_path, numbered(*TRAIN, "test/dog/0.png")))
    assert listed(source)["test"] == by_second("test/dog/0.png")
    assert any("none of cat" in line for line in found_lines(source, str(tmp_path)))


@pytest.mark.parametrize("num_classes", [2, 13, 1000])
def test_any_number_of_classes(tmp_path: Path, num_classes: int):
    names = [f"train/c{c:04d}/{i}.png" for c in range(num_classes) for i in range(2)]
    source = folder(write_tree(tmp_path, dict.fromkeys(names, png(0))), test_fraction=0.5)
    assert source.class_names == [f"c{c:04d}" for c in range(num_classes)]
    assert {split: len(items) for split, items in source.splits.items()} == dict.fromkeys(
        ("train", "test"), num_classes
    )
    assert all(name.startswith(f"train/{label}/") for part in listed(source).values() for name, label in part)


def test_a_class_of_one_picture_stays_in_train(tmp_path: Path):
    source = folder(write_tree(tmp_path, numbered(*TRAIN, "train/emu/0.png")), test_fraction=0.5)
    assert ("train/emu/0.png", "emu") in listed(source)["train"]
    assert source.notes == ["1 of 3 classes have 1 image, so none for test, such as 'emu'"]


@pytest.mark.parametrize("name", ["katze ä 猫", "a b", "trainer", "0", "-1", "x.png"])
def test_a_class_may_have_any_name(tmp_path: Path, name: str):
    names = [f"train/{name}/0.png", f"train/zzz{name}/0.png", f"test/{name}/0.png"]
    assert listed(folder(write_tree(tmp_path, numbered(*names))))["train"] == by_second(*names[:2])


@pytest.mark.parametrize(
    ("train", "test"),
    [("seg_train/seg_train", "seg_test/seg_test"), ("train_images", "test-images"), ("TrainSet", "testset")],
)
def test_splits_are_known_by_words_between_other_signs(tmp_path: Path, train: str, test: str):
    names = [f"{train}/{c}/{i}.png" for c in ("cat", "dog") for i in range(2)]
    others = [f"{test}/cat/0.png", f"{test}/dog/0.png"]
    source = folder(write_tree(tmp_path, numbered(*names, *others)))
    assert {split: [path for path, _ in part] for split, part in listed(source).items()} == {
        "train": names,
        "test": others,
    }
    assert source.layout == f"folders {train}/CLASS/*, {test}/CLASS/*"
    assert "  classes    cat, dog" in found_lines(source, str(tmp_path))


def test_accents_are_compared_as_letters(tmp_path: Path):
    """macOS writes them as letters of their own."""
    names = [f"train/{c}/{i}.png" for c in ("caf\u00e9", "tea") for i in range(2)]
    test = "test/cafe\u0301/0.png"
    source = folder(write_tree(tmp_path, numbered(*names, test)))
    assert source.class_names == ["caf\u00e9", "tea"]
    assert listed(source)["test"] == [(test, "caf\u00e9")]


def test_class_folders_of_numbers_are_in_the_order_of_the_numbers(tmp_path: Path):
    names = [f"{split}/{c}/0.png" for split in ("train", "test") for c in range(12)]
    assert folder(write_tree(tmp_path / "a", numbered(*names))).class_names == [str(i) for i in range(12)]
    names = [f"{c}/{i}.png" for c in range(12) for i in range(2)]
    assert folder(write_tree(tmp_path / "b", numbered(*names))).class_names == [str(i) for i in range(12)]


@pytest.mark.parametrize("around", ["images", "Train"])
@pytest.mark.parametrize("classes", [["cat"], ["cat", "dog"]], ids=len)
def test_a_single_folder_in_a_split_is_looked_through_and_told(tmp_path: Path, around: str, classes: list[str]):
    names = [name.replace("train/", f"train/{around}/") for name in TRAIN]
    test = [f"test/{around}/{c}/0.png" for c in classes]
    source = folder(write_tree(tmp_path, numbered(*names, *test)))
    assert source.class_names == ["cat", "dog"]
    assert source.layout == f"folders train/{around}/CLASS/*, test/{around}/CLASS/*"
    assert {split: len(part) for split, part in listed(source).items()} == {"train": 4, "test": len(classes)}


def test_the_only_class_of_a_test_split_is_not_looked_through(tmp_path: Path):
    test = ["test/cat/left/0.png", "test/cat/right/0.png"]
    assert listed(folder(write_tree(tmp_path, numbered(*TRAIN, *test))))["test"] == by_second(*test)


# Files that are no pictures of the data set


def test_pictures_of_every_kind_that_has_a_sentence_are_pictures():
    assert {*RAW_SUFFIXES, *SUFFIXES} - NOTES <= PICTURES
    assert not PICTURES & NOTES
    assert UNKNOWN not in HARMLESS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("0.tga", bytes(50), "is a TGA file, which is not read"),
        ("0.dcm", bytes(128) + b"DICM", "is a DICOM file"),
        ("0.dds", b"DDS " + bytes(50), "is a DDS texture"),
        ("0.qoi", b"qoif" + bytes(50), "is a QOI file"),
        ("0.exr", b"v/1\1" + bytes(50), "is an OpenEXR file"),
        ("0.rw2", b"IIU\0" + bytes(50), "is a camera's raw file"),
        ("slice0", bytes(128) + b"DICM", "is a DICOM file"),
    ],
)
def test_pictures_of_kinds_that_are_not_read_are_bad_pictures(tmp_path: Path, name: str, content: bytes, message: str):
    source = folder(write_tree(tmp_path, {**numbered(*TRAIN, *TEST), f"train/cat/{name}": content}))
    with pytest.raises(UserError, match=message):
        read(source)


STRAY = "files of the system or of tools"
NOTE, OTHER, UNKNOWN = "notes and other files", "data files of another kind", "files of an unknown kind"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train/cat/.DS_Store", STRAY),
        ("train/cat/Thumbs.db", STRAY),
        ("train/cat/desktop.ini", STRAY),
        ("__MACOSX/train/cat/._0.png", STRAY),
        ("train/cat/._0.png", STRAY),
        (".git/x.png", STRAY),
        ("train/.ipynb_checkpoints/0.png", STRAY),
        ("train/cat/@eaDir/0.png", STRAY),
        ("README.md", NOTE),
        ("train/labels.csv", NOTE),
        ("train/cat/0.xml", NOTE),
        ("LICENSE", NOTE),
        ("train/cat/annotation.weird", UNKNOWN),
        ("train/cat/annotation", UNKNOWN),
        ("train.zip", OTHER),
        ("train/cat/features.npy", OTHER),
        ("train/cat/film.mp4", OTHER),
    ],
)
def test_what_is_no_picture_is_left_out_and_told(tmp_path: Path, name: str, kind: str):
    source = folder(write_tree(tmp_path, {**numbered(*TRAIN, *TEST), name: b"something else"}))
    assert listed(source) == {"train": by_second(*TRAIN), "test": by_second(*TEST)}
    assert left_out(source) == {name: kind}
    assert f"  left out   1 {kind}: {name}" in found_lines(source, str(tmp_path))


@pytest.mark.parametrize("name", ["train/cat/scan", "train/cat/picture.weird", "train/cat/v1.2"])
def test_a_picture_is_known_by_its_content_where_its_name_does_not_say(tmp_path: Path, name: str):
    source = folder(write_tree(tmp_path, {**numbered(*TRAIN, *TEST), name: png(99)}))
    assert contents(source)[name] == (png(99), "cat")
    assert source.left_out == []


def test_what_is_told_of_odd_file_names_has_no_control_characters(tmp_path: Path):
    source = folder(write_tree(tmp_path, {**numbered(*TRAIN), "a\x1b[31m\nb.txt": b"x"}))
    assert all(line.isprintable() for line in found_lines(source, str(tmp_path)))


# Links, pipes, names


def test_links_to_files_and_folders_are_followed(tmp_path: Path):
    root = write_tree(tmp_path / "root", numbered(*TRAIN))
    write_tree(tmp_path, {"elsewhere/0.png": png(50), "one.png": png(51)})
    (root / "train" / "emu").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "cat" / "linked.png").symlink_to(tmp_path / "one.png")
    found = contents(folder(root))
    assert found["train/emu/0.png"] == (png(50), "emu")
    assert found["train/cat/linked.png"] == (png(51), "cat")


@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_a_link_to_a_folder_above_it_is_refused(tmp_path: Path, target: str):
    root = write_tree(tmp_path, numbered(*TRAIN))
    (root / "train" / "cat" / "loop").symlink_to(target)
    with pytest.raises(UserError, match="train/cat/loop is a link to a folder above it; remove it"):
        folder(root)


@pytest.mark.parametrize("kind", ["broken link", "own link", "pipe"])
def test_what_cannot_be_read_is_named_and_can_be_skipped(tmp_path: Path, kind: str):
    root = write_tree(tmp_path, numbered(*TRAIN, *TEST))
    path = root / "train" / "cat" / "z.png"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("nowhere" if kind == "broken link" else path.name)
    source = folder(root)
    with pytest.raises(UserError, match=f"{path} cannot be read: .*--skip-bad"):
        read(source)
    rows, found = read(source, skip_bad=True)
    assert [row.path for row in rows] == TRAIN
    assert [bad["path"] for bad in found.bad] == ["train/cat/z.png"]


@pytest.mark.parametrize("name", ["train/emu", "train/cat/v1.2", "emu"])
def test_a_broken_link_that_may_stand_for_a_folder_is_refused(tmp_path: Path, name: str):
    root = write_tree(tmp_path, numbered(*TRAIN, "train/cat/deep/0.png"))
    (root / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=f"{root / name} is a broken link or no regular file, and may stand for"):
        folder(root)


def test_a_broken_link_beside_a_single_folder_is_refused(tmp_path: Path):
    root = write_tree(tmp_path, numbered("cat/left/0.png", "cat/right/0.png"))
    (root / "dog").symlink_to("nowhere")
    with pytest.raises(UserError, match=f"{root / 'dog'} is a broken link or no regular file"):
        folder(root)


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path):
    root = write_tree(tmp_path, numbered(*TRAIN))
    (root / "train" / "cat").joinpath(os.fsdecode(b"caf\xe9.png")).write_bytes(png(0))
    with pytest.raises(UserError, match=r"train/cat/caf.*\.png' is a name that is not UTF-8; rename it"):
        folder(root)


# What is refused


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0.png"], "ROOT/0.png lies in no class folder, so it has no label and would not be read; move it into one"),
        ([*TRAIN, "0.png"], "ROOT/0.png lies in no class folder"),
        ([*TRAIN, "train/0.png"], "ROOT/train/0.png lies in no class folder"),
        ([*TRAIN, *TEST, "test/0.png"], "ROOT/test/0.png lies in no class folder"),
        (["cat/0.png"], "ROOT holds 1 classes, 'cat'; a classifier needs 2 or more"),
        (["train/cat/0.png"], "ROOT holds 1 classes, 'cat'"),
        ([*TRAIN, "train/emu/"], "class 'emu' has no images in ROOT/train; add some or remove the folder"),
        (["cat/0.png", "dog/0.png", "emu/"], "class 'emu' has no images in ROOT; add some"),
        ([*TRAIN, "test/cat/0.png", "test/emu/0.png"], "class 'emu' is in ROOT/test but not in ROOT/train"),
        ([*TRAIN, "val/cat/0.png", "val/emu/0.png"], "class 'emu' is in ROOT/val but not in ROOT/train"),
        ([*TRAIN, "other/cat/0.png"], "ROOT/other would not be read, with its 1 pictures: beside train"),
        ([*TRAIN, "seg_pred/seg_pred/0.png"], "ROOT/seg_pred would not be read, with its 1 pictures: beside train"),
        (
            [*TRAIN, "test/CAT/0.png", "test/DOG/0.png"],
            "classes CAT, DOG are in ROOT/test but not in ROOT/train, whose classes are cat, dog; rename",
        ),
        ([*TRAIN, "test/CAT/0.png"], "class 'CAT' is in ROOT/test but not in ROOT/train"),
        (["car/0.png", "bus/0.png", "train/0.png"], "if train is a class, it needs another name"),
        (["car/0.png", "toy train/0.png"], "if toy train is a class, it needs another name"),
        (["caf\u00e9/0.png", "cafe\u0301/0.png"], "two folders of classes look the same"),
        (["cat/0.png", "dog/0.png", "emu/x.npy"], "class 'emu' has no images in ROOT; add some or remove the folder"),
        (["cat/0.png", "dog/0.png", "emu/scan"], "class 'emu' has no images in ROOT; add some or remove the folder"),
        (["train.zip", "test.zip"], "ROOT holds no pictures, but archives: test.zip, train.zip; unpack them, or name"),
        ([*TRAIN, "val/cat/0.png", "valid/cat/0.png"], "ROOT holds two folders for validation: val and valid; join"),
        ([*TRAIN, "Train/cat/9.png"], "ROOT holds two folders for train: Train and train; join them"),
        (["seg_test/cat/0.png", "seg_test/dog/0.png"], "ROOT holds a folder seg_test and none named train"),
        (["cat/site/0.png", "dog/scan"], "class 'dog' has no images in ROOT; add some or remove the folder"),
        (["cat/0.png", "test/0.png"], "ROOT holds a folder test and none named train"),
        (["val/cat/0.png", "val/dog/0.png"], "ROOT holds a folder val and none named train"),
        (
            [f"{c}/{s}/0.png" for c in ("cat", "dog") for s in ("train", "test")],
            r"the folders in ROOT \(cat, dog\) hold folders named train, .* put the split above the class",
        ),
        (["README.md"], "ROOT holds no pictures; --source folder reads SPLIT/CLASS/IMAGE or CLASS/IMAGE"),
        ([], "ROOT holds no pictures"),
        ([f"train/c{i}/0.png" for i in range(3)], "no class has 2 images or more, so no test split can be drawn"),
    ],
)
def test_a_folder_that_cannot_be_a_source_is_refused(tmp_path: Path, names: list[str], message: str):
    root = write_tree(tmp_path, {name: png(0) if name.endswith("g") else b"x" for name in names if name[-1] != "/"})
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True) if name.endswith("/") else None
    with pytest.raises(UserError, match=message.replace("ROOT", str(root))) as caught:
        folder(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [".gitkeep", ".DS_Store", "Thumbs.db", "notes.txt"])
def test_a_class_folder_that_holds_no_picture_is_refused_like_an_empty_one(tmp_path: Path, name: str):
    with pytest.raises(UserError, match="class 'emu' has no images in"):
        folder(write_tree(tmp_path, {**numbered(*TRAIN), f"train/emu/{name}": b""}))


@pytest.mark.parametrize(
    ("path", "message"), [(None, "needs --path"), ("", "needs --path"), ("no/where", "no/where does not exist")]
)
@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_no_such_path(source: str, path: str | None, message: str):
    with pytest.raises(UserError, match=message):
        sources.find_source(source, path)


@pytest.mark.parametrize("content", [b"", b"mine", b"x" * 5000])
def test_a_file_that_is_no_archive_and_no_table_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/?.*holds no pictures"):
        folder(tmp_path / "notes.txt")


def test_names_that_mean_something_in_a_uri_are_read_as_they_are(tmp_path: Path):
    names = ["my data", "w%41", "a#b", "c?d=1"]
    root = write_tree(tmp_path / "a b%20c" / "in", numbered(*(f"{n}/{i}.png" for n in names for i in range(3))))
    quoted = f"file://{quote(str(root.parent))}"
    for where in (quoted, f"{quoted}/in", f"{quoted}/in/"):
        assert contents(sources.find_source("folder", where)) == contents(sources.find_source("folder", str(root)))
    (root / "w%41" / "1.png").write_bytes(b"text")
    with pytest.raises(UserError, match=re.escape(f"{quoted}/in/w%2541/1.png is no image")):
        contents(sources.find_source("folder", f"{quoted}/in"))


def test_a_file_that_has_changed_since_it_was_listed_is_refused(tmp_path: Path):
    root = write_tree(tmp_path / "a", numbered(*(f"{c}/{i}.png" for c in "ab" for i in range(3))))
    source = sources.find_source("folder", str(root))
    (root / "a/0.png").write_bytes((root / "a/0.png").read_bytes() + b"more")
    with pytest.raises(UserError, match=r"a/0.png has changed while it was read; run the same command again"):
        contents(source)


def test_a_file_that_was_replaced_by_one_of_the_same_size_and_time_is_another(tmp_path: Path):
    root = write_tree(tmp_path / "a", numbered(*(f"{c}/{i}.png" for c in "ab" for i in range(3))))
    path, tree = root / "a/0.png", FolderTree(uri=str(root))
    before, info = tree.files().changed.tolist(), path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert [a == b for a, b in zip(before, tree.files().changed.tolist(), strict=True)] == [False] + [True] * 5


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["data/train.parquet", "logo.png"], "to read the tables, such as data/train.parquet, use --source parquet"),
        (
            ["data/train.parquet", "assets/a.png"],
            "to read the tables, such as data/train.parquet, use --source parquet",
        ),
        (
            ["train.parquet", *TRAIN],
            "tables such as train.parquet lie beside them; name --source parquet for the tables",
        ),
        (["data/0.parquet", *TRAIN], "tables such as data/0.parquet lie beside them"),
        (["hub/train/0.parquet", "cat/0.png", "dog/0.png"], "class 'hub' has no images .*use --source parquet"),
    ],
)
def test_pictures_beside_tables_are_refused(tmp_path: Path, names: list[str], message: str):
    with pytest.raises(UserError, match=message):
        folder(write_tree(tmp_path, dict.fromkeys(names, png(0))))


def test_a_table_in_a_class_folder_belongs_to_the_pictures(tmp_path: Path):
    source = folder(write_tree(tmp_path, {**numbered(*TRAIN, *TEST), "train/cat/features.parquet": b"x"}))
    assert left_out(source) == {"train/cat/features.parquet": OTHER}


@pytest.mark.parametrize("option", ["label_column", "image_column"])
def test_columns_have_no_effect_on_folders(tmp_path: Path, option: str):
    with pytest.raises(UserError, match="--image-column and --label-column are for tables; folders name their classes"):
        folder(write_tree(tmp_path, numbered(*TRAIN)), **{option: "x"})
