"""Preflight: what a node has and sees, what is wrong with it, and the table of it all."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cifar_dist.data import staged
from cifar_dist.data.manifest import read_manifest
from cifar_dist.data.private import Staging
from cifar_dist.data.staged import DataSet
from cifar_dist.launch import preflight
from cifar_dist.launch.preflight import FOLDER, Finding, assess, gather_facts, num_bytes_to_stage, table
from cifar_dist.storage import Folder
from cifar_dist.versions import package_versions

MIB = 1 << 20
NODE, TOKEN = "0123456789abcdef", "a token"
CHECKS = ["versions", "storage", "data set", "disk", "/dev/shm"]


@pytest.fixture
def run_uri(tmp_path) -> str:
    """A run's folder as the driver leaves it for the nodes to look at."""
    folder = Folder(str(tmp_path / "run"))
    folder.create(f"{FOLDER}/{TOKEN}")
    folder.write(f"{FOLDER}/{TOKEN}/token", TOKEN.encode())
    return folder.uri


@pytest.fixture
def facts(run_uri, shapes_uri, staging_folder) -> dict:
    """What this machine really has, but for room: no test depends on how full its disk is."""
    seen = gather_facts(NODE, run_uri, shapes_uri, str(staging_folder), TOKEN)
    return {**seen, "disk_free_bytes": 100 * MIB, "shm_free_bytes": 1024 * MIB}


@pytest.fixture
def judged(facts, shapes_uri) -> Callable:
    """The findings by check, for facts with changes."""

    def act(
        use_gpu: bool = False,
        written: tuple = (NODE, "token"),
        decoded: tuple = ("train",),
        compiles: bool = True,
        **changes,
    ) -> dict:
        seen = {**copy.deepcopy(facts), **changes}
        settings = {"token": TOKEN, "decoded": decoded, "use_gpu": use_gpu, "written": list(written)}
        settings["compiles"] = compiles
        findings = assess([seen], read_manifest(shapes_uri), **settings)
        assert {finding.node for finding in findings} == {f"{seen['name']}/01234567"}
        return {finding.check: finding for finding in findings}

    return act


def only(found: dict[str, Finding], check: str, status: str) -> str:
    """The text of the one finding that is not ok."""
    statuses = {name: finding.status for name, finding in found.items()}
    assert statuses == {**dict.fromkeys(found, "ok"), check: status}, found
    assert "\n" not in found[check].text
    return found[check].text


# What a node sees.


def test_node_writes_its_name_and_reads_the_token(run_uri, shapes_uri, staging_folder):
    seen = gather_facts(NODE, run_uri, shapes_uri, str(staging_folder), TOKEN)
    assert (seen["node"], seen["storage"]) == (NODE, TOKEN)
    assert Folder(run_uri).names(f"{FOLDER}/{TOKEN}") == [NODE, "token"]
    assert seen["manifest_sha256"] == read_manifest(shapes_uri).sha256
    assert seen["packages"] == package_versions()
    assert {"python", "torch", "ray"} <= set(seen["packages"])
    own = str(staging_folder / f"cifar_dist-staged-{os.geteuid()}")
    assert (seen["staging_folder"], seen["staging"], seen["staged"]) == (own, own, [])
    assert seen["disk_free_bytes"] > 0
    assert seen["name"]


def test_look_is_plain_values_that_any_node_can_send(facts):
    kinds = {type(value) for value in [*facts.values(), *facts["packages"].values()]}
    assert kinds == {str, int, dict, list}
    assert facts["torch_cuda"] == (torch.version.cuda or "")


def test_node_that_has_staged_the_data_says_so(run_uri, shapes_uri, staging_folder):
    DataSet.open(shapes_uri, Staging(folder=staging_folder)).stage("test")
    assert gather_facts(NODE, run_uri, shapes_uri, str(staging_folder), TOKEN)["staged"] == []
    DataSet.open(shapes_uri, Staging(folder=staging_folder)).stage("train")
    assert gather_facts(NODE, run_uri, shapes_uri, str(staging_folder), TOKEN)["staged"] == ["train"]


def test_storage_of_its_own_is_a_fault(shapes_uri, staging_folder, tmp_path):
    """The folder is there on the node's own disk too, the driver's token is not."""
    Folder(str(tmp_path / "own")).create(f"{FOLDER}/{TOKEN}")
    seen = gather_facts(NODE, str(tmp_path / "own"), shapes_uri, str(staging_folder), TOKEN)
    assert seen["storage"].startswith("fault: it does not see what the driver has written to")


def test_storage_that_is_not_there_is_a_fault(shapes_uri, staging_folder, tmp_path, judged):
    """The most usual case of storage that is not shared: no folder of the run on this node."""
    seen = gather_facts(NODE, str(tmp_path / "nowhere"), shapes_uri, str(staging_folder), TOKEN)
    assert seen["storage"].startswith("fault: ")
    assert not (tmp_path / "nowhere").exists()
    text = only(judged(storage=seen["storage"], written=("token",)), "storage", "failed")
    assert "does not see what the driver has written" in text


def test_data_that_the_node_does_not_see_is_a_fault(run_uri, staging_folder, tmp_path):
    seen = gather_facts(NODE, run_uri, str(tmp_path / "nowhere"), str(staging_folder), TOKEN)
    assert seen["manifest_sha256"].startswith(f"fault: {tmp_path}/nowhere is no data set")
    assert seen["staged"] == []


def test_staging_folder_that_cannot_be_made_is_a_fault(run_uri, shapes_uri, tmp_path):
    (tmp_path / "file").write_text("no folder")
    seen = gather_facts(NODE, run_uri, shapes_uri, str(tmp_path / "file" / "staged" / "here"), TOKEN)
    assert seen["staging"].startswith("fault: cannot make the folder")
    assert seen["staged"] == []
    assert seen["disk_free_bytes"] > 0


def test_staging_folder_that_cannot_even_be_looked_for_is_a_fault(run_uri, shapes_uri, tmp_path):
    """As one inside another user's folder cannot."""
    seen = gather_facts(NODE, run_uri, shapes_uri, str(tmp_path / ("long" * 100)), TOKEN)
    assert seen["staging"].startswith("fault: cannot make the folder")
    assert seen["staged"] == []


def test_somebody_else_s_staging_folder_is_a_fault_that_is_said(run_uri, shapes_uri, tmp_path, judged):
    (tmp_path / f"cifar_dist-staged-{os.geteuid()}").symlink_to(tmp_path)
    seen = gather_facts(NODE, run_uri, shapes_uri, str(tmp_path), TOKEN)
    text = only(judged(staging=seen["staging"]), "disk", "failed")
    assert "is no folder but a link or file, so what lies there may be forged and is not used" in text


def test_staging_folder_by_default_is_the_stores_own(run_uri, shapes_uri, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = gather_facts(NODE, run_uri, shapes_uri, None, TOKEN)
    assert seen["staging_folder"] == str(staged.default_staging_folder())
    assert Path(seen["staging_folder"]).parent == tmp_path


def test_neither_torch_nor_ray_is_loaded():
    """They take seconds, on every node."""
    heavy = "{'torch', 'ray', 'nvidia', 'torchvision'}"
    code = f"import sys; import cifar_dist.launch.preflight; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# What is wrong with it.


def test_sound_node_has_nothing_to_say_but_ok(judged, facts, shapes_uri):
    found = judged()
    assert list(found) == CHECKS
    assert {finding.status for finding in found.values()} == {"ok"}
    assert f"torch {facts['packages']['torch']}" in found["versions"].text
    assert read_manifest(shapes_uri).sha256[:16] in found["data set"].text
    assert found["disk"].text.startswith(f"100 MiB free in {facts['staging_folder']}, ")
    assert found["/dev/shm"].text == "1024 MiB free"


def test_each_node_is_judged_by_itself(facts, shapes_uri):
    other = {**facts, "node": "fedcba9876543210", "name": "other", "shm_free_bytes": 0}
    manifest, written = read_manifest(shapes_uri), [NODE, "fedcba9876543210"]
    found = assess(
        [facts, other], manifest, token=TOKEN, decoded=["train"], use_gpu=False, compiles=False, written=written
    )
    assert [finding.check for finding in found] == CHECKS * 2
    assert [finding.node for finding in found] == [f"{facts['name']}/01234567"] * 5 + ["other/fedcba98"] * 5
    assert [finding.status for finding in found] == ["ok"] * 9 + ["failed"]


@pytest.mark.parametrize(("changed", "here"), [({"torch": "1.0"}, "1.0"), ({"torch": None}, "None")])
def test_other_versions_fail_and_are_named(changed, here, judged, facts):
    wanted = facts["packages"]["torch"]
    packages = {name: version for name, version in {**facts["packages"], **changed}.items() if version}
    text = only(judged(packages=packages), "versions", "failed")
    assert text == f"torch {here} here, {wanted} at the driver; give all nodes the same environment"


def test_all_versions_that_differ_are_named(judged, facts):
    packages = {**facts["packages"], "python": "2.7.18", "ray": "0.1"}
    text = only(judged(packages=packages), "versions", "failed")
    assert text.count(" at the driver") == 2
    assert "python 2.7.18 here" in text
    assert "ray 0.1 here" in text


def test_storage_that_the_driver_does_not_see_fails(judged):
    text = only(judged(written=("token",)), "storage", "failed")
    assert text == "the driver does not see what this node has written; is it shared?"


def test_storage_where_the_node_does_not_see_the_driver_fails(judged):
    fault = "fault: it does not see what the driver has written there"
    assert fault in only(judged(storage=fault), "storage", "failed")


def test_storage_that_holds_another_driver_s_token_is_a_fault(shapes_uri, staging_folder, tmp_path):
    """Left behind on a disk of the node's own, or of a second start of the run at the same time."""
    own = Folder(str(tmp_path / "own"))
    own.create(f"{FOLDER}/{TOKEN}")
    own.write(f"{FOLDER}/{TOKEN}/token", b"0123456789abcdef")
    seen = gather_facts(NODE, own.uri, shapes_uri, str(staging_folder), TOKEN)
    assert seen["storage"].startswith("fault: it does not see what the driver has written to")


def test_other_data_fails_and_both_are_named(judged, shapes_uri):
    sha256 = read_manifest(shapes_uri).sha256
    text = only(judged(manifest_sha256="f" * 64), "data set", "failed")
    assert "f" * 16 in text
    assert f"the driver sees {sha256[:16]}" in text


def test_data_that_is_not_there_fails_with_the_reason(judged, shapes_uri):
    fault = "fault: /data is no data set: it has no _manifest.json; make one with jobs/prepare.py"
    text = only(judged(manifest_sha256=fault), "data set", "failed")
    assert fault in text
    assert read_manifest(shapes_uri).sha256[:16] in text


def test_disk_without_room_for_the_data_fails_unless_it_is_staged(judged, facts, shapes_uri):
    manifest = read_manifest(shapes_uri)
    need = num_bytes_to_stage(manifest, ["train"], ["train"])
    text = only(judged(disk_free_bytes=0), "disk", "failed")
    assert text.startswith(f"{facts['staging_folder']} has 0 MiB free, staging needs {need // MIB + 1} MiB")
    for free in (0, need - 1):
        assert judged(disk_free_bytes=free)["disk"].status == "failed"
        assert judged(disk_free_bytes=free, staged=["train"])["disk"].status == "ok"
    assert judged(disk_free_bytes=need)["disk"].status == "ok"
    encoded = num_bytes_to_stage(manifest, ["train"], [])
    assert judged(disk_free_bytes=encoded, decoded=())["disk"].status == "ok"
    assert judged(disk_free_bytes=encoded)["disk"].status == "failed"


def test_staging_takes_all_files_one_more_of_them_and_the_pixels(shapes_uri, staging_folder):
    """Held against the files that staging really leaves behind."""
    manifest = read_manifest(shapes_uri)
    num_bytes = sum(file.stat().st_size for file in Path(shapes_uri).glob("train-*.parquet"))
    assert num_bytes_to_stage(manifest, ["train"], ["test"]) == 2 * num_bytes
    assert num_bytes_to_stage(manifest, ["train"], ["train"]) == 2 * num_bytes + 200 * 32 * 32 * 3
    DataSet.open(shapes_uri, Staging(folder=staging_folder)).stage("train")
    assert sum(file.stat().st_size for file in staging_folder.rglob("*") if file.is_file()) < 2 * num_bytes


def test_staging_folder_that_cannot_be_made_fails_even_with_room(judged):
    fault = "cannot make the folder /data for staged data; set --staging-folder"
    text = only(judged(staging=f"fault: {fault}"), "disk", "failed")
    assert text == fault
    assert only(judged(staging=f"fault: {fault}", disk_free_bytes=0), "disk", "failed") == text


@pytest.mark.parametrize(
    ("free_mib", "status"), [(0, "failed"), (63, "failed"), (64, "warning"), (511, "warning"), (512, "ok")]
)
def test_small_shared_memory_is_warned_of_and_too_small_fails(free_mib, status, judged):
    found = judged(shm_free_bytes=free_mib * MIB)
    if status == "ok":
        assert found["/dev/shm"].status == "ok"
    else:
        text = only(found, "/dev/shm", status)
        assert text == f"/dev/shm has {free_mib} MiB free; mount a larger one (docker run --shm-size=1g)"


H200 = "580.65.06, 9.0, NVIDIA H200"
FITS = {"torch_cuda": "13.2", "c_compiler": "/usr/bin/gcc", "rdma": "mlx5_0; unlimited MiB may be locked"}
BUILD = {"packages": {"nvidia-dali-cuda130": "2.4"}}


@pytest.fixture
def on_gpus(judged, monkeypatch) -> Callable:
    """The findings of a run on GPUs, by default of a node on which all is right."""
    monkeypatch.setattr(preflight, "package_versions", lambda: BUILD["packages"])
    return lambda **changes: judged(True, **{"gpus": f"{H200}\n{H200}", **FITS, **BUILD, **changes})


def test_gpus_are_judged_only_where_they_are_used(judged, on_gpus):
    assert list(judged(gpus="", torch_cuda="", c_compiler="fault: none")) == CHECKS
    found = on_gpus()
    assert list(found) == [*CHECKS, "CUDA build", "GPU driver", "RDMA", "compiler"]
    assert {finding.status for finding in found.values()} == {"ok"}
    assert found["GPU driver"].text == f"{H200}; {H200}"
    assert found["CUDA build"].text == "torch and DALI for CUDA 13.2"


def test_old_or_missing_driver_fails(on_gpus):
    text = only(on_gpus(gpus="550.54.15, 8.0, NVIDIA A100"), "GPU driver", "failed")
    assert text.startswith(
        "driver 550.54.15 is older than 580, which torch and DALI for CUDA 13.2 need; install `uv sync"
    )
    assert "--extra cuda12`; see docs/training.md, GPUs" in text
    text = only(on_gpus(gpus=""), "GPU driver", "failed")
    assert text == "nvidia-smi names no driver (it is not there); install NVIDIA's driver, or use --device cpu"


@pytest.mark.parametrize("said", ["NVIDIA-SMI has failed.\n\nMake sure.", "fault: [Errno 13] no"])
def test_what_nvidia_smi_says_instead_of_a_driver_is_passed_on_in_one_line(said, on_gpus):
    text = only(on_gpus(gpus=said), "GPU driver", "failed")
    assert text.startswith(f"nvidia-smi names no driver ({said.splitlines()[0]}")
    assert "install NVIDIA's driver, or use --device cpu" in text


def test_torch_of_another_generation_than_dali_fails(on_gpus):
    text = only(on_gpus(torch_cuda="12.8", gpus=H200), "CUDA build", "failed")
    assert text.startswith("torch is built for CUDA 12.8 and DALI for CUDA 13; install them together: `uv sync --extra")


def test_a_compiler_is_asked_for_only_where_something_is_compiled(on_gpus):
    fault = "there is no C compiler: install gcc, set CC, or use --compile off"
    assert only(on_gpus(c_compiler=f"fault: {fault}"), "compiler", "failed") == fault
    assert "compiler" not in on_gpus(c_compiler=f"fault: {fault}", compiles=False)


def test_memory_that_may_not_be_locked_is_warned_of_where_there_is_rdma(on_gpus):
    text = only(on_gpus(rdma="mlx5_0, mlx5_1; 8 MiB may be locked"), "RDMA", "warning")
    assert text.startswith("mlx5_0, mlx5_1; 8 MiB may be locked: NCCL locks more; allow it (`ulimit -l unlimited`")
    assert on_gpus(rdma="")["RDMA"].text == "no RDMA device: NCCL uses TCP between nodes"


# The table.


def test_table_is_aligned_and_what_is_wrong_comes_last():
    findings = [
        Finding("disk", "node-b/1", "failed", "no room"),
        Finding("/dev/shm", "n/2", "warning", "small"),
        Finding("versions", "node-b/1", "ok", "python 3"),
        Finding("storage", "n/2", "failed", "not shared"),
        Finding("data set", "n/2", "ok", "sha256 ab"),
    ]
    assert table(findings).splitlines() == [
        "check     node      status   found",
        "versions  node-b/1  ok       python 3",
        "data set  n/2       ok       sha256 ab",
        "/dev/shm  n/2       warning  small",
        "disk      node-b/1  failed   no room",
        "storage   n/2       failed   not shared",
    ]


def test_table_of_a_real_look(judged):
    header, *rows = table(list(judged(shm_free_bytes=0).values())).splitlines()
    place = header.index("found")
    assert len(rows) == len(CHECKS)
    assert rows[-1].startswith("/dev/shm")
    assert all(row[place - 2 : place] == "  " and row[place] != " " for row in rows)
    assert [row[header.index("status") : place].strip() for row in rows] == ["ok"] * 4 + ["failed"]
