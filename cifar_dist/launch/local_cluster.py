"""Starts a Ray cluster on this machine that ends with the job and that other machines cannot reach."""

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

import ray

from cifar_dist.cpus import num_cpus
from cifar_dist.data.private import default_folder, private_folder
from cifar_dist.environment import MARK, ray_folder, set_up_local_cluster, without_mark
from cifar_dist.errors import UserError, first_line
from cifar_dist.launch import ray_private

# Ray's longest socket path below its temporary folder, and the longest socket path on Linux.
SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
LONGEST_SOCKET = 107
# Ray's agents outlive a driver that has ended. After the driver's end, this script kills the processes of its cluster:
# those with argv[1] in their environment and those that write to files of Ray's session, whose folder the driver sent.
# The agents need the second rule: they write their title over their environment. It gives up after argv[2] seconds.
GUARDIAN = """
import os, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
driver = str(os.getppid())  # it may still be on its way out
session = sys.stdin.read()
mark, end, num_empty = sys.argv[1].encode(), time.monotonic() + float(sys.argv[2]), 0

def writes(pid):
    for fd in os.listdir(f"/proc/{pid}/fd") if session else ():
        if os.readlink(f"/proc/{pid}/fd/{fd}").startswith(session + "/"):
            with open(f"/proc/{pid}/fdinfo/{fd}") as file:
                flags = next(line.split()[1] for line in file if line.startswith("flags:"))
            if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
                return True
    return False

while num_empty < 20 and time.monotonic() < end:  # a process that is just being started shows no environment
    num_empty += 1
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                is_ours = pid != driver and (mark in file.read().split(b"\\0") or writes(pid))
            if is_ours:
                num_empty = 0
                os.kill(int(pid), signal.SIGKILL)
        except OSError:
            pass
    time.sleep(0.1)
"""
GUARDIAN_SECONDS = 30.0

guardians: list["Guardian"] = []


def start(num_workers: int) -> None:
    """Starts a cluster on this machine that only this user can reach and that ends with this process.

    Raises UserError if Ray cannot start here.
    """
    folder, mark = temporary_folder(), secrets.token_hex(16)
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    guardian = Guardian(mark)
    set_up_local_cluster(mark, secrets.token_hex(32), loopback)
    ray_private.forget_token()  # of an earlier cluster of this process
    ray_private.stay_on_loopback()
    # Ray's processes take seconds to start. Importing torch, which is needed next, takes one, so do both at once.
    torch_import = threading.Thread(target=importlib.import_module, args=("torch",))
    torch_import.start()
    try:
        with no_sigterm(), ray_private.own_handlers():
            context = ray.init(
                address="local",
                num_cpus=max(num_cpus(), num_workers),  # more workers than cores are slow, but allowed for trials
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **ray_private.own_cluster_settings(folder),
            )
    except (RuntimeError, OSError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"Ray did not start on this machine: {first_line(error)}; its logs are in {folder}/session_latest/logs"
        ) from error
    finally:
        torch_import.join()
    guardian.tell(context.address_info["session_dir"])  # type: ignore[attr-defined]
    ray_private.trim_own_cluster()
    atexit.register(ray.shutdown)  # runs before Ray's own exit handler, which first sleeps half a second


@contextmanager
def no_sigterm() -> Iterator[None]:
    """Blocks SIGTERM in the processes that are started within the context.

    systemd and Slurm send SIGTERM to all processes of a job at once. The workers can then still store a checkpoint;
    they end with the driver."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Guardian:
    """A process that waits for this process to end, and then kills the processes of its cluster."""

    def __init__(self, mark: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", GUARDIAN, f"{MARK}={mark}", str(GUARDIAN_SECONDS)],
            stdin=subprocess.PIPE,  # closed by the kernel when this process ends
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env=without_mark(),
            text=True,
        )
        guardians.append(self)  # keeps the pipe open: garbage collection would close it

    def tell(self, session_folder: str) -> None:
        """Tells it the folder of Ray's session."""
        assert self.process.stdin
        self.process.stdin.write(os.path.realpath(session_folder))  # as /proc names files
        self.process.stdin.flush()


def temporary_folder() -> str:
    """Returns a folder for Ray's sockets and logs, which only this user can open and whose path is short enough.

    Ray makes its own folder accessible to every user, so the parent folder is private.
    """
    bases = [ray_folder() or default_folder(), "/tmp", "/var/tmp", "/dev/shm"]
    for base in bases:
        folder = Path(base) / f"cifar_dist-ray-{os.geteuid()}"
        path = str(folder / "r")
        # Ray splits its processes' command lines at spaces.
        fits = len(os.fsencode(path + SOCKET)) <= LONGEST_SOCKET and re.fullmatch(r"[!-~]+", path)
        if fits and os.access(base, os.W_OK | os.X_OK):
            with contextlib.suppress(UserError):  # the folder is a link, or belongs to another user
                private_folder(folder)
                return path
    longest = LONGEST_SOCKET - len(path + SOCKET) + len(base)
    raise UserError(
        f"Ray's sockets need a folder that can be written to, with a path of at most {longest} plain characters, and "
        f"{' and '.join(dict.fromkeys(bases))} are not such folders; set RAY_TMPDIR to one"
    )
