"""The image, really built and run as Kubernetes runs it: uid 1000, no capabilities, read-only root, no network.

Needs root, buildah, mmdebstrap and about 20 GB in IMAGE_TEST_FOLDER (default /var/tmp/cifar_dist-image); no
image registry: the base is made of Debian's packages. `make image-test`.
"""

import json
import os
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("IMAGE_TEST_FOLDER", "/var/tmp/cifar_dist-image"))
TOOLS = ("buildah", "mmdebstrap", "unshare", "ip")
BASE, IMAGE, REVISION = "localhost/bookworm-python", "localhost/cifar-dist:test", "0123456789abcdef"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

pytestmark = [
    pytest.mark.image,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="building and running an image here needs root"),
    pytest.mark.skipif(
        not all(shutil.which(tool) for tool in TOOLS), reason=f"needs {', '.join(TOOLS)} (Debian's packages)"
    ),
]


def buildah(*args: str) -> str:
    where = ["--storage-driver", "overlay", "--root", f"{FOLDER}/store", "--runroot", f"{FOLDER}/run"]
    done = subprocess.run(
        ["buildah", *where, *args],
        env={**os.environ, "BUILDAH_ISOLATION": "chroot"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout.strip()


def make_base() -> None:
    """Debian with its Python, in place of python:3.11-slim-bookworm; this machine's certificates are trusted."""
    if BASE in buildah("images", "--format", "{{.Name}}").splitlines():
        return
    packages = "python3,python3-venv,ca-certificates"
    rootfs = FOLDER / "rootfs.tar"
    subprocess.run(["mmdebstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(rootfs)], check=True)
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(rootfs), "/")
    buildah("copy", "--quiet", container, str(CERTIFICATES), str(CERTIFICATES))
    buildah("config", "--env", f"SSL_CERT_FILE={CERTIFICATES}", "--env", f"PIP_CERT={CERTIFICATES}", container)
    buildah("commit", "--quiet", "--rm", container, BASE)
    rootfs.unlink()


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """The image's configuration, after it was built."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    make_base()
    start = time.monotonic()
    arguments = ["--build-arg", f"BASE_IMAGE={BASE}", "--build-arg", f"REVISION={REVISION}"]
    buildah("bud", "--layers", "--network", "host", *arguments, "--tag", IMAGE, str(ROOT))
    config = json.loads(buildah("inspect", "--type", "image", IMAGE))["OCIv1"]
    print(f"built in {time.monotonic() - start:.0f} s")
    return config


@pytest.fixture(scope="module")
def rootfs(built: dict[str, Any]) -> Iterator[str]:  # noqa: ARG001 - built before
    container = buildah("from", IMAGE)
    yield buildah("mount", container)
    buildah("rm", container)


@pytest.fixture
def pod(built: dict[str, Any], rootfs: str, tmp_path: Path) -> "Pod":
    return Pod(built["config"], rootfs, tmp_path)


class Pod:
    """Runs the image confined as the manifests ask for; /tmp is a folder of this machine, as an emptyDir is."""

    def __init__(self, config: dict[str, Any], rootfs: str, folder: Path) -> None:
        self.config, self.rootfs, self.folder = config, rootfs, folder
        self.tmp = folder / "tmp"
        self.tmp.mkdir()
        os.chown(self.tmp, 1000, 1000)
        for parent in folder.parents[:3]:  # pytest's folders are the user's own
            parent.chmod(parent.stat().st_mode | 0o111)

    def run(self, script: str, *, login: bool = False, **environment: str) -> tuple[int, str]:
        """(exit code, output) of a bash script in namespaces of its own, as uid 1000 without any capability."""
        root = shlex.quote(self.rootfs)
        variables = [*self.config["Env"], "HOME=/tmp", *(f"{k}={v}" for k, v in environment.items())]
        drop = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
        bash = ["/bin/bash", "-lc" if login else "-c", "--", script]
        inside = [*drop, "--no-new-privs", "env", "-i", "-C", self.config["WorkingDir"], *variables, *bash]
        devices = [f"touch {root}/dev/{d}; mount --bind /dev/{d} {root}/dev/{d}" for d in ("null", "zero", "urandom")]
        steps = [
            "ip link set lo up; hostname pod",
            f"mount --bind {root} {root}",
            f"mount -t proc proc {root}/proc; mount -t sysfs -o ro sysfs {root}/sys",
            f"mount -t tmpfs -o mode=755 tmpfs {root}/dev; mkdir {root}/dev/shm",
            *devices,
            f"mount -t tmpfs -o size=1g,mode=1777 shm {root}/dev/shm",
            f"mount --bind {shlex.quote(str(self.tmp))} {root}/tmp",
            f"mount -o remount,bind,ro {root}",
            f"exec chroot {root} {shlex.join(inside)}",
        ]
        apart = ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
        done = subprocess.run(
            [*apart, "bash", "-ec", "\n".join(steps)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        return done.returncode, done.stdout


@pytest.mark.parametrize("login", [False, True])
def test_a_mounted_driver_and_rdma_are_found(pod: Pod, login: bool) -> None:
    """nvidia-smi in a folder of the node that is mounted at /usr/local/nvidia, as GKE does it; NCCL's two libraries."""
    libraries = "import ctypes; [ctypes.CDLL(f'lib{name}.so.1') for name in ('ibverbs', 'mlx5')]; print('both')"
    code, said = pod.run(
        f'echo "$PATH|$LD_LIBRARY_PATH|$NVIDIA_DRIVER_CAPABILITIES"; python -c "{libraries}"', login=login
    )
    assert code == 0, said
    path, libraries, capabilities = said.splitlines()[0].split("|")
    assert path.split(":")[:2] == ["/opt/venv/bin", "/usr/local/nvidia/bin"]
    assert "/usr/local/nvidia/lib64" in libraries.split(":")
    assert capabilities == "compute,utility"
    assert "both" in said


def test_it_says_what_it_is(built: dict[str, Any]) -> None:
    config, labels = built["config"], built["config"]["Labels"]
    assert config["User"] == "1000:1000"
    assert config["WorkingDir"] == "/opt/cifar_dist"
    assert labels["org.opencontainers.image.title"] == "cifar_dist"
    assert labels["org.opencontainers.image.revision"] == REVISION
    assert labels["org.opencontainers.image.base.name"] == BASE


@pytest.mark.parametrize("login", [False, True])
def test_bash_python_and_ray_are_on_the_path_also_in_a_login_shell(login: bool, pod: Pod) -> None:
    code, output = pod.run("command -v bash python ray; python -c 'import cifar_dist'", login=login)
    assert (code, output.split()[1:]) == (0, ["/opt/venv/bin/python", "/opt/venv/bin/ray"]), output


def test_it_is_confined(pod: Pod) -> None:
    script = """id -u; grep CapBnd /proc/self/status; touch /opt/x 2>&1; grep -c : /proc/net/dev
    touch /tmp/x && echo yes
    python -c 'from cifar_dist.versions import *; print(git_commit(), package_versions()["cifar-dist"])'"""
    code, output = pod.run(script)
    lines = output.splitlines()
    assert code == 0, output
    assert lines[0] == "1000"
    assert lines[1].split() == ["CapBnd:", "0" * 16]
    assert "Read-only file system" in lines[2]
    assert lines[3] == "1"  # the loopback device
    assert lines[4:] == ["yes", f"{REVISION} 0.1.0"]


def test_the_code_that_a_job_uploads_goes_before_that_of_the_image(pod: Pod) -> None:
    script = "mkdir -p /tmp/up/cifar_dist; touch /tmp/up/cifar_dist/__init__.py; cd /tmp/up; python -c "
    code, output = pod.run(f"{script} 'import cifar_dist; print(cifar_dist.__file__)'")
    assert (code, output.strip()) == (0, "/tmp/up/cifar_dist/__init__.py")


def test_a_head_starts_and_the_quickstart_runs_on_it(pod: Pod) -> None:
    """Head and submitter as KubeRay starts them, with token authentication."""
    script = """
    ulimit -n 65536; ray start --head --dashboard-host=0.0.0.0 --metrics-export-port=8080 --num-cpus=2 \
      --object-store-memory=536870912 --block > /tmp/head.log 2>&1 &
    healthy() { python -c "import urllib.request as r; print(r.urlopen('http://127.0.0.1:$1', timeout=5).read())"; }
    for i in $(seq 60); do
      healthy 8265/api/gcs_healthz > /dev/null 2>&1 && healthy 52365/api/local_raylet_healthz && break; sleep 1
    done
    submit="ray job submit --address http://127.0.0.1:8265 --"
    (unset RAY_AUTH_TOKEN; $submit true) > /dev/null 2>&1; echo without the token: $?
    $submit python jobs/pipeline.py --out /tmp/out --workers 2 --shards 2 --num-train 80 --num-test 20 --epochs 1
    echo the job: $?
    """
    start = time.monotonic()
    code, output = pod.run(script, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    log = (pod.tmp / "head.log").read_text()
    assert code == 0, output + log
    assert "success" in output, output + log
    assert "without the token: 1" in output
    assert "the job: 0" in output, output
    runs = json.loads((pod.tmp / "out" / "report" / "report.json").read_text())["runs"]
    assert [run["splits"]["test"]["num_images"] for run in runs] == [20, 20]
    print(f"head, submission and the whole job: {time.monotonic() - start:.0f} s")
