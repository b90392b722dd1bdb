"""Parts of a data set: the same bytes in any number of processes and any order; what a kill leaves is used."""

import builtins
import contextlib
import errno
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_pictures import exif, jpeg_with
from PIL import Image
from prepared import numbered, png, sentence_of, write_tree
from watched_items import watched

from cifar_dist.data import making, parts, sources, store
from cifar_dist.data.card import read_card
from cifar_dist.data.manifest import read_manifest
from cifar_dist.data.processes import in_processes
from cifar_dist.data.store import PREPARING, Preparation, one_by_one, prepare
from cifar_dist.errors import UserError

ROOT = Path(__file__).parents[2]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def finished_parts(out: Path) -> list[Path]:
    return sorted((out / PREPARING).glob("part-*.json"))


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of few rows, so that a small data set has many parts."""
    monkeypatch.setattr(parts, "ROWS_PER_FILE", 13)


def saved(format: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (9, 12, 3), np.uint8)).convert(mode).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder of 66 pictures of all kinds, and what else lies in such folders."""
    files = numbered(*(f"{split}/{c}/{i}.png" for split in ("train", "test") for c in "ab" for i in range(15)))
    odd = {"gray.png": saved("PNG", "L"), "bmp.bmp": saved("BMP"), "turned.jpg": jpeg_with(exif(6))}
    odd |= {"gif.gif": saved("GIF"), "stray.jpg": saved("JPEG")[:20] + bytes(3) + saved("JPEG")[20:]}
    files |= {f"train/b/{name}": content for name, content in odd.items()}
    files |= {"train/a/bad.png": b"text", "train/b/bad.jpg": b"", "notes.txt": b"notes", "train/a/.DS_Store": b"x"}
    return write_tree(tmp_path / "mixed", files)


def folder(root: Path) -> sources.Source:
    return sources.find_source("folder", str(root))


def skipping(**options: Any) -> Preparation:
    return Preparation(skip_bad=True, max_bad_share=0.2, **options)


# The same bytes


WAYS: dict[str, Callable[..., Iterator[Any]]] = {
    "backwards": lambda found, uri, passed: one_by_one(found[::-1], uri, passed),
    **{f"in {n} processes": partial(in_processes, num_processes=n) for n in (1, 2, 3)},
}


@pytest.mark.parametrize("make_all", WAYS.values(), ids=WAYS)
def test_every_order_and_number_of_processes_gives_the_same_bytes(tmp_path: Path, mixed: Path, make_all: Any):
    shown: list[tuple[int, int]] = []
    prepare(folder(mixed), str(tmp_path / "one"), skipping())
    how = skipping(make_all=make_all, show=lambda done, bad: shown.append((done, bad)))
    prepare(folder(mixed), str(tmp_path / "other"), how)
    one = files_of(tmp_path / "one")
    assert sorted(one) == [
        "_left_out.jsonl",
        "_manifest.json",
        "data_card.json",
        *(f"test-{i:05d}.parquet" for i in range(3)),
        *(f"train-{i:05d}.parquet" for i in range(3)),
    ]
    assert files_of(tmp_path / "other") == one
    assert shown == sorted(shown)
    assert shown[-1] == (67, 2)


def test_shapes_are_the_same_in_processes(tmp_path: Path):
    for name, make_all in (("one", one_by_one), ("two", partial(in_processes, num_processes=2))):
        prepare(sources.shapes(60, 20), str(tmp_path / name), Preparation(make_all=make_all))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_part_for_another_process_holds_its_own_items_only(tmp_path: Path):
    import pickle

    source = watched(tmp_path / "log", num_train=2000)
    found = list(parts.parts_of(source, sources.Rules(), near_duplicates=False, skip_bad=False))
    sizes = [len(pickle.dumps(part.portable())) for part in found]
    assert max(sizes) < 5_000
    assert len(pickle.dumps(found[0])) > 50_000


# Sizes of files and groups


MIB = 1 << 20


@pytest.mark.parametrize(
    ("num_bytes", "bounds"),
    [
        ([0] * 20_001, [0, 10_000, 20_000, 20_001]),
        ([0] * 20_000, [0, 10_000, 20_000]),
        ([MIB] * 16, [0, 16]),  # too small to be divided
        ([MIB] * 32, [0, 16, 32]),
        ([MIB] * 33, [0, 11, 22, 33]),
        ([200 * MIB], [0, 1]),
        ([-1] * 5, [0, 5]),
        ([1], [0, 1]),
    ],
    ids=range(8),
)
def test_a_file_holds_so_many_rows_and_bytes(num_bytes: list[int], bounds: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "ROWS_PER_FILE", 10_000)
    assert parts.bounds_of(np.array(num_bytes)) == bounds


@pytest.mark.parametrize("num_gib", [1, 8, 100])
def test_a_file_of_a_large_data_set_holds_256_mib_at_most(num_gib: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "ROWS_PER_FILE", 10_000)
    bounds = parts.bounds_of(np.full(num_gib * 1024, MIB))
    assert max(np.diff(bounds)) <= 256
    least = max(24, 4 * num_gib)
    assert least <= len(bounds) - 1 <= 1.05 * least


def test_files_are_divided_evenly_whatever_the_sizes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "ROWS_PER_FILE", 1_000)
    monkeypatch.setattr(parts, "BYTES_PER_FILE", (10_000, 10_000))
    random = np.random.default_rng(0)
    for _ in range(300):
        sizes = random.integers(-1, random.choice([2, 100, 30_000]), random.integers(1, 4_000))
        bounds = parts.bounds_of(sizes)
        assert bounds[0] == 0
        assert bounds[-1] == len(sizes)
        assert (np.diff(bounds) > 0).all()
        assert (np.diff(bounds) <= 1_000).all()
        held = np.array([np.maximum(sizes[a:b], 0).sum() for a, b in itertools.pairwise(bounds)])
        assert (held <= 10_000 + sizes.max()).all()


def test_a_row_group_holds_so_many_rows_and_bytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(making, "BYTES_PER_GROUP", 8 * MIB)

    def lengths(sizes: list[int]) -> list[int]:
        rows = [making.Row(encoded=bytes(n), path="", label=0, encoding="PNG", height=1, width=1) for n in sizes]
        return [len(group) for group in making.groups(iter(rows))]

    assert lengths([1] * 2_001) == [1_000, 1_000, 1]
    assert lengths([3 * MIB] * 5) == [2, 2, 1]
    assert lengths([20 * MIB, 1, 1]) == [1, 2]
    assert lengths([]) == []


# Going on after an interruption


def prepared_of(log: Path) -> list[int]:
    """The pictures that were read, in order, and forgets them."""
    numbers = [int(line) for line in log.read_text().split()] if log.exists() else []
    log.unlink(missing_ok=True)
    return numbers


def fresh(tmp_path: Path, num_train: int = 60) -> dict[str, bytes]:
    prepare(watched(tmp_path / "fresh.log", num_train), str(tmp_path / "fresh"))
    return files_of(tmp_path / "fresh")


@pytest.mark.parametrize("num_processes", [0, 2], ids=["here", "in processes"])
def test_what_is_complete_is_not_read_again(tmp_path: Path, num_processes: int):
    log, out = tmp_path / "log", tmp_path / "out"
    make_all = partial(in_processes, num_processes=num_processes) if num_processes else one_by_one

    def stop(done: int, _bad: int) -> None:
        if done >= 40 and len(finished_parts(out)) >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(watched(log), str(out), Preparation(make_all=make_all, show=stop))
    before = finished_parts(out)
    assert len(before) >= 2
    kept = sum(json.loads(path.read_bytes())["file"]["num_rows"] for path in before)
    assert not [name for name in files_of(out) if name.endswith(".tmp")]
    prepared_of(log)
    shown: list[int] = []
    prepare(watched(log), str(out), Preparation(make_all=make_all, show=lambda done, _: shown.append(done)))
    read = prepared_of(log)
    assert len(read) == len(set(read)) == 69 - kept
    assert shown[-1] == 69
    assert files_of(out) == fresh(tmp_path)


def test_another_start_of_another_source_uses_nothing(tmp_path: Path):
    log, out = tmp_path / "log", tmp_path / "out"

    def stop(done: int, _bad: int) -> None:
        if done == 65:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(watched(log), str(out), Preparation(show=stop))
    prepared_of(log)
    source = watched(log)
    source.class_names[0] = "other"
    prepare(source, str(out))
    assert len(prepared_of(log)) == 69


@pytest.mark.parametrize("suffix", ["json", "parquet", "facts"])
@pytest.mark.parametrize("harm", ["cut", "empty", "gone"])
def test_a_damaged_part_is_made_again(tmp_path: Path, suffix: str, harm: str):
    log, out = tmp_path / "log", tmp_path / "out"

    def stop(done: int, _bad: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(watched(log), str(out), Preparation(show=stop))
    (part,) = finished_parts(out)
    path = part.with_suffix(f".{suffix}")
    path.unlink() if harm == "gone" else path.write_bytes(path.read_bytes()[:-9] if harm == "cut" else b"")
    prepared_of(log)
    prepare(watched(log), str(out))
    assert len(prepared_of(log)) == 69
    assert files_of(out) == fresh(tmp_path)


def test_a_process_that_is_killed_is_told_and_the_next_start_goes_on(tmp_path: Path):
    log, out = tmp_path / "log", tmp_path / "out"
    how = Preparation(make_all=partial(in_processes, num_processes=2))
    with pytest.raises(UserError, match=r"was killed, perhaps because memory was short; .* again .*--tasks"):
        prepare(watched(log, killing=58), str(out), how)
    assert {name.split("/")[0] for name in files_of(out)} <= {PREPARING}
    assert not (out / "_manifest.json").exists()
    kept = sum(json.loads(path.read_bytes())["file"]["num_rows"] for path in finished_parts(out))
    prepared_of(log)
    prepare(watched(log, killing=58), str(out), how)
    assert len(prepared_of(log)) == 69 - kept
    assert files_of(out) == fresh(tmp_path)


JOB = """
import sys
from functools import partial
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from watched_items import watched
from cifar_dist.data import parts
from cifar_dist.data.processes import in_processes
from cifar_dist.data.store import Preparation, prepare

parts.ROWS_PER_FILE = 13
how = Preparation(make_all=partial(in_processes, num_processes=2))
prepare(watched(Path(sys.argv[3]), waiting=45), sys.argv[4], how)
"""


def descendants(process: int) -> list[int]:
    children = [int(c) for c in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return [*children, *(inner for child in children for inner in descendants(child))]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_a_job_that_is_killed_ends_its_processes_and_the_next_one_goes_on(tmp_path: Path):
    log, out = tmp_path / "log", tmp_path / "out"
    job = subprocess.Popen([sys.executable, "-c", JOB, ROOT, ROOT / "tests" / "unit", log, out])
    processes: list[int] = []
    try:
        assert wait_until(lambda: len(finished_parts(out)) == 5)  # all but the one that waits
        processes = descendants(job.pid)
        assert len(processes) >= 3  # two that make parts, their parent
        job.send_signal(signal.SIGKILL)
        job.wait()
        assert wait_until(lambda: not any(map(is_running, processes)))
    finally:
        for process in (job.pid, *processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        job.wait()
    assert {name.split("/")[0] for name in files_of(out)} == {PREPARING}
    prepared_of(log)
    Path(f"{log}.go").touch()
    prepare(watched(log, waiting=45), str(out), Preparation(make_all=partial(in_processes, num_processes=2)))
    assert sorted(prepared_of(log)) == list(range(39, 52))
    assert files_of(out) == fresh(tmp_path)


# Preparing again


def test_a_picture_that_changed_is_read_again_with_its_part_only(tmp_path: Path):
    root = write_tree(
        tmp_path / "root",
        numbered(*(f"{s}/{c}/{i:02d}.png" for s in ("train", "test") for c in "ab" for i in range(13))),
    )
    out = str(tmp_path / "out")
    first, _ = prepare(folder(root), out)
    os.utime(root / "train" / "a" / "05.png", (1, 1))
    again, written = prepare(folder(root), out)  # another time, the same picture
    assert (again, written) == (first, False)
    (root / "train" / "a" / "05.png").write_bytes(png(999))
    with pytest.raises(UserError, match=r"already holds another data set|--overwrite"):
        prepare(folder(root), out)
    assert read_manifest(out) == first
    changed, written = prepare(folder(root), out, Preparation(overwrite=True))
    assert written
    kept = (
        [file["sha256"] for file in first.splits["train"]["files"]],
        [file["sha256"] for file in changed.splits["train"]["files"]],
    )
    assert [one == other for one, other in zip(*kept, strict=True)] == [False, True]


def test_an_equal_data_set_is_known_without_reading_a_picture(tmp_path: Path):
    log, out = tmp_path / "log", str(tmp_path / "out")
    first, _ = prepare(watched(log), out)
    prepared_of(log)
    assert prepare(watched(log), out) == (first, False)
    assert prepared_of(log) == []


def test_an_unchanged_data_set_has_no_leftovers(tmp_path: Path):
    log, out = tmp_path / "log", tmp_path / "out"
    prepare(watched(log), str(out))

    def stop(done: int, _bad: int) -> None:
        if done == 65:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(sources.shapes(60, 20), str(out), Preparation(overwrite=True, show=stop))
    prepare(watched(log), str(out))
    assert not (out / PREPARING).exists()


@pytest.mark.parametrize("content", [b"{", b"", b'{"format_version": 1}', b'{"format_version": 9}'])
def test_a_damaged_data_card_is_mended_or_its_remedy_named(tmp_path: Path, content: bytes):
    log, out = tmp_path / "log", tmp_path / "out"
    prepare(watched(log), str(out))
    before = files_of(out)
    (out / "data_card.json").write_bytes(content)
    if (sentence := sentence_of(lambda: prepare(watched(log), str(out)))) is not None:
        assert "--overwrite" in sentence
        return
    assert files_of(out) == before


def test_a_missing_data_card_is_made_again(tmp_path: Path):
    log, out = tmp_path / "log", tmp_path / "out"
    prepare(watched(log), str(out))
    before = files_of(out)
    (out / "data_card.json").unlink()
    prepare(watched(log), str(out))
    assert files_of(out) == before


# Bad pictures


def with_bad(root: Path, num_bad: int) -> Path:
    """100 pictures of each of two classes, some of the first one bad."""
    files = {
        f"train/{c}/{i:03d}.png": png(i) if c == "b" or i >= num_bad else b"text" for c in "ab" for i in range(100)
    }
    return write_tree(root, {**files, "test/a/1.png": png(1), "test/b/1.png": png(2)})


@pytest.mark.parametrize(
    ("num_bad", "share", "holds"),
    [(1, 0.01, True), (2, 0.01, False), (2, 0.02, True), (3, 0.02, False), (1, 0.0, False)],
)
def test_a_class_loses_at_most_the_allowed_share(tmp_path: Path, num_bad: int, share: float, holds: bool):
    source = folder(with_bad(tmp_path / "root", num_bad))
    how = Preparation(skip_bad=True, max_bad_share=share)
    if holds:
        assert prepare(source, str(tmp_path / "out"), how)[0].num_skipped == num_bad
        return
    message = (
        rf"class 'a' would lose {num_bad} of its 101 pictures, more than the share of {share:g} that --max-bad-share"
    )
    with pytest.raises(UserError, match=message) as caught:
        prepare(source, str(tmp_path / "out"), how)
    assert "root/train/a/000.png" in str(caught.value)
    assert "mend them, or raise --max-bad-share" in str(caught.value)
    assert not (tmp_path / "out" / "_manifest.json").exists()
    raised = Preparation(skip_bad=True, max_bad_share=0.5)
    assert prepare(source, str(tmp_path / "out"), raised)[0].num_skipped == num_bad


def test_without_skip_bad_the_first_bad_picture_stops_all(tmp_path: Path):
    source = folder(with_bad(tmp_path / "root", 3))
    prepare(source, str(tmp_path / "out"), Preparation(skip_bad=True, max_bad_share=0.1))
    with pytest.raises(UserError, match=r"train/a/000.png is no.*leave such files out with --skip-bad"):
        prepare(source, str(tmp_path / "out"))


def test_what_is_left_out_is_listed(tmp_path: Path, mixed: Path):
    out = tmp_path / "out"
    prepare(folder(mixed), str(out), skipping())
    lines = [json.loads(line) for line in (out / "_left_out.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["path"], line["split"], line["class"]) for line in lines] == [
        ("bad pictures", "train/a/bad.png", "train", "a"),
        ("bad pictures", "train/b/bad.jpg", "train", "b"),
        ("notes and other files", "notes.txt", "", ""),
        ("files of the system or of tools", "train/a/.DS_Store", "", ""),
    ]
    assert f"{mixed}/train/b/bad.jpg is empty (zero bytes)" in lines[1]["reason"]
    card = read_card(str(out), read_manifest(str(out)))
    assert {kind["kind"]: kind["num_files"] for kind in card["left_out"]["kinds"]} == {
        "bad pictures": 2,
        "notes and other files": 1,
        "files of the system or of tools": 1,
    }
    (mixed / "notes.txt").unlink()
    (mixed / "train/a/.DS_Store").unlink()
    (mixed / "train/a/bad.png").unlink()
    (mixed / "train/b/bad.jpg").unlink()
    prepare(folder(mixed), str(out), Preparation(overwrite=True))
    assert not (out / "_left_out.jsonl").exists()


# The fast check


def test_the_fast_check_stores_the_same_of_plain_files(tmp_path: Path, mixed: Path):
    full, _ = prepare(folder(mixed), str(tmp_path / "full"), skipping())
    fast, _ = prepare(folder(mixed), str(tmp_path / "fast"), skipping(rules=sources.Rules(check="fast")))
    assert fast == full
    one, other = files_of(tmp_path / "full"), files_of(tmp_path / "fast")
    assert {name for name in one if one[name] != other[name]} == {"data_card.json"}
    compared = [read_card(str(tmp_path / name), full)["duplicates"]["num_compared"] for name in ("full", "fast")]
    assert compared[0] == 65 > compared[1] > 0


# Faults of reading, and kills while files are moved


def test_a_fault_of_the_disk_is_no_bad_picture(tmp_path: Path):
    """It would be left out for ever: nothing of the file changes when the disk answers again."""
    root = write_tree(
        tmp_path / "pictures", numbered(*(f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(6)))
    )
    out, how = str(tmp_path / "out"), Preparation(skip_bad=True, max_bad_share=0.5)
    with pytest.MonkeyPatch.context() as patch:

        def open_or_fail(path: Any, *args: Any, **options: Any) -> Any:
            if str(path).endswith("3.png"):
                raise OSError(errno.EIO, "Input/output error")
            return opened(path, *args, **options)

        opened = builtins.open
        patch.setattr(builtins, "open", open_or_fail)
        with pytest.raises(UserError, match=r"3\.png cannot be read: Input/output error; --skip-bad does not"):
            prepare(sources.find_source("folder", str(root)), out, how)
    manifest, _ = prepare(sources.find_source("folder", str(root)), out, how)
    assert manifest.num_skipped == 0
    assert sum(manifest.num_rows(split) for split in manifest.splits) == 12


def test_files_that_were_moved_before_a_kill_are_used_again(tmp_path: Path):
    log, out = tmp_path / "log", tmp_path / "out"

    def killed(*_: object) -> None:
        raise SystemExit(9)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "write_card", killed)
        with pytest.raises(SystemExit):
            prepare(watched(log), str(out))
    assert (out / "train-00000.parquet").exists()
    assert not (out / "_manifest.json").exists()
    prepared_of(log)
    prepare(watched(log), str(out))
    assert prepared_of(log) == []
    prepare(watched(tmp_path / "log2"), str(tmp_path / "fresh"))
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_another_data_set_is_refused_before_a_picture_is_read(tmp_path: Path):
    log, out = tmp_path / "log", tmp_path / "out"
    prepare(sources.shapes(60, 20), str(out))
    before = files_of(out)
    with pytest.raises(UserError, match="already holds another data set"):
        prepare(watched(log), str(out))
    assert prepared_of(log) == []
    assert files_of(out) == before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(UserError, match="out is a file; name a folder with --out"):
        prepare(sources.shapes(20, 20), str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == b"mine"
