"""The benchmark of preparation runs, tiny, and what it measures and compares is so."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cifar_dist.cli.prepare import prepare as prepare_job
from cifar_dist.errors import UserError
from cifar_dist.job_settings import SourceSettings

ROOT = Path(__file__).parents[2]
OURS = ["full check, one core", "full check", "fast check"]
PEERS = ["datasets, to_parquet", "datasets, straight", "datasets, straight, all cores"]
ALLOCATE = "import time; block = b'x' * ({mb} * 1000 * 1000); time.sleep(1.5)"


@pytest.fixture(autouse=True)
def in_benchmarks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def run(out: Path, *words: str) -> dict:
    folder = out / "folder"
    folder.mkdir()
    command = [sys.executable, "benchmarks/prepare.py", "--pictures", "10", "--repeat", "2", "--times", "2"]
    command += ["--out", str(out), "--folder", str(folder), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert not os.listdir(folder)  # it removes what it writes
    files = [json.loads(path.read_text())["results"] for path in sorted(out.glob("prepare_*.json"))]
    return {name: value for results in files for name, value in results.items()}


@pytest.mark.slow
def test_every_way_is_measured(tmp_path: Path):
    results = run(tmp_path, "--ways", *OURS)
    rates, ratios = (results["speed"][name] for name in ("images_per_second", "ratios"))
    assert list(rates) == OURS
    assert all(rate["n"] == 2 and rate["low"] > 0 for rate in rates.values())
    assert list(ratios) == ["full check over full check, one core"]
    assert list(results["memory"]["cases"]) == [f"{c} check, {n} pictures" for c in ("full", "fast") for n in (10, 20)]
    for case in results["memory"]["cases"].values():
        assert case["peak_pss_mb"]["n"] == 2
        assert case["largest_rss_mb"]["low"] > 50
        assert 50 < case["peak_pss_mb"]["low"] < 2000
    assert list(results["memory"]["growth"]) == ["full", "fast"]


@pytest.mark.slow
def test_datasets_is_measured_and_stores_the_same(tmp_path: Path):
    from prepare import peer_command

    try:
        peer_command()
    except UserError as error:
        pytest.fail(str(error)) if os.environ.get("CI") else pytest.skip(str(error))
    speed = run(tmp_path, "--only", "speed", "--ways", "fast check", *PEERS)["speed"]
    aside = [f"{peer}, {what}" for peer in PEERS for what in ("synced", "imports aside")]
    assert list(speed["images_per_second"]) == ["fast check", *PEERS, *aside]
    assert set(speed["peer_packages"]) == {"datasets", "pillow", "pyarrow"}
    for peer in PEERS:
        rates = {
            what: speed["images_per_second"][f"{peer}{what}"]["median"] for what in ("", ", synced", ", imports aside")
        }
        assert rates[", synced"] < rates[""] < rates[", imports aside"]
        assert f"fast check over {peer}" in speed["ratios"]


def test_pictures_are_like_photos_and_the_same_each_time(tmp_path: Path):
    from photos import make_photos, photo, photos_in, repeat_photos

    num_bytes = make_photos(tmp_path / "a", 10)
    files = list(photos_in(tmp_path / "a"))
    assert [file.parts[-3] for file in files] == ["test"] * 2 + ["train"] * 8
    assert 140_000 < num_bytes / 10 < 180_000
    contents = [file.read_bytes() for file in files]
    assert len(set(contents)) == 10
    assert all(0.9e6 < size[0] * size[1] < 1.1e6 for size in (Image.open(file).size for file in files))
    again = io.BytesIO()
    photo(int(files[3].stem.split("-")[1])).save(again, "JPEG", quality=85)
    assert again.getvalue() == contents[3]
    repeat_photos(tmp_path / "a", 3, tmp_path / "b")
    repeated = list(photos_in(tmp_path / "b"))
    assert len(repeated) == 30
    assert {file.stat().st_ino for file in repeated} == {file.stat().st_ino for file in files}


def test_other_bytes_another_class_and_missing_pictures_are_found(tmp_path: Path):
    from photos import make_photos, photos_in
    from prepare import check_stored

    make_photos(tmp_path / "source", 10)
    prepare_job(SourceSettings(source="folder", path=str(tmp_path / "source")), str(tmp_path / "out"))
    check_stored(tmp_path / "source", tmp_path / "out")
    file = list(photos_in(tmp_path / "source"))[-1]
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"?")
    with pytest.raises(RuntimeError, match=f"{file.name} in .* is not the picture"):
        check_stored(tmp_path / "source", tmp_path / "out")
    file.write_bytes(content)
    moved = file.rename(file.parent.parent / "class-0" / file.name)
    with pytest.raises(RuntimeError, match=f"{file.name} in .* another class"):
        check_stored(tmp_path / "source", tmp_path / "out")
    moved.rename(file)
    (file.parent / "more.jpg").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"1 pictures too few, more\.jpg among them"):
        check_stored(tmp_path / "source", tmp_path / "out")


def test_memory_is_that_of_all_processes_of_the_command():
    from measured_process import run

    inner, outer = ALLOCATE.format(mb=100), ALLOCATE.format(mb=200)
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {inner!r}]); {outer}"
    ran = run([sys.executable, "-c", code], cores=os.sched_getaffinity(0), with_memory=True)
    assert 300 < ran.memory.pss < 350
    assert 200 < ran.memory.rss < 250
    assert ran.memory.num_processes == 2
    assert 1.5 < ran.seconds < 30


def test_a_command_is_bound_to_its_cores_and_its_failure_is_shown():
    from measured_process import run

    before = os.sched_getaffinity(0)
    ran = run([sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"], cores={max(before)})
    assert ran.output.split() == [f"{{{max(before)}}}"]
    assert os.sched_getaffinity(0) == before
    with pytest.raises(RuntimeError, match=r"failed with 3:\nno good"):
        run([sys.executable, "-c", "print('no good'); raise SystemExit(3)"], cores=before)
