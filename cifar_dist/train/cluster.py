"""The connection to a Ray cluster, or to one started on this machine. Ray Train and torch are not imported."""

import atexit
import importlib
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from cifar_dist import stopping
from cifar_dist.config import set_up_local_cluster
from cifar_dist.cpus import num_cpus
from cifar_dist.errors import UserError

CONNECT_SECONDS = 5  # for a host to answer
JOIN_SECONDS = 30  # for a cluster to take the driver in; Ray itself tries for a quarter of an hour
# Ray's longest socket behind its temporary folder, and the longest path of a socket on Linux.
SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
LONGEST_SOCKET = 107
MARK = "CIFAR_DIST_CLUSTER"  # in the environment of all processes of a cluster that was started here
# Kills them when the driver has ended, however that came: Ray's agents outlive a driver that was killed.
GUARDIAN = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
sys.stdin.read()
found = True
while found:
    found = False
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if sys.argv[1].encode() in file.read():
                    found = True
                    os.kill(int(pid), signal.SIGKILL)
        except OSError:
            pass
"""


guardians: list[subprocess.Popen] = []


def connect(address: str | None, num_workers: int) -> None:
    """Connects to the Ray cluster at `address`, or starts one on this machine if it is None or 'local'."""
    if ray.is_initialized():
        return
    if address in (None, "local"):
        start(num_workers)
    else:
        join(str(address))
    stopping.listen()  # ray.init() has put handlers of its own in place


def start(num_workers: int) -> None:
    """Starts a cluster on this machine that nobody else can reach and that ends with this process."""
    set_up_local_cluster()
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    mark = secrets.token_hex(16)
    start_guardian(mark)
    os.environ |= {
        # A password of its own, which Ray would else keep in the home folder; there may be none to write to.
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        MARK: mark,
    }
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_REDIS_ADDRESS"):
        os.environ.pop(name, None)
    # Ray's processes take seconds to start, torch takes one to import, and both are needed next.
    torch_import = threading.Thread(target=importlib.import_module, args=("torch",))
    torch_import.start()
    try:
        with no_sigterm():
            ray.init(
                address="local",
                num_cpus=max(num_cpus(), num_workers),  # more workers than cores is slow but sound: a rehearsal
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
                _temp_dir=temporary_folder(),
            )
    finally:
        torch_import.join()
    # It follows the workers' output for the driver, which is quiet. ray.init() cannot leave it out.
    ray._private.worker._global_node.kill_log_monitor()  # type: ignore[attr-defined]
    atexit.register(ray.shutdown)  # before Ray's own, which first sleeps half a second


@contextmanager
def no_sigterm() -> Iterator[None]:
    """Processes that are started in here never get SIGTERM: where all processes of a job get it at once, as from
    systemd or Slurm, the workers store a checkpoint first, and end with the driver."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_guardian(mark: str) -> None:
    """A process that waits for this one to end."""
    guardian = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", GUARDIAN, mark],
        stdin=subprocess.PIPE,  # closed by the kernel when this process ends
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env={name: value for name, value in os.environ.items() if name != MARK},
    )
    guardians.append(guardian)  # as long as this process: what would be collected would close the pipe


def temporary_folder() -> str | None:
    """Where Ray keeps its files: None for its own choice, or a folder whose sockets have short paths."""
    chosen = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(f"{chosen}/ray{SOCKET}") <= LONGEST_SOCKET and os.access(chosen, os.W_OK):
        return None
    for base in ("/tmp", "/var/tmp", "/dev/shm"):
        if os.access(base, os.W_OK | os.X_OK):
            folder = tempfile.mkdtemp(prefix="ray-", dir=base)
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            return folder
    raise UserError(
        f"Ray's sockets need a folder with a short path: {chosen} has {len(chosen)} characters or cannot be written; "
        f"set RAY_TMPDIR to one of at most {LONGEST_SOCKET - len('/ray' + SOCKET)}"
    )


def join(address: str) -> None:
    """Connects to a running cluster. Raises UserError within seconds where there is none."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{address} is the address of a dashboard, which `ray job submit --address` takes; --address and "
            "RAY_ADDRESS of this job are HOST:PORT of the cluster itself (6379 by default), or unset"
        )
    if address.startswith("ray://"):
        raise UserError(
            f"{address} is an address of Ray Client, through which Ray Train does not run; submit the job with "
            "`ray job submit`, or give HOST:PORT of the cluster itself (6379 by default)"
        )
    match = re.fullmatch(r"([^:/\s]+|\[.+\]):(\d{1,5})", address)
    if not match and address != "auto":
        raise UserError(
            f"{address!r} is no address of a Ray cluster; --address and RAY_ADDRESS are HOST:PORT, or unset"
        )
    if match:
        try:
            socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"no Ray cluster answers at {address}: {error}; check --address, or unset RAY_ADDRESS"
            ) from error
    watch = threading.Timer(JOIN_SECONDS, give_up, [address])
    watch.daemon = True
    watch.start()
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}; check --address, or unset RAY_ADDRESS"
        ) from error
    finally:
        watch.cancel()


def give_up(address: str) -> None:
    """Ends the process: ray.init() cannot be called back."""
    print(
        f"error: what answers at {address} has not let this job in for {JOIN_SECONDS} s: is it a Ray cluster of this "
        "version, and alive? Check --address, or unset RAY_ADDRESS",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def count_resource(name: str) -> int:
    """CPUs or GPUs of the connected cluster."""
    return int(ray.cluster_resources().get(name, 0))


def uses_gpu(device: str, num_tasks: int = 1) -> bool:
    """Whether `auto`, `cpu` or `gpu` means a GPU on the connected cluster. Raises UserError if there are too few."""
    num_gpus = count_resource("GPU")
    gpu = device == "gpu" or (device == "auto" and num_gpus > 0)
    if gpu and num_gpus < num_tasks:
        raise UserError(f"{num_tasks} workers need a GPU each, the cluster has {num_gpus}; use --device cpu or fewer")
    return gpu
