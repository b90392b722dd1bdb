"""The connection to a Ray cluster, or to one started on this machine. Ray Train and torch are not imported."""

import atexit
import contextlib
import importlib
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

from cifar_dist import stopping
from cifar_dist.cpus import num_cpus
from cifar_dist.data.private import default_folder, private_folder
from cifar_dist.environment import MARK, job_config_fault, ray_folder, set_up_local_cluster, uses_tls, without_mark
from cifar_dist.errors import UserError

CONNECT_SECONDS = 5  # for a host to answer
JOIN_SECONDS = 30  # for a cluster to take the driver in; Ray itself tries for a quarter of an hour
HOST_AND_PORT = re.compile(r"([^:/\s]+|\[.+\]):(\d{1,5})")
# What a client of HTTP/2 sends first: a fixed text, and a frame of 0 settings; and the type of a server's first frame.
HTTP2_PREFACE, HTTP2_SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), b"\4"
# Ray's longest socket behind its temporary folder, and the longest path of a socket on Linux.
SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
LONGEST_SOCKET = 107
# Once the driver has ended, however that came, kills the processes whose environment holds argv[1], which only those of
# its cluster do: Ray's agents outlive a driver that was killed. Gives up on one that argv[2] seconds do not end.
GUARDIAN = """
import os, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
sys.stdin.read()
mark, end, num_empty = sys.argv[1].encode(), time.monotonic() + float(sys.argv[2]), 0
while num_empty < 20 and time.monotonic() < end:  # a process that is just being started shows no environment
    num_empty += 1
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if mark in file.read().split(b"\\0"):
                    num_empty = 0
                    os.kill(int(pid), signal.SIGKILL)
        except OSError:
            pass
    time.sleep(0.1)
"""
GUARDIAN_SECONDS = 30.0

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
    """Starts a cluster on this machine that nobody else can reach and that ends with this process.

    Raises UserError if Ray cannot start here.
    """
    folder, mark = temporary_folder(), secrets.token_hex(16)
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    start_guardian(mark)
    set_up_local_cluster(mark, secrets.token_hex(32), loopback)
    AuthenticationTokenLoader.instance().reset_cache()  # of a cluster that this process had before
    # Ray replaces 127.0.0.1 by an address that other machines reach, except where clusters are off, as on Windows.
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Ray's processes take seconds to start, torch takes one to import, and both are needed next.
    torch_import = threading.Thread(target=importlib.import_module, args=("torch",))
    torch_import.start()
    try:
        with no_sigterm(), own_handlers():
            ray.init(
                address="local",
                num_cpus=max(num_cpus(), num_workers),  # more workers than cores is slow but sound: a rehearsal
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
    except (RuntimeError, OSError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"Ray did not start on this machine: {first_line(error)}; its logs are in {folder}/session_latest/logs"
        ) from error
    finally:
        torch_import.join()
    node: Any = ray._private.worker._global_node
    # It follows the workers' output for the driver, which is quiet. ray.init() cannot leave it out.
    node.kill_log_monitor()
    # ray.shutdown() sends SIGTERM, which they never get, and waits a second for each of them.
    end_processes = node.kill_all_processes
    node.kill_all_processes = lambda **_: end_processes(check_alive=False, allow_graceful=False)
    atexit.register(ray.shutdown)  # before Ray's own, which first sleeps half a second


def session_folder() -> str:
    """The folder of Ray's session, which ends with the cluster. Any process of the cluster may ask for it."""
    return ray._private.worker._global_node.get_session_dir_path()  # type: ignore[attr-defined]


@contextmanager
def no_sigterm() -> Iterator[None]:
    """Processes that are started in here never get SIGTERM: where all processes of a job get it at once, as from
    systemd or Slurm, the workers store a checkpoint first, and end with the driver."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def own_handlers() -> Iterator[None]:
    """In here ray.init() leaves this process's handler of SIGTERM alone: its own would exit with 15, without a word."""
    theirs = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = theirs


def start_guardian(mark: str) -> None:
    """A process that waits for this one to end, and then ends what it has started."""
    guardian = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", GUARDIAN, f"{MARK}={mark}", str(GUARDIAN_SECONDS)],
        stdin=subprocess.PIPE,  # closed by the kernel when this process ends
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env=without_mark(),
    )
    guardians.append(guardian)  # as long as this process: what would be collected would close the pipe


def temporary_folder() -> str:
    """Where Ray keeps its sockets and logs: in a folder of this user alone, with a path that is short enough.

    Ray opens its own folder to every user, so it lies inside one that is closed.
    """
    bases = [ray_folder() or default_folder(), "/tmp", "/var/tmp", "/dev/shm"]
    for base in bases:
        folder = Path(base) / f"cifar_dist-ray-{os.geteuid()}"
        path = str(folder / "r")
        # Ray splits its processes' command lines at spaces.
        fits = len(os.fsencode(path + SOCKET)) <= LONGEST_SOCKET and re.fullmatch(r"[!-~]+", path)
        if fits and os.access(base, os.W_OK | os.X_OK):
            with contextlib.suppress(UserError):  # a link, or somebody else's
                private_folder(folder)
                return path
    longest = LONGEST_SOCKET - len(path + SOCKET) + len(base)
    raise UserError(
        f"Ray's sockets need a folder that can be written to, with a path of at most {longest} plain characters, and "
        f"{' and '.join(dict.fromkeys(bases))} are not such folders; set RAY_TMPDIR to one"
    )


def join(address: str) -> None:
    """Connects to a running cluster. Raises UserError within seconds where there is none."""
    check_address(address)
    if fault := job_config_fault():
        raise UserError(fault)
    watch = threading.Timer(JOIN_SECONDS, give_up, [address])  # names that no server resolves take long, too
    watch.daemon = True
    watch.start()
    try:
        if address == "auto":  # the cluster that Ray's file in the temporary folder names, or one that runs here
            address = services.canonicalize_bootstrap_address(address) or address
        if (match := HOST_AND_PORT.fullmatch(address)) and not uses_tls():
            check_port(match[1].strip("[]"), int(match[2]))
    except (OSError, OverflowError, ValueError) as error:
        watch.cancel()
        raise UserError(
            f"no Ray cluster answers at {address}: {first_line(error)}; check --address, or unset RAY_ADDRESS"
        ) from error
    try:
        with own_handlers():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(refusal(address, first_line(error))) from error
    finally:
        watch.cancel()


def refusal(address: str, reason: str) -> str:
    return (
        f"what answers at {address} does not let this job in: {reason}; is it a Ray cluster, of the same version and "
        "with the same token (RAY_AUTH_MODE, RAY_AUTH_TOKEN)? Check --address, or unset RAY_ADDRESS"
    )


def check_port(host: str, port: int) -> None:
    """Raises OSError unless a gRPC server answers, as a Ray cluster's is; Ray itself would try for minutes."""
    with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
        connection.sendall(HTTP2_PREFACE)
        answer = b""
        while len(answer) < 4 and (part := connection.recv(4 - len(answer))):
            answer += part
    if answer[3:4] != HTTP2_SETTINGS:
        raise OSError(f"what listens at port {port} of {host} is not Ray")


def check_address(address: str) -> None:
    """Raises UserError for an address of another kind than HOST:PORT or auto."""
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
    if not HOST_AND_PORT.fullmatch(address) and address != "auto":
        raise UserError(
            f"{address!r} is no address of a Ray cluster; --address and RAY_ADDRESS are HOST:PORT, or unset"
        )


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")


def give_up(address: str) -> None:
    """Ends the process: ray.init() cannot be called back."""
    print(f"error: {refusal(address, f'nothing has come of it in {JOIN_SECONDS} s')}", file=sys.stderr, flush=True)
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
