"""A Ray cluster as `ray start --head` makes it, with token authentication, and `ray job submit` to it."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from job_process import ROOT, free_port, run_command

RAY = str(Path(sys.executable).with_name("ray"))


class HeadNode:
    """One node of two CPUs in a folder of its own: two raylets that share one cannot unpack the same upload."""

    def __init__(self) -> None:
        # Sockets have short names, and pytest's folders long ones.
        self.temp = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        self.folder = Path(self.temp.name)
        self.url = f"http://127.0.0.1:{free_port()}"
        self.environment = {
            **{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            "PATH": f"{Path(RAY).parent}:{ROOT / '.uv' / 'bin'}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "HOME": self.temp.name,  # no token file of this machine's user
        }
        ports = ["--port", "--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--ray-client-server-port"]
        command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=200000000"]
        command += [f"--temp-dir={self.folder}", f"--dashboard-port={self.url.rpartition(':')[2]}"]
        command += [f"{option}={free_port()}" for option in ports]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the head
        self.process = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=subprocess.STDOUT)
        end = time.monotonic() + 60
        while not self.is_healthy():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.2)

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/api/gcs_healthz", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def job(self, command: str, *words: str, token: bool = True) -> tuple[int, str]:
        """(exit code, output) of `ray job COMMAND --address ... WORDS`, in the project's folder."""
        environment = {k: v for k, v in self.environment.items() if token or k != "RAY_AUTH_TOKEN"}
        return run_command([RAY, "job", command, "--address", self.url, *words], environment)

    def details(self, submission_id: str) -> dict:
        """What the cluster says of a submitted job."""
        header = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(f"{self.url}/api/jobs/{submission_id}", headers=header)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    def answer_without_token(self, path: str) -> int:
        """The HTTP status."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def uploads(self) -> list[Path]:
        """The unpacked working folders of submitted jobs."""
        return sorted(p for p in self.folder.glob("session_2*/runtime_resources/working_dir_files/*") if p.is_dir())

    def processes(self, name: str = "") -> list[int]:
        """Pids of the cluster's processes, jobs and workers too, whose command line holds `name`."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                mine = f"HOME={self.temp.name}\0".encode() in (folder / "environ").read_bytes()
                if mine and name.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return sorted(found)

    def stop(self) -> None:
        """At once: told to end, a node would first wait for what runs on it."""
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.1)
        self.temp.cleanup()
