"""Archives: zip and tar read like the folder in them; damaged, forged and encrypted ones are refused."""

import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import contents, listed, numbered, png, read, sentence_of, write_tree

from cifar_dist.data import sources
from cifar_dist.data.sources import unpacking as unpacking_module
from cifar_dist.data.sources.archives import open_tree
from cifar_dist.data.sources.trees import FolderTree
from cifar_dist.errors import UserError

ROOT = Path(__file__).parents[2]
NAMES = [f"{split}/{c}/{i}.png" for split in ("train", "test") for c in ("cat", "dog") for i in range(2)]
FILES = numbered(*NAMES)


def source_of(path: Path | str, **options: Any) -> sources.Source:
    return sources.find_source("folder", str(path), **options)


def zipped(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


KINDS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "zip": zipped,
    "zip, stored": lambda path, files: zipped(path, files, zipfile.ZIP_STORED),
    "zip, bzip2": lambda path, files: zipped(path, files, zipfile.ZIP_BZIP2),
    "zip, lzma": lambda path, files: zipped(path, files, zipfile.ZIP_LZMA),
    "tar": tarred,
    "tar.gz": lambda path, files: tarred(path, files, "w:gz"),
    "tar.bz2": lambda path, files: tarred(path, files, "w:bz2"),
    "tar.xz": lambda path, files: tarred(path, files, "w:xz"),
}


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """A folder whose name no test had before: an archive is opened once by a process."""
    (tmp_path / uuid.uuid4().hex).mkdir()
    return next(tmp_path.iterdir())


# What is read


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("wrapper", ["", "data/", "./"])
def test_an_archive_is_read_like_the_folder_in_it(tmp_path: Path, make: Any, wrapper: str):
    """By its content: its name says nothing."""
    plain = source_of(write_tree(tmp_path / "plain", FILES))
    packed = source_of(make(tmp_path / "archive", {f"{wrapper}{name}": content for name, content in FILES.items()}))
    assert (listed(packed), packed.class_names) == (listed(plain), plain.class_names)
    assert packed.layout == plain.layout + (", all in data/" if wrapper == "data/" else "")
    assert contents(packed) == contents(plain) == {n: (png(i), n.split("/")[1]) for i, n in enumerate(NAMES)}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_what_macos_and_windows_add_to_an_archive_is_left_out_and_told(tmp_path: Path, make: Any):
    stray = {f"__MACOSX/{name.replace('.png', '')}/._0.png": b"\0\5\26\7" for name in NAMES[:2]}
    stray |= {"data/.DS_Store": b"x", "data/train/cat/Thumbs.db": b"x"}
    source = source_of(make(tmp_path / "a", {**{f"data/{name}": c for name, c in FILES.items()}, **stray}))
    assert listed(source) == listed(source_of(write_tree(tmp_path / "plain", FILES)))
    assert {out.kind for out in source.left_out} <= {"files of the system or of tools"}


@pytest.mark.parametrize("make", [zipped, tarred], ids=["zip", "tar"])
def test_folders_that_are_entries_of_their_own_are_no_pictures(tmp_path: Path, make: Any):
    path = make(tmp_path / "a", {})
    if make is zipped:
        with zipfile.ZipFile(path, "a") as archive:
            for name in ("train/", "train/cat/"):
                archive.mkdir(name)
            for name, content in FILES.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w") as archive:
            archive.add(write_tree(tmp_path / "files", FILES), ".")
    assert contents(source_of(path)).keys() == set(NAMES)


def test_tables_in_an_archive_are_read(tmp_path: Path):
    def table(first: int) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(
            pa.table({"image": [{"bytes": png(i)} for i in range(first, first + 4)], "label": [0, 1] * 2}), buffer
        )
        return buffer.getvalue()

    source = source_of(zipped(tmp_path / "a.zip", {"data/train-0.parquet": table(0), "data/test-0.parquet": table(4)}))
    assert {split: len(items) for split, items in source.splits.items()} == {"train": 4, "test": 4}
    rows, _ = read(source, "test")
    assert [(row.encoded, row.label) for row in rows] == [(png(4 + i), i % 2) for i in range(4)]


def test_a_hard_link_in_a_tar_is_a_file(tmp_path: Path):
    root = write_tree(tmp_path / "files", FILES)
    os.link(root / NAMES[0], root / "train/cat/again.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(root, ".")
    found = contents(source_of(tmp_path / "a.tar"))
    assert found["train/cat/again.png"] == found[NAMES[0]]


def test_a_symbolic_link_in_a_tar_is_read_or_told(tmp_path: Path):
    root = write_tree(tmp_path / "files", FILES)
    (root / "train/cat/link.png").symlink_to("0.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(root, ".")
    source = source_of(tmp_path / "a.tar")
    assert "train/cat/link.png" in {name for name, _ in listed(source)["train"]} | {out.path for out in source.left_out}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_an_archive_can_be_read_twice(tmp_path: Path, make: Any):
    path = make(tmp_path / "a", FILES)
    first = contents(source_of(path))
    assert contents(source_of(path)) == first


@pytest.mark.parametrize("make", [zipped, tarred], ids=["zip", "tar"])
def test_an_archive_that_was_replaced_is_read_anew(tmp_path: Path, make: Any):
    path = make(tmp_path / "a", FILES)
    contents(source_of(path))
    make(tmp_path / "b", {name: png(100 + i) for i, name in enumerate(NAMES)}).replace(path)
    assert contents(source_of(path)) == {n: (png(100 + i), n.split("/")[1]) for i, n in enumerate(NAMES)}


# Names that lead elsewhere


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", ["../evil.png", "train/../../evil.png", "train/cat/../../../evil.png", "{}/evil.png"])
def test_names_that_lead_elsewhere_write_nothing_and_are_not_read(tmp_path: Path, make: Any, name: str):
    inside = tmp_path / "in" / "side"
    inside.mkdir(parents=True)
    name = name.format(tmp_path / "out")
    path = make(inside / "a", {**FILES, name: png(99)})
    before = sorted(tmp_path.rglob("*"))
    if (sentence := sentence_of(lambda: contents(source_of(path)))) is not None:
        assert str(path) in sentence
    else:
        source = source_of(path)
        assert contents(source).keys() == set(NAMES)
        assert [out.path for out in source.left_out] == [name]
    assert sorted(tmp_path.rglob("*")) == before


UNPACK = """
import sys, os, signal
from cifar_dist.data.sources import find_source
source = find_source("folder", sys.argv[1])
(folder,) = os.listdir(os.environ["TMPDIR"])
print(*os.listdir(os.path.join(os.environ["TMPDIR"], folder)), source.reader.identity, sep="\\n")
if len(sys.argv) > 2:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def unpacking(path: Path, *words: str) -> list[str]:
    """The names of the unpacked files while a job reads an archive, and the identity of what it reads."""
    temporary = path.with_name("tmp")
    temporary.mkdir(exist_ok=True)
    command = [sys.executable, "-c", UNPACK, str(path), *words]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=not words)
    return done.stdout.splitlines()


def unpacked_files(path: Path) -> list[Path]:
    return [p for p in path.with_name("tmp").rglob("*") if p.is_file()]


def test_a_compressed_tar_leaves_nothing_in_the_temporary_folder(tmp_path: Path):
    path = KINDS["tar.gz"](tmp_path / "a.tgz", FILES)
    assert len(unpacking(path)) == 2
    assert unpacked_files(path) == []


def test_what_a_killed_job_has_unpacked_is_used_and_then_removed(tmp_path: Path):
    path = KINDS["tar.gz"](tmp_path / "a.tgz", FILES)
    name, identity = unpacking(path, "kill")
    (left,) = unpacked_files(path)
    before = left.stat().st_ino, left.stat().st_mtime_ns
    left.with_name(f"{name}.part-1234").write_bytes(b"half")
    left.with_name("unpacked-0.tar").write_bytes(b"of another archive")
    assert unpacking(path, "kill")[-1] == identity
    assert (left.stat().st_ino, left.stat().st_mtime_ns) == before
    KINDS["tar.gz"](path, {**FILES, "train/cat/9.png": png(9)})
    assert unpacking(path)[-1] != identity
    assert unpacked_files(path) == []


def test_an_unpacked_archive_stays_while_another_job_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = KINDS["tar.gz"](tmp_path / "a.tgz", FILES)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(unpacking_module, "default_folder", lambda: str(tmp_path / "tmp"))
    source = source_of(path)
    (file,) = unpacked_files(path)
    unpacking(path)
    assert unpacked_files(path) == [file]
    assert contents(source).keys() == set(NAMES)
    unpacking_module.let_go(file)
    assert unpacked_files(path) == []


def test_a_compressed_tar_has_the_same_identity_wherever_it_is_unpacked(tmp_path: Path):
    path = KINDS["tar.gz"](tmp_path / "a.tgz", FILES)
    assert source_of(path).reader.identity == unpacking(path)[-1]
    assert str(path) in source_of(path).reader.identity


def test_room_is_looked_for_before_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = KINDS["tar.gz"](tmp_path / "a.tgz", FILES)
    path.write_bytes(path.read_bytes()[:-4] + struct.pack("<I", 3 << 30))
    monkeypatch.setattr("cifar_dist.data.private.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 2 << 30))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=rf"unpacking {path} needs 3.00 GiB.*has 2.00 GiB free; make room, or set TMP"):
        source_of(path)


# What is refused


def headers(content: bytes) -> list[int]:
    """Where the zip's headers of files begin, in front of the files and in the directory."""
    return [i for i in range(len(content) - 4) if content[i : i + 4] in (b"PK\1\2", b"PK\3\4")]


def forged(path: Path, local: int, central: int, value: bytes) -> Path:
    """A zip whose headers have another value, in front of each file and in the directory."""
    content = bytearray(path.read_bytes())
    for start in headers(content):
        at = start + (central if content[start : start + 4] == b"PK\1\2" else local)
        content[at : at + len(value)] = value
    path.write_bytes(content)
    return path


def test_an_encrypted_zip_is_refused(tmp_path: Path):
    path = forged(zipped(tmp_path / "a.zip", FILES), 6, 8, b"\1\0")
    with pytest.raises(UserError, match=f"{path} is encrypted; unpack it, and name the folder"):
        source_of(path)


@pytest.mark.parametrize("size", [0, 1, 100, 2**20, 2**31, 2**32 - 2])
def test_forged_sizes_are_refused(tmp_path: Path, size: int):
    path = forged(zipped(tmp_path / "a.zip", FILES), 22, 24, struct.pack("<I", size))
    said = rf"{path}: train/cat/0.png (cannot be unpacked|has another size|is empty|has {size} bytes)"
    with pytest.raises(UserError, match=said):
        read(source_of(path))


def test_an_unknown_compression_is_refused(tmp_path: Path):
    path = forged(zipped(tmp_path / "a.zip", FILES), 8, 10, struct.pack("<H", 97))
    with pytest.raises(UserError, match=f"{path}: train/cat/0.png cannot be unpacked: .*compression"):
        read(source_of(path))


def test_a_changed_byte_is_seen_by_the_checksum(tmp_path: Path):
    path = zipped(tmp_path / "a.zip", FILES, zipfile.ZIP_STORED)
    content = path.read_bytes()
    at = content.index(b"IDAT") + 8
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(UserError, match=f"{path}: train/cat/0.png cannot be unpacked: Bad CRC-32"):
        read(source_of(path))


def test_a_zip_of_a_later_version_is_refused(tmp_path: Path):
    path = forged(zipped(tmp_path / "a.zip", FILES), 4, 6, b"\xff\0")
    with pytest.raises(UserError, match=f"{path} is no whole zip archive|{path}.*cannot be unpacked"):
        source_of(path)


def test_a_zip_that_lost_bytes_in_the_middle_is_refused(tmp_path: Path):
    path = zipped(tmp_path / "a.zip", FILES, zipfile.ZIP_STORED)
    content = path.read_bytes()
    path.write_bytes(content[:50] + content[150:])
    with pytest.raises(UserError, match=f"{path}.*cannot be unpacked|{path} is no whole zip archive"):
        contents(source_of(path))


def test_a_name_of_no_letters_in_a_zip_is_refused(tmp_path: Path):
    path = zipped(tmp_path / "a.zip", {**FILES, "Xrain/cat/9.png": png(9)})
    path.write_bytes(path.read_bytes().replace(b"Xrain/cat", b"\0rain/cat"))
    with pytest.raises(UserError, match=str(path)):
        contents(source_of(path))


@pytest.mark.parametrize("keep", [-30, 0.5, 0.02])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_an_archive_that_was_cut_off_is_refused(tmp_path: Path, kind: str, keep: float):
    path = KINDS[kind](tmp_path / f"a.{kind}", FILES)
    content = path.read_bytes()
    if kind == "tar":
        content = content.rstrip(b"\0")  # else the end is only zeros
    path.write_bytes(content[: keep if keep < 0 else int(len(content) * keep)])
    with pytest.raises(UserError, match=r"no whole|cannot be unpacked|ends too early|incomplete") as caught:
        read(source_of(path))
    assert str(path) in str(caught.value)


def test_a_tar_that_was_cut_off_between_two_files_is_refused(tmp_path: Path):
    path = tarred(tmp_path / "a.tar", {**FILES, "train/dog/9.png": png(9)})
    with tarfile.open(path) as archive:
        at = archive.getmember("train/dog/9.png").offset
    path.write_bytes(path.read_bytes()[:at])
    with pytest.raises(UserError, match=f"{path} is no whole tar archive"):
        source_of(path)


@pytest.mark.parametrize(
    "start", [b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\7\1\0", b"\x28\xb5\x2f\xfd"], ids=["7z", "rar", "zst"]
)
def test_archives_of_other_kinds_are_refused(tmp_path: Path, start: bytes):
    path = tmp_path / "a.7z"
    path.write_bytes(start + bytes(1000))
    with pytest.raises(UserError, match=str(path)):
        source_of(path)


def test_a_compressed_file_that_is_no_tar_is_refused(tmp_path: Path):
    import gzip

    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"text" * 1000))
    with pytest.raises(UserError, match=f"{path} is no tar archive; --path names a folder, or a zip or tar archive"):
        source_of(path)


@pytest.mark.parametrize("make", [zipped, tarred], ids=["zip", "tar"])
def test_an_empty_archive_is_refused(tmp_path: Path, make: Any):
    with pytest.raises(UserError, match="holds no pictures"):
        source_of(make(tmp_path / "a", {}))


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_bad_picture_in_an_archive_is_named_and_can_be_skipped(tmp_path: Path, make: Any):
    path = make(tmp_path / "a", {**FILES, "train/cat/bad.png": b"text"})
    source = source_of(path)
    with pytest.raises(UserError, match=f"{path}: train/cat/bad.png is no.*--skip-bad"):
        read(source)
    rows, found = read(source, skip_bad=True)
    assert [row.path for row in rows] == NAMES[:4]
    assert [bad["path"] for bad in found.bad] == ["train/cat/bad.png"]


def test_a_name_in_a_tar_that_is_not_utf_8_is_refused(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        for name, content in {**FILES, "train/cat/café.png": png(9)}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match=r"train/cat/caf.*\.png' is a name that is not UTF-8; rename it"):
        source_of(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_empty_class_folder_in_an_archive_is_refused_like_a_real_one(tmp_path: Path, kind: str):
    path = KINDS[kind](tmp_path / f"a.{kind}", FILES)
    if kind == "zip":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("train/emu/", b"")
    else:
        root = write_tree(tmp_path / "files", FILES)
        (root / "train/emu").mkdir()
        with tarfile.open(path, "w") as archive:
            archive.add(root, ".")
    with pytest.raises(UserError, match="class 'emu' has no images in"):
        source_of(path)


def test_archives_of_other_kinds_are_named(tmp_path: Path):
    (tmp_path / "a.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    with pytest.raises(UserError, match="is a 7z archive; zip and tar are read: unpack it"):
        source_of(tmp_path / "a.7z")


def test_files_around_a_single_folder_are_told(tmp_path: Path):
    root = write_tree(tmp_path, {f"data/{name}": content for name, content in FILES.items()} | {"notes.txt": b"x"})
    source = source_of(root)
    assert [(out.path, out.kind) for out in source.left_out] == [("notes.txt", "notes and other files")]


def test_two_files_of_one_name_in_a_zip_are_refused(tmp_path: Path):
    path = zipped(tmp_path / "a.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(NAMES[1], png(9))
    with pytest.raises(UserError, match=f"{path} holds two files named {NAMES[1]}; make it again"):
        source_of(path)


@pytest.mark.parametrize(
    ("num_zeros", "is_whole"), [(0, False), (511, False), (512, True), (1024, True), (70000, True)]
)
def test_a_tar_ends_with_a_block_of_zeros_or_more(tmp_path: Path, num_zeros: int, is_whole: bool):
    path = tarred(tmp_path / "a.tar", FILES)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    path.write_bytes(path.read_bytes()[:end] + bytes(num_zeros))
    sentence = sentence_of(lambda: source_of(path))
    assert sentence == (None if is_whole else f"{path} is no whole tar archive: its end is missing; copy it again")


def test_a_second_archive_behind_a_tar_is_refused(tmp_path: Path):
    path = tarred(tmp_path / "a.tar", FILES)
    path.write_bytes(path.read_bytes() + tarred(tmp_path / "b.tar", {"train/cat/9.png": png(9)}).read_bytes())
    with pytest.raises(UserError, match=f"{path} holds data behind its end, perhaps a second archive; unpack it"):
        source_of(path)


def test_links_in_a_tar_lead_through_links_and_to_folders(tmp_path: Path):
    root = write_tree(tmp_path / "files", {f"data/{name}": content for name, content in FILES.items()})
    write_tree(root, {"store/bird/1.png": png(71)})
    (root / "store/bird/2.png").symlink_to("../../data/train/cat/0.png")
    (root / "data/train/bird").symlink_to("../../store/hop")
    (root / "store/hop").symlink_to("bird")
    (root / "data/train/cat/link.png").symlink_to("again.png")
    (root / "data/train/cat/again.png").symlink_to("../bird/1.png")
    (root / "data/train/cat/loop.png").symlink_to("loop.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(root, ".")
    files = open_tree(str(tmp_path / "a.tar")).below("data/").files()
    plain = FolderTree(uri=str(root / "data")).files()
    assert files.names == plain.names
    assert files.sizes.tolist() == plain.sizes.tolist()
    assert files.sizes[files.names.index("train/cat/loop.png")] == -1


@pytest.mark.parametrize("target", ["..", ".", "../../data"])
def test_a_link_to_a_folder_above_it_in_a_tar_is_refused(tmp_path: Path, target: str):
    root = write_tree(tmp_path / "files", {f"data/{name}": content for name, content in FILES.items()})
    (root / "data/train/emu").symlink_to(target)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(root, ".")
    with pytest.raises(UserError, match=r"a.tar: data/train/emu is a link to a folder above it"):
        source_of(tmp_path / "a.tar")


def lattice(root: Path) -> Path:
    """Folders of two links each to the next one: few folders, and a million ways through them."""
    for level in range(20):
        (root / f"{level}").mkdir(parents=True)
        for link in "ab":
            (root / f"{level}" / link).symlink_to(f"../{level + 1}")
    write_tree(root, {"20/1.png": png(1)})
    return root


def test_links_that_lead_through_a_folder_in_many_ways_are_refused(tmp_path: Path):
    root = lattice(tmp_path / "files")
    with pytest.raises(UserError, match=f"more than 100 links lead to the folder {root}"):
        source_of(root)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(root, ".")
    with pytest.raises(UserError, match=r"a.tar: more than 100 links lead to the folder"):
        source_of(tmp_path / "a.tar")


@pytest.mark.parametrize("make", [zipped, tarred], ids=["zip", "tar"])
def test_files_of_unknown_kind_are_not_read_whole(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch):
    files = {"train/cat/picture": png(50), "train/cat/other": bytes(1 << 20)}
    path = make(tmp_path / "a", {**FILES, **files})
    kind = type(open_tree(str(path)))
    whole = kind.read

    def read_little(tree: Any, name: str, size: int, at: int) -> bytes:
        assert size <= 512
        return whole(tree, name, size, at)

    monkeypatch.setattr(kind, "read", read_little)
    monkeypatch.setattr(kind, "open", None)
    source = source_of(path)
    assert "train/cat/picture" in {name for name, _ in listed(source)["train"]}
    assert [out.path for out in source.left_out] == ["train/cat/other"]


@pytest.mark.parametrize("make", [zipped, tarred, write_tree], ids=["zip", "tar", "folder"])
def test_a_picture_of_more_than_2_gib_is_refused_before_it_is_read(tmp_path: Path, make: Any):
    path = make(tmp_path / "a", FILES)
    source = source_of(path)
    items = source.splits["train"]
    column = items.schema.get_field_index("num_bytes")
    items = items.set_column(column, "num_bytes", pa.array([1 << 31] * len(items), pa.int64()))
    with pytest.raises(UserError, match=r"train/cat/0.png has 2147483648 bytes; files of up to 2 GiB are read"):
        next(source.reader.reads(items))()
