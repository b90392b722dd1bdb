"""A node's CUDA: whether the builds of torch and DALI fit each other, the driver and the GPUs.

Reads files and nvidia-smi, and imports neither torch nor DALI, which takes seconds."""

import re
import resource
import runpy
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cifar_dist import environment

# Drivers of the branch 470 and older know no compute_cap.
QUERIES = ("driver_version,compute_cap,name", "driver_version,name")
# Such as '580.65.06, 9.0, NVIDIA H100 80GB HBM3', '580.65.06, [N/A], GRID', or '470.10, Tesla V100'.
GPU_LINE = re.compile(r"((\d+)[\d.]*), (?:(?:(\d+)\.(\d+)|\[.*?\]), )?.+")
DALI = re.compile(r"nvidia-dali-cuda(\d+)0")
SEE = "see docs/training.md, GPUs"
Capability = tuple[int, int]


@dataclass(frozen=True)
class Build:
    """One CUDA generation of torch and DALI, installed by one extra of this project.

    `least_driver`: the oldest driver branch (NVIDIA's CUDA compatibility guide). `compiled`: the compute capabilities
    that torch and DALI are both compiled for. Code for X.Y also runs on X.Z with Z above Y.
    """

    extra: str
    least_driver: int
    compiled: tuple[Capability, ...]

    def supports(self, capability: Capability) -> bool:
        major, minor = capability
        return any(major == x and minor >= y for x, y in self.compiled)


# By CUDA's major version. `compiled`: from torch's own list (torch._C._cuda_getArchFlags()) and DALI's libraries.
BUILDS = {
    13: Build("cuda13", 580, ((7, 5), (8, 0), (9, 0), (10, 0), (11, 0), (12, 0))),
    12: Build("cuda12", 525, ((7, 0), (7, 5), (8, 0), (9, 0), (10, 0), (12, 0))),
}


def torch_cuda() -> str:
    """Returns the CUDA version that torch was built for, such as '13.2', or '' for a build without CUDA."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"] or ""


def gpus() -> str:
    """Returns a line 'driver version, compute capability, name' for each GPU, or nvidia-smi's error message.

    '' without nvidia-smi. Old drivers give lines without the compute capability."""
    if shutil.which("nvidia-smi") is None:
        return ""
    said = ""
    for query in QUERIES:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
        except subprocess.TimeoutExpired:
            return "nvidia-smi does not answer"
        said = said or done.stdout.strip() or done.stderr.strip()
        if done.returncode == 0:
            return done.stdout.strip()
    return said


def c_compiler() -> str:
    """Returns the C compiler that torch.compile would use on a GPU. Raises OSError if it or Python.h is missing."""
    compiler = environment.chosen_c_compiler() or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler: install gcc, set CC, or use --compile off")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        raise FileNotFoundError(f"there is no {header}: install Python's header files, or use --compile off")
    return compiler


def rdma(root: Path = Path("/")) -> str:
    """Returns the node's RDMA devices and how much memory a process may lock for them. '' without such devices."""
    devices = sorted(path.name for path in (root / "sys/class/infiniband").glob("*"))
    if not devices or not (root / "dev/infiniband").exists():
        return ""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return f"{', '.join(devices)}; {'unlimited' if limit == resource.RLIM_INFINITY else limit >> 20} MiB may be locked"


def build_fault(torch_cuda: str, packages: Mapping[str, str]) -> str:
    """Returns why the installed builds of torch and DALI do not fit each other, or ''. `packages`: versions by name."""
    dali = {int(m[1]) for name in packages if (m := DALI.fullmatch(name))}
    both = " or ".join(f"`uv sync --extra {build.extra}`" for build in BUILDS.values())
    if len(dali) != 1:
        found = "both CUDA builds of DALI are" if dali else "DALI is not"
        return f"{found} installed; install torch and DALI together: {both}; {SEE}"
    if not torch_cuda:
        return f"torch is built without CUDA; install torch and DALI together: {both}; {SEE}"
    (dali_major,) = dali
    if major_of(torch_cuda) != dali_major:
        text = f"torch is built for CUDA {torch_cuda} and DALI for CUDA {dali_major}; install them together"
        return f"{text}: {both}; {SEE}"
    return ""


def gpu_fault(gpus: str, torch_cuda: str) -> str:
    """Returns why torch's build does not fit the node's GPUs and driver, naming the extra that fits, or ''.

    `gpus`: from gpus(). `torch_cuda`: such as '13.2'; without it build_fault() says what is wrong."""
    found = [match for line in gpus.splitlines() if (match := GPU_LINE.fullmatch(line.strip()))]
    if not found or len(found) < len(gpus.splitlines()):
        output = "; ".join(gpus.splitlines()) or "it is not there"
        return f"nvidia-smi names no driver ({output}); install NVIDIA's driver, or use --device cpu"
    if not torch_cuda:
        return ""
    driver, capabilities = int(found[0][2]), {(int(match[3]), int(match[4])) for match in found if match[3]}
    own = BUILDS.get(major_of(torch_cuda))
    if own is None:
        return f"torch is built for CUDA {torch_cuda}, which this project does not know; {SEE}"
    lacking = [f"{x}.{y}" for x, y in sorted(capabilities) if not own.supports((x, y))]
    if driver >= own.least_driver and not lacking:
        return ""
    if driver < own.least_driver:
        text = f"driver {found[0][1]} is older than {own.least_driver}, which torch and DALI for CUDA {torch_cuda} need"
    else:
        text = f"torch and DALI for CUDA {torch_cuda} are not compiled for compute capability {', '.join(lacking)}"
    fitting = [
        build.extra
        for build in BUILDS.values()
        if driver >= build.least_driver and all(map(build.supports, capabilities))
    ]
    remedy = f"install `uv sync --extra {fitting[0]}`" if fitting else "update the driver, or use --device cpu"
    return f"{text}; {remedy}; {SEE}"


def major_of(version: str) -> int:
    return int(version.partition(".")[0])
