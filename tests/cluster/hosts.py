"""Several hosts on one machine: network namespaces on a bridge, each with its own address, files and processes."""

import contextlib
import os
import random
import secrets
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from job_process import run_command

RAY = str(Path(sys.executable).with_name("ray"))
HEAD = "head"


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


class Hosts:
    """A Ray head without CPUs and worker hosts with some, with token authentication; needs root.

    All see `folder`, as they would shared storage, but `folder`/own is each host's, as are /tmp/ray and /dev/shm.
    Nothing has a route out of the bridge. A context manager: whatever happens, hosts and bridge are taken down.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], num_cpus: int = 1) -> None:
        self.folder, self.num_cpus = folder, num_cpus
        self.own = folder / "own"
        self.own.mkdir()
        Path("/tmp/ray").mkdir(exist_ok=True)
        self.tag = f"cd{secrets.token_hex(3)}"  # interfaces have at most 15 characters
        net = f"10.{random.randint(64, 127)}.{random.randint(0, 255)}"
        self.addresses = {name: f"{net}.{i}" for i, name in enumerate((HEAD, *names), 1)}
        self.processes: dict[str, subprocess.Popen] = {}
        (folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in self.addresses.items())
        )
        self.environment = {
            **{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "GLOO_SOCKET_IFNAME": "eth0",
        }

    def __enter__(self) -> "Hosts":
        try:
            ip("link", "add", self.tag, "type", "bridge")
            ip("link", "set", self.tag, "up")
            for number, name in enumerate(self.addresses):
                space, cable = self.space(name), self.cable(name)
                ip("netns", "add", space)
                ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
                ip("link", "set", cable, "master", self.tag, "up")
                ip("-n", space, "addr", "add", f"{self.addresses[name]}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    ip("-n", space, "link", "set", device, "up")
                self.start(name)
                if number == 0:
                    self.wait_for_head()
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.kill(name)
        # The kernel takes the cables of a namespace down too, but some seconds later.
        parts = [("link", self.cable(name)) for name in self.addresses] + [("link", self.tag)]
        for kind, name in [*parts, *(("netns", self.space(name)) for name in self.addresses)]:
            with contextlib.suppress(subprocess.CalledProcessError):  # it was never made
                ip(kind, "delete", name)

    def space(self, name: str) -> str:
        return f"{self.tag}-{name}"

    def cable(self, name: str) -> str:
        return f"{self.tag}{name}"[:15]

    @property
    def url(self) -> str:
        return f"http://{self.addresses[HEAD]}:8265"

    def start(self, name: str) -> None:
        """Switches the host on: `ray start --block` is the first of its processes, and all end with it."""
        address = self.addresses[name]
        ray = [RAY, "start", f"--node-ip-address={address}", "--object-store-memory=150000000", "--block"]
        if name == HEAD:
            ray += ["--head", "--port=6379", "--num-cpus=0", "--dashboard-host=0.0.0.0"]
        else:
            ray += [f"--address={self.addresses[HEAD]}:6379", f"--num-cpus={self.num_cpus}"]
        script = [
            f"hostname {name}",
            "mount -t tmpfs tmpfs /tmp/ray",
            "mount -t tmpfs tmpfs /dev/shm",
            f"mount -t tmpfs tmpfs {shlex.quote(str(self.own))}",
            f"mount --bind {shlex.quote(str(self.folder / 'hosts'))} /etc/hosts",
            f"exec {shlex.join(ray)}",
        ]
        apart = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with open(self.folder / f"{name}.log", "a") as log:
            self.processes[name] = subprocess.Popen(
                ["ip", "netns", "exec", self.space(name), *apart, "bash", "-ec", "\n".join(script)],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """The plug is pulled: SIGKILL to the first process, which takes all others of its pid namespace along."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def link(self, name: str, state: str) -> None:
        """`down` cuts the host off, `up` joins it again."""
        ip("link", "set", self.cable(name), state)

    def wait_for_head(self) -> None:
        command = f"import urllib.request as r; r.urlopen({self.url + '/api/gcs_healthz'!r}, timeout=5)"
        end = time.monotonic() + 90
        while subprocess.run(
            self.inside(HEAD, sys.executable, "-c", command), capture_output=True, check=False
        ).returncode:
            assert self.processes[HEAD].poll() is None, self.log(HEAD)
            assert time.monotonic() < end, self.log(HEAD)
            time.sleep(0.5)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def inside(self, name: str, *command: str) -> list[str]:
        """The command on the host's network, with this machine's files and processes."""
        return ["ip", "netns", "exec", self.space(name), *command]

    def files(self, name: str) -> dict[str, tuple[int, int]]:
        """(inode, time of change in ns) of each of the host's own files under `own`."""
        first = self.first_process(name)
        find = ["find", str(self.own), "-type", "f", "-printf", "%P %i %T@\\n"]
        done = subprocess.run(
            ["nsenter", "--target", str(first), "--mount", *find], capture_output=True, text=True, check=True
        )
        rows = [line.rsplit(" ", 2) for line in done.stdout.splitlines()]
        return {path: (int(inode), int(float(time) * 1e3)) for path, inode, time in rows}

    def first_process(self, name: str) -> int:
        """The pid, on this machine, of the host's first process."""
        parent = self.processes[name].pid
        while True:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            if b"unshare" not in Path(f"/proc/{parent}/cmdline").read_bytes():
                return parent
            parent = int(children[0])

    def job(self, command: str, *words: str) -> tuple[int, str]:
        """(exit code, output) of `ray job COMMAND` on the head."""
        return run_command(self.inside(HEAD, RAY, "job", command, "--address", self.url, *words), self.environment)
