"""jobs/prepare.py as a command: exit codes, one-sentence messages, progress, Ctrl-C."""

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_dist.data.manifest import read_manifest
from cifar_dist.data.private import Staging
from cifar_dist.data.staged import DataSet
from cifar_dist.data.store import PREPARING
from cifar_dist.errors import UserError

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "jobs" / "prepare.py")]
SHAPES = ["--source", "shapes", "--num-train", "20", "--num-test", "20"]


def prepare(*args: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, check=False, **options)


def one_sentence(done: subprocess.CompletedProcess[str], exit_code: int = 1) -> str:
    """The message of a run that failed as it should: a single line, no traceback, on stdout at most what was found."""
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout == "" or done.stdout.startswith(("found in ", "source "))
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: " if exit_code == 1 else "prepare.py: ")
    return line


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def published(folder: Path) -> dict[str, bytes]:
    """The files of the folder but for those in PREPARING."""
    return {name: content for name, content in files_of(folder).items() if not name.startswith(PREPARING)}


def png(color: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), color, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """train/ with ten images of each of two classes; no test split."""
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / "train" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "pictures" / "train" / name / f"{i}.png").write_bytes(png(i + 100 * (name == "dog")))
    return tmp_path / "pictures"


def test_prepare_twice_then_other_data_then_overwrite(tmp_path: Path):
    out = tmp_path / "out"
    first = prepare(*SHAPES, "--out", out)
    assert first.returncode == 0, first.stderr
    assert "images/s" not in first.stdout + first.stderr  # without a terminal there is no progress bar
    found, *_, last = first.stdout.splitlines()
    assert found == "source shapes"
    assert last.startswith(f"{out}: 20 train, 20 test images of 10 classes; prepared, sha256 ")
    before = files_of(out)

    again = prepare(*SHAPES, "--out", out)
    assert again.returncode == 0
    assert "already there and unchanged" in again.stdout
    assert files_of(out) == before

    other = [*SHAPES, "--data-seed", "1", "--out", out]
    message = one_sentence(prepare(*other))
    assert str(out) in message
    assert "--overwrite" in message
    assert published(out) == before

    replaced = prepare(*other, "--overwrite")
    assert replaced.returncode == 0
    assert files_of(out)["train-00000.parquet"] != before["train-00000.parquet"]

    fresh = prepare(*other[:-1], tmp_path / "fresh")
    assert fresh.returncode == 0
    assert files_of(tmp_path / "fresh") == files_of(out)


def test_a_folder_with_bad_files(tmp_path: Path, pictures: Path):
    bad = pictures / "train" / "dog" / "bad.jpg"
    bad.write_bytes(b"this is no picture")
    (pictures / "train" / "cat" / "empty.png").write_bytes(b"")
    out = tmp_path / "out"
    message = one_sentence(prepare("--source", "folder", "--path", pictures, "--out", out))
    assert str(bad) in message or "empty.png" in message  # whichever the drawn split reads first
    assert "--skip-bad" in message
    assert not (out / "_manifest.json").exists()

    message = one_sentence(prepare("--source", "folder", "--path", pictures, "--out", out, "--skip-bad"))
    assert "would lose 1 of its 11 pictures, more than the share of 0.01 that --max-bad-share allows" in message
    assert not (out / "_manifest.json").exists()

    skip = ["--skip-bad", "--max-bad-share", "0.1"]
    skipped = prepare("--source", "folder", "--path", pictures, "--out", out, *skip)
    assert skipped.returncode == 0, skipped.stderr
    assert "2 bad images left out" in skipped.stdout
    said = [line for line in (skipped.stdout + skipped.stderr).splitlines() if line.startswith("skipped: ")]
    assert len(said) == 2
    assert any(str(bad) in line for line in said)
    left_out = [json.loads(line) for line in (out / "_left_out.jsonl").read_text().splitlines()]
    assert sorted(line["path"] for line in left_out) == ["train/cat/empty.png", "train/dog/bad.jpg"]
    manifest = json.loads((out / "_manifest.json").read_bytes())
    assert manifest["num_skipped"] == 2
    assert manifest["class_names"] == ["cat", "dog"]
    assert sum(split["num_rows"] for split in manifest["splits"].values()) == 20


def test_a_file_that_only_pillow_reads_is_encoded_anew(tmp_path: Path, pictures: Path):
    """Three stray bytes between a JPEG's segments: DALI refuses the file."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)).save(buffer, "JPEG")
    content = buffer.getvalue()
    (pictures / "train" / "cat" / "stray.jpg").write_bytes(content[:20] + bytes(3) + content[20:])
    for skip in ([], ["--skip-bad"]):
        out = tmp_path / f"out{len(skip)}"
        done = prepare("--source", "folder", "--path", pictures, "--test-fraction", "0.1", "--out", out, *skip)
        assert done.returncode == 0, done.stderr
        manifest = json.loads((out / "_manifest.json").read_bytes())
        assert {tuple(split["encodings"]) for split in manifest["splits"].values()} == {("PNG",)}
        assert max(split["width"][1] for split in manifest["splits"].values()) == 12


def test_12_bit_values_in_16_bit_images_are_warned_of(tmp_path: Path, pictures: Path):
    for path in sorted(pictures.rglob("*.png")):
        Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(path)
    done = prepare("--source", "folder", "--path", pictures, "--out", tmp_path / "out")
    assert done.returncode == 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "16-bit" in line]
    assert lines
    assert all(line.startswith("WARNING: ") for line in lines)
    assert "of the 20 16-bit images, 4000 of 65535, so 16 of 256 levels" in lines[0]


def test_the_drawn_test_split_follows_fraction_and_seed(tmp_path: Path, pictures: Path):
    def test_paths(*options: str) -> list[str]:
        out = tmp_path / "-".join(["out", *options])
        done = prepare("--source", "folder", "--path", pictures, "--out", out, *options)
        assert done.returncode == 0, done.stderr
        staged = DataSet.open(str(out), Staging(folder=tmp_path / "staged")).stage("test")
        return [staged.path(i) for i in range(len(staged))]

    drawn = test_paths("--test-fraction", "0.3")
    assert [path.split("/")[1] for path in drawn] == ["cat"] * 3 + ["dog"] * 3
    assert test_paths("--test-fraction", "0.3", "--data-seed", "1") != drawn


def test_the_number_of_tasks_changes_no_byte_and_the_fast_check_none_of_plain_files(tmp_path: Path, pictures: Path):
    def prepared(name: str, *options: str) -> dict[str, bytes]:
        done = prepare("--source", "folder", "--path", pictures, "--out", tmp_path / name, *options)
        assert done.returncode == 0, done.stderr
        return files_of(tmp_path / name)

    one = prepared("one", "--tasks", "1")
    assert prepared("two", "--tasks", "2") == one
    fast = prepared("fast", "--check", "fast")
    assert {name for name in one if one[name] != fast[name]} == {"data_card.json"}


def test_a_prepared_data_set_is_a_parquet_source(tmp_path: Path, shapes_uri: str):
    done = prepare("--source", "parquet", "--path", shapes_uri, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "200 train, 100 test images of 10 classes" in done.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--source", "folder", "--path", "does/not/exist"], ["does/not/exist does not exist", "--path"]),
        (["--source", "parquet"], ["--path"]),
        (["--source", "folder", "--path", "SAME"], ["--out", "SAME"]),
        (["--source", "shapes", "--num-train", "19"], ["--num-train", "20"]),
        (["--source", "shapes", "--test-fraction", "1"], ["--test-fraction", "between 0 and 1"]),
        (["--source", "shapes", "--out", ""], ["empty path or URI"]),
        (["--source", "shapes", "--out", "foo://x"], ["foo://x"]),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(tmp_path: Path, args: list[str], words: list[str]):
    message = one_sentence(prepare("--out", tmp_path / "SAME", *args, cwd=tmp_path))
    assert all(word in message for word in words), message
    assert not (tmp_path / "SAME").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--source", "shape", "--out", "x"], ["'shape'", "shapes"]),
        (["--source", "shapes", "--out", "x", "--skipbad"], ["--skipbad", "--skip-bad"]),
        (["--source", "shapes", "--out", "x", "--num-train", "many"], ["--num-train", "many"]),
        (["--source", "shapes"], ["--out"]),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, args: list[str], words: list[str]):
    message = one_sentence(prepare(*args, cwd=tmp_path), exit_code=2)
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


def test_help_shows_examples(tmp_path: Path):
    done = prepare("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("--source", "cifar10", "--skip-bad", "--overwrite", "examples:"):
        assert word in done.stdout


def test_debug_adds_the_traceback(tmp_path: Path):
    done = prepare("--source", "folder", "--path", "nowhere", "--out", tmp_path / "out", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: nowhere does not exist; --path names a folder")


@contextmanager
def in_a_terminal(*args: str | Path) -> Iterator[tuple[subprocess.Popen[bytes], Iterator[bytes]]]:
    """The running job, and all that its terminal has shown so far, again and again until it ends."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 80))
    # A shell's background job ignores SIGINT, and so would its children.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    job = subprocess.Popen([*COMMAND, *map(str, args)], stdout=writer, stderr=writer)
    signal.signal(signal.SIGINT, previous)
    os.close(writer)

    def shown() -> Iterator[bytes]:
        content = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while part := os.read(reader, 4096):
                content += part
                yield content

    try:
        yield job, shown()
    finally:
        job.kill()
        job.wait()
        os.close(reader)


def test_a_terminal_gets_a_progress_bar(tmp_path: Path):
    with in_a_terminal(*SHAPES, "--out", tmp_path / "out") as (job, shown):
        *_, content = shown
        assert job.wait() == 0
    for words in (b"prepare:", b"40/40", b"images/s"):
        assert words in content


def descendants(process: int) -> list[int]:
    """The process ids of a process's children, their children and so on."""
    children = [int(c) for c in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return [*children, *(inner for child in children for inner in descendants(child))]


def are_gone(processes: list[int]) -> bool:
    """Whether all have ended within 20 s."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if not any(is_running(process) for process in processes):
            return True
        time.sleep(0.1)
    return False


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("tasks", ["1", "2"])
def test_ctrl_c_ends_it_and_publishes_nothing(tmp_path: Path, tasks: str):
    out = tmp_path / "out"
    options = ["--source", "shapes", "--num-train", "30000", "--out", out, "--tasks", tasks]
    with in_a_terminal(*options) as (job, shown):
        # Not before images flow: Python may lose the signal while it imports.
        assert any(re.search(rb" [1-9]\d*/30500", content) for content in shown)
        assert (out / PREPARING).exists()
        processes = descendants(job.pid)
        assert bool(processes) == (tasks == "2")  # drawn shapes need no check
        job.send_signal(signal.SIGINT)
        *_, content = shown
        assert job.wait() == 130
    assert b"interrupted" in content
    assert b"Traceback" not in content
    assert are_gone(processes)
    assert published(out) == {}
    assert not [name for name in files_of(out) if name.endswith(".tmp")]
    with pytest.raises(UserError, match="is no data set"):
        read_manifest(str(out))


# What is not read


@pytest.mark.parametrize("name", ["other/cat/1.png", "train/1.png", "1.png"])
@pytest.mark.parametrize("more", [[], ["--skip-bad"]], ids=["", "skip-bad"])
def test_what_would_not_be_read_of_a_folder_stops_the_job(tmp_path: Path, pictures: Path, name: str, more: list):
    file = pictures / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(1))
    out = tmp_path / "out"
    message = one_sentence(prepare("--source", "folder", "--path", pictures, "--out", out, *more))
    assert "would not be read" in message
    assert any(str(part) in message for part in (file, file.parent, file.parent.parent))
    assert not (out / "_manifest.json").exists()


def test_a_table_of_no_split_is_left_out_with_a_warning(tmp_path: Path):
    assert prepare(*SHAPES, "--out", tmp_path / "table").returncode == 0
    (tmp_path / "table" / "more-00000.parquet").write_bytes(b"")
    done = prepare("--source", "parquet", "--path", tmp_path / "table", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "more-00000.parquet" in done.stdout
    assert "WARNING: not stored: 1 tables that are not read" in done.stderr


def test_a_damaged_table_stops_the_job(tmp_path: Path):
    assert prepare(*SHAPES, "--out", tmp_path / "table").returncode == 0
    (tmp_path / "table" / "TRAIN_more.parquet").write_bytes(b"")
    message = one_sentence(prepare("--source", "parquet", "--path", tmp_path / "table", "--out", tmp_path / "out"))
    assert "TRAIN_more.parquet is not a readable Parquet file" in message


@pytest.mark.parametrize("name", ["README.txt", "labels.csv", "train.zip", ".cache/x", "train/cat/Thumbs.db"])
def test_what_is_no_picture_is_told_and_left_out(tmp_path: Path, pictures: Path, name: str):
    (pictures / name).parent.mkdir(exist_ok=True)
    (pictures / name).write_bytes(b"no picture")
    out = tmp_path / "out"
    done = prepare("--source", "folder", "--path", pictures, "--out", out)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("  left out") and name in line]
    (line,) = (json.loads(line) for line in (out / "_left_out.jsonl").read_text().splitlines())
    assert line["path"] == name
    assert read_manifest(str(out)).num_skipped == 0


GO_ON = """
import sys
from cifar_dist.cli import prepare
from cifar_dist.job_settings import SourceSettings
given = prepare.COMMAND.parse(sys.argv[1:], "prepare.py")
prepare.prepare(given.build(SourceSettings), given.values["out"], reuse=True)
"""


def test_a_whole_data_set_is_enough_for_the_pipeline_where_its_source_is_gone(tmp_path: Path, pictures: Path):
    out = tmp_path / "out"

    def go_on() -> subprocess.CompletedProcess:
        args = ["--source", "folder", "--path", str(pictures), "--out", str(out)]
        return subprocess.run(
            [sys.executable, "-c", GO_ON, *args], cwd=ROOT, check=False, capture_output=True, text=True
        )

    assert go_on().returncode == 0
    before = files_of(out)
    pictures.rename(tmp_path / "elsewhere")
    done = go_on()
    assert done.returncode == 0, done.stderr
    assert "Going on with the whole data set that is in" in done.stderr
    assert files_of(out) == before
    file = out / "train-00000.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    done = go_on()
    assert done.returncode != 0
    assert f"{pictures} does not exist" in done.stderr
