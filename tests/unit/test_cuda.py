"""What preflight finds out about CUDA, and which builds it says fit."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from cifar_dist.launch import cuda
from cifar_dist.launch.cuda import BUILDS, build_fault, c_compiler, gpu_fault, gpus, rdma, torch_cuda
from cifar_dist.versions import DALI_PACKAGES, check_dali, package_versions

ROOT = Path(__file__).parents[2]
DALI = {"cuda12": {"nvidia-dali-cuda120": "2.4"}, "cuda13": {"nvidia-dali-cuda130": "2.4"}}


def line(driver: str, capability: str) -> str:
    return f"{driver}, {capability}, NVIDIA GPU"


# What nvidia-smi says.


def nvidia_smi(folder: Path, script: str) -> None:
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)


def test_gpus_are_what_nvidia_smi_lists(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert gpus() == ""
    said = line("580.65.06", "9.0")
    nvidia_smi(tmp_path / "bin", f'echo "$@" > "$0.args"; echo "{said}"; echo "{said}"')
    assert gpus() == f"{said}\n{said}"
    words = (tmp_path / "bin" / "nvidia-smi.args").read_text()
    assert words.strip() == "--query-gpu=driver_version,compute_cap,name --format=csv,noheader"


@pytest.mark.parametrize("stream", ["", " >&2"])
def test_nvidia_smi_that_fails_is_heard(tmp_path, monkeypatch, stream):
    nvidia_smi(tmp_path / "bin", f'echo "NVIDIA-SMI has failed: no driver"{stream}; exit 9')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert "NVIDIA-SMI has failed: no driver" in gpu_fault(gpus(), "13.2")


# Which build fits.


@pytest.mark.parametrize(
    ("driver", "capability", "torch_version"),
    [
        *(("580.10", "7.5", "13.0"), ("580.65.06", "9.0", "13.2"), ("600.1", "12.1", "13.4"), ("580.1", "8.9", "13.2")),
        *(
            ("525.60.13", "8.0", "12.8"),
            ("550.54", "7.0", "12.8"),
            ("570.1", "12.0", "12.8"),
            ("610.2", "10.3", "12.8"),
        ),
    ],
)
def test_a_build_that_fits_is_no_fault(driver, capability, torch_version):
    assert gpu_fault(line(driver, capability), torch_version) == ""
    assert gpu_fault("\n".join([line(driver, capability)] * 4), torch_version) == ""


@pytest.mark.parametrize(
    ("driver", "capabilities", "torch_version", "reason", "remedy"),
    [
        ("550.54", ("9.0",), "13.2", "driver 550.54 is older than 580", "--extra cuda12"),
        ("579.99", ("8.0", "8.6"), "13.2", "driver 579.99 is older than 580", "--extra cuda12"),
        ("580.10", ("7.0",), "13.2", "not compiled for compute capability 7.0", "--extra cuda12"),
        ("580.10", ("9.0", "7.0"), "13.2", "not compiled for compute capability 7.0", "--extra cuda12"),
        ("580.10", ("11.0",), "12.8", "not compiled for compute capability 11.0", "--extra cuda13"),
        ("470.10", ("8.0",), "13.2", "driver 470.10 is older than 580", "update the driver"),
        ("470.10", ("8.0",), "12.8", "driver 470.10 is older than 525", "update the driver"),
        ("580.10", ("6.0", "6.1"), "13.2", "compute capability 6.0, 6.1", "or use --device cpu"),
        ("550.10", ("6.0",), "13.2", "driver 550.10 is older than 580", "or use --device cpu"),
        (
            "580.10",
            ("9.0",),
            "14.0",
            "torch is built for CUDA 14.0, which this project does not know",
            "docs/training.md",
        ),
    ],
)
def test_a_build_that_does_not_fit_is_named_with_the_extra_that_does(
    driver, capabilities, torch_version, reason, remedy
):
    text = gpu_fault("\n".join(line(driver, capability) for capability in capabilities), torch_version)
    assert reason in text
    assert remedy in text
    assert "see docs/training.md, GPUs" in text


def test_an_old_driver_that_knows_no_compute_capability_is_still_named(tmp_path, monkeypatch):
    said = 'Field "compute_cap" is not a valid field to query.'
    script = f"case $1 in *compute_cap*) echo '{said}'; exit 2;; *) echo '470.223.02, Tesla V100-SXM2-16GB';; esac"
    nvidia_smi(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert gpus() == "470.223.02, Tesla V100-SXM2-16GB"
    assert gpu_fault(gpus(), "12.8").startswith("driver 470.223.02 is older than 525")
    assert "driver 470.223.02 is older than 580" in gpu_fault(gpus(), "13.2")


def test_a_capability_that_is_not_known_is_not_judged():
    assert gpu_fault("580.1, [N/A], GRID A100", "13.2") == ""


def test_without_cuda_in_torch_the_build_is_the_fault_and_not_the_gpu():
    assert gpu_fault(line("580.1", "9.0"), "") == ""
    assert build_fault("", DALI["cuda13"]).startswith("torch is built without CUDA")


def test_one_gpu_without_an_answer_is_a_fault():
    text = gpu_fault(f"{line('580.1', '9.0')}\nUnable to determine the device handle", "13.2")
    assert "Unable to determine the device handle" in text


@pytest.mark.parametrize("extra", DALI)
def test_torch_and_dali_of_one_generation_fit(extra):
    number = extra.removeprefix("cuda")
    other = "13.2" if number == "12" else "12.8"
    assert build_fault(f"{number}.4", DALI[extra]) == ""
    text = build_fault(other, DALI[extra])
    assert text.startswith(
        f"torch is built for CUDA {other} and DALI for CUDA {number}; install them together: `uv sync"
    )
    assert "torch is built without CUDA; install torch and DALI" in build_fault("", DALI[extra])


def test_both_builds_of_dali_or_none_are_a_fault():
    assert build_fault("13.2", DALI["cuda12"] | DALI["cuda13"]).startswith("both CUDA builds of DALI are installed")
    assert build_fault("13.2", {"torch": "2.15.0"}).startswith("DALI is not installed")


def test_what_is_installed_here_fits():
    assert torch_cuda() == torch.version.cuda
    assert build_fault(torch_cuda(), package_versions()) == ""


def test_the_table_is_what_this_torch_is_compiled_for():
    build = BUILDS[int(torch_cuda().split(".")[0])]
    flags = torch._C._cuda_getArchFlags().split()  # such as sm_75 sm_120
    compiled = {(int(flag[3:-1]), int(flag[-1])) for flag in flags if flag.startswith("sm_")}
    assert all(build.supports(capability) for capability in compiled)
    assert set(build.compiled) - {(11, 0)} <= compiled  # 11.0: on aarch64 only


def test_a_missing_dali_is_a_sentence(monkeypatch):
    check_dali()
    monkeypatch.setattr("cifar_dist.versions.PACKAGES", ("torch",))
    with pytest.raises(Exception, match=r"NVIDIA DALI is not installed; `uv sync --extra cuda13` \(or cuda12"):
        check_dali()


# What else a GPU node needs.


def test_the_compiler_is_the_one_that_triton_takes(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no C compiler: install gcc, set CC, or use --compile off"):
        c_compiler()
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.setattr(cuda.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=f"there is no {tmp_path}/Python.h: install Python's header files"):
        c_compiler()
    (tmp_path / "Python.h").touch()
    assert c_compiler() == str(tmp_path / "gcc")
    monkeypatch.setenv("CC", "/opt/cc")
    assert c_compiler() == "/opt/cc"


def test_rdma_devices_are_named_with_the_memory_that_may_be_locked(tmp_path, monkeypatch):
    assert rdma(tmp_path) == ""
    for name in ("mlx5_1", "mlx5_0"):
        (tmp_path / "sys/class/infiniband" / name).mkdir(parents=True)
    assert rdma(tmp_path) == ""  # the node has it, this container has not
    (tmp_path / "dev/infiniband").mkdir(parents=True)
    for limit, words in ((8 << 20, "8 MiB"), (cuda.resource.RLIM_INFINITY, "unlimited MiB")):
        monkeypatch.setattr(cuda.resource, "getrlimit", lambda _kind, limit=limit: (limit, limit))
        assert rdma(tmp_path) == f"mlx5_0, mlx5_1; {words} may be locked"


# The extras.


def uv(*words: str) -> subprocess.CompletedProcess:
    found = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")  # where make puts it
    return subprocess.run([found, *words], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("extra", "others"), [("cuda12", "13"), ("cuda13", "12")])
def test_an_extra_brings_torch_and_dali_of_one_generation(extra, others):
    done = uv("export", "--frozen", "--no-dev", "--extra", extra, "--no-hashes", "--no-annotate", "--no-header")
    assert done.returncode == 0, done.stderr
    names = [text.split("==")[0] for text in done.stdout.splitlines()]
    assert {"torch", "torchvision", f"nvidia-dali-{extra}0"} <= set(names)
    assert not [name for name in names if name.endswith((f"cu{others}", f"cuda{others}0"))]
    assert [names.count(name) for name in ("torch", "torchvision", "triton")] == [1, 1, 1]


def test_the_extras_exclude_each_other():
    done = uv("export", "--frozen", "--extra", "cuda12", "--extra", "cuda13")
    assert done.returncode != 0
    assert "incompatible" in done.stderr


def test_the_project_names_both_and_neither_is_needed_twice():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    assert extras.keys() == {build.extra for build in BUILDS.values()}
    assert not [name for name in project["project"]["dependencies"] if "dali" in name]
    assert {name.split(">")[0] for one in extras.values() for name in one if "dali" in name} == set(DALI_PACKAGES)


def test_make_takes_the_extra_that_is_asked_for():
    command = ["make", "--dry-run", "--always-make", "settings", f"PYTHON={sys.executable}"]
    for more, extra in (([], "cuda13"), (["CUDA=cuda12"], "cuda12")):
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=True)
        assert f"sync --locked --extra {extra}" in done.stdout
