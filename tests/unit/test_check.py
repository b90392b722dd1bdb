"""The check of pictures: what is stored decodes in DALI to what Pillow shows upright, and no file ends the job."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from crashing_decoder import CRASH, HANG, POISON
from odd_formats import other_pictures
from odd_pictures import exif, jpeg_with, odd_pictures, picture, saved
from PIL import Image, ImageOps
from prepared import read

from cifar_dist.data import check, sources, store
from cifar_dist.data.making import Row
from cifar_dist.data.sources.fast_check import plain_file
from cifar_dist.data.sources.picture import show
from cifar_dist.errors import UserError

ROOT = Path(__file__).parents[2]
REFUSED = {
    *("empty", "text", "bmp RLE without all pixels"),
    *(f"tiff float {what}" for what in ("negative", "large", "NaN", "infinite")),
    *(f"{format} {how}" for format in ("PNG", "BMP", "TIFF", "WEBP") for how in ("cut off", "of its first bytes")),
    *("jpeg without its end", "jpeg of one scan's half", "jpeg without Huffman tables"),
    *(f"jpeg {num_bytes} stray bytes at 2" for num_bytes in (1, 3, 100)),
}


def stored(files: dict[str, bytes], skip_bad: bool = False) -> tuple[list[Row], list[str]]:
    """The rows of a source of these files, and what was left out."""
    items = [sources.Item(name, 0, lambda content=content: content) for name, content in files.items()]
    checker = check.Checker()
    try:
        rows, found = read(sources.Source.of("test", ["a"], {"train": items}), skip_bad=skip_bad, checker=checker)
        return rows, [bad["reason"] for bad in found.bad]
    finally:
        checker.stop()


def upright(content: bytes) -> np.ndarray:
    """uint8 [H, W, 3], as Pillow shows it."""
    file = Image.open(io.BytesIO(content))
    is_inverted = file.format == "TIFF" and file.tag_v2.get(262) == 0  # which Pillow does not know of 16 bits
    image = ImageOps.exif_transpose(file)
    gray = np.asarray(image)
    if image.mode == "F":
        scale = 255 if gray.max() <= 1 else 1 if gray.max() <= 255 else 1 / 257
        return np.stack([np.rint(gray * scale).astype(int)] * 3, -1)
    if image.mode.startswith("I"):
        gray = gray.astype(int) // 257
        return np.stack([255 - gray if is_inverted else gray] * 3, -1)
    image.info.pop("transparency", None)
    return np.asarray((image.convert("RGBA") if image.mode == "P" else image).convert("RGB"))


@pytest.fixture(scope="module")
def odd() -> tuple[dict[str, bytes], dict[str, Row], list[str]]:
    """Odd files, the rows of those that were stored, and what was said of the others."""
    files = odd_pictures() | other_pictures()
    rows, skipped = stored(files, skip_bad=True)
    return files, {row.path: row for row in rows}, skipped


@pytest.fixture(scope="module")
def decoded(odd) -> dict[str, np.ndarray]:
    """What DALI decodes from each row's bytes; no pixels where it fails."""
    pipe = check.decode_pipeline(1, 1)
    found = {}
    for name, row in odd[1].items():
        pipe.feed_input("images", [np.frombuffer(row.encoded, np.uint8)])
        try:
            found[name] = np.array(pipe.run()[0].at(0))
        except RuntimeError:
            found[name], pipe = np.zeros((0, 0, 3), np.uint8), check.decode_pipeline(1, 1)
    return found


def test_what_is_stored_decodes_to_what_pillow_shows_upright(odd, decoded):
    files, rows, _ = odd
    assert len(rows) > 300
    wrong = [name for name in rows if not np.array_equal(decoded[name], upright(files[name]))]
    assert wrong == []


def test_the_sizes_are_those_that_dali_gives(odd, decoded):
    sizes = {name: (row.height, row.width) for name, row in odd[1].items()}
    assert sizes == {name: pixels.shape[:2] for name, pixels in decoded.items()}
    assert {(16, 24), (24, 16)} <= set(sizes.values())


def test_what_nobody_decodes_is_named(odd):
    files, rows, skipped = odd
    assert files.keys() - rows.keys() == REFUSED
    assert len(skipped) == len(REFUSED)
    assert all(any(message.startswith(f"{name} is ") for message in skipped) for name in REFUSED), skipped


def test_what_dali_decodes_right_is_kept_byte_for_byte(odd):
    files, rows, _ = odd
    kept = {name for name, row in rows.items() if row.encoded == files[name]}
    assert all(rows[name].encoding == "PNG" for name in rows.keys() - kept)
    sizes = {name for name in files if name.startswith("jpeg (")}
    assert len(sizes) == 30
    tags = {f"jpeg SHORT {value} {order}" for value in range(1, 9) for order in "<>"}
    assert kept >= sizes | tags | {"jpeg restarts", "jpeg with a tail", "bmp top-down", "tiff planar 8", "webp lossy"}
    assert kept >= {name for name, content in files.items() if plain_file(content)}
    again = {"jpeg LONG 6 >", "jpeg XMP 6", "tiff planar 16", "jpeg 3 stray bytes at 20", "bmp 565", "mpo"}
    assert not kept & again
    assert again <= rows.keys()


def test_every_number_of_threads_and_size_of_batch_gives_the_same_rows(odd, monkeypatch: pytest.MonkeyPatch):
    files = {name: odd[0][name] for name in list(odd[0])[::7]}
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})  # the child counts the CPUs that it may use
    monkeypatch.setattr(check, "BATCH_SIZE", 3)
    try:
        rows, _ = stored(files, skip_bad=True)
    finally:
        os.sched_setaffinity(0, cpus)
    assert rows == [odd[1][name] for name in files if name in odd[1]]


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check, "BATCH_BYTES", 1000)
    sizes = [400, 400, 400, 5000, 10, 990, *[1] * 600]
    found = list(check.batches(check.Picture(bytes(size), (1, 1), None, i) for i, size in enumerate(sizes)))
    assert [[len(p.encoded) for p in batch] for batch in found[:4]] == [[400, 400], [400], [5000], [10, 990]]
    assert [len(batch) for batch in found[4:]] == [256, 256, 88]
    assert [p.owner for batch in found for p in batch] == list(range(len(sizes)))
    assert check.Picture(b"12", (16, 24), b"digest", None).num_bytes == 2 + 24 * 16 * 3


# The child process


@pytest.fixture
def checker() -> Iterator[check.Checker]:
    checker = check.Checker(module="crashing_decoder")
    yield checker
    checker.stop()


GOOD = saved("PNG")


def as_picture(encoded: bytes, pixels: np.ndarray, owner: bytes = b"") -> check.Picture[bytes]:
    """A file that must decode to the pixels."""
    return check.Picture(encoded, pixels.shape[:2], check.pixels_sha256(pixels), owner)


def pictures(*tails: bytes) -> list[check.Picture[bytes]]:
    """The same PNG again and again; bytes behind its end tell the stand-in what to do."""
    return [as_picture(GOOD + tail, picture(), tail) for tail in tails]


def answers(checker: check.Checker, found: list[check.Picture[bytes]]) -> list[tuple[bytes, bool]]:
    return [(p.owner, sound) for p, sound in checker.checked(found)]


def test_a_picture_that_ends_the_child_is_known_and_no_other_is_blamed(checker: check.Checker):
    expected = [(b"1", True), (CRASH, False), (b"2", True), (CRASH, False), (CRASH, False), (b"3", True)]
    assert answers(checker, pictures(*(tail for tail, _ in expected))) == expected
    assert answers(checker, pictures(b"4")) == [(b"4", True)]


def test_a_picture_is_not_blamed_for_the_one_before_it(checker: check.Checker):
    expected = [(b"1", True), (POISON, True), (b"2", True), (b"3", True)]
    assert answers(checker, pictures(*(tail for tail, _ in expected))) == expected


def test_a_picture_that_hangs_is_given_up(checker: check.Checker, monkeypatch: pytest.MonkeyPatch):
    answers(checker, pictures(b"1"))  # starts with the usual limit
    monkeypatch.setattr(check, "LIMIT_SECONDS", 0.5)
    started = checker._start
    monkeypatch.setattr(checker, "_start", lambda: with_limit(started, monkeypatch))
    assert answers(checker, pictures(b"1", HANG)) == [(b"1", True), (HANG, False)]


def with_limit(start, monkeypatch: pytest.MonkeyPatch):
    """Starts the child with the usual limit: its imports take longer."""
    with monkeypatch.context() as patch:
        patch.setattr(check, "LIMIT_SECONDS", 120)
        return start()


def test_the_child_is_asked_of_nothing_else(checker: check.Checker):
    """Pictures of our own come through in their places, also between those that are asked of."""
    own = check.Picture(GOOD, (16, 24), None, b"own")
    found = [own, *pictures(b"1", CRASH), own]
    assert answers(checker, found) == [(b"own", True), (b"1", True), (CRASH, False), (b"own", True)]


def test_one_wrong_pixel_is_seen(checker: check.Checker):
    pixels = picture()
    pixels[3, 4, 1] ^= 1
    turned = np.ascontiguousarray(picture().transpose(1, 0, 2))
    found = [as_picture(GOOD, p) for p in (pixels, picture(), picture()[::-1], turned, picture()[:-1])]
    assert [sound for _, sound in checker.checked(found)] == [False, True, False, False, False]


def test_who_leaves_early_and_asks_again_gets_the_right_answers(checker: check.Checker, monkeypatch):
    monkeypatch.setattr(check, "BATCH_SIZE", 1)
    wrong = as_picture(GOOD, 255 - picture(), b"wrong")
    rows = checker.checked([*pictures(b"1"), wrong, wrong])
    assert next(rows)[1]
    rows.close()
    assert answers(checker, pictures(b"2", b"3")) == [(b"2", True), (b"3", True)]


def test_without_dali_one_sentence_says_so():
    with pytest.raises(UserError, match=r"DALI, .* does not run on this machine \(ModuleNotFoundError: .*no_such_one"):
        list(check.Checker(module="no_such_one").checked(pictures(b"")))


def test_arrays_and_drawn_shapes_start_no_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_args, **_options: pytest.fail("a process was started"))
    store.prepare(sources.shapes(20, 20), str(tmp_path / "out"))


def test_prepare_ends_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    items = [sources.Item(str(i), i, lambda: GOOD) for i in range(2)]
    store.prepare(sources.Source.of("x", ["a", "b"], {"train": items, "test": items}), str(tmp_path / "out"))
    assert [process.returncode for process in started] == [-signal.SIGKILL]  # one for both splits, and it is no more


def test_the_child_ends_with_a_parent_that_was_killed():
    program = (
        "import sys, time; from cifar_dist.data.check import Checker; c = Checker(); c._start()\n"
        "print(open(f'/proc/self/task/{__import__(\"os\").getpid()}/children').read(), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.05)


@pytest.mark.parametrize(("segments", "is_shown"), [((6, 3), False), ((1, 6), False), ((6,), True), ((), True)])
def test_a_jpeg_that_ends_dali_is_never_shown_to_it(segments: tuple[int, ...], is_shown: bool):
    """DALI 2.4 may die of a JPEG with EXIF twice, or live on and decode the next pictures wrong."""
    file = jpeg_with(*map(exif, segments))
    assert show(file, "x", sources.Rules()).is_odd != is_shown


def test_there_is_one_decoder():
    """The check is worth something only if it decodes as training does."""
    calls = [
        path.name for path in (ROOT / "cifar_dist").rglob("*.py") for _ in range(path.read_text().count("decoders."))
    ]
    assert calls == ["check.py"]
