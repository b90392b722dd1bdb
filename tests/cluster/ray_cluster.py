"""A Ray cluster of several raylets on this machine, whose nodes can be killed, drained and added."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from job_process import free_port
from ray.cluster_utils import Cluster


class Nodes:
    """A head without CPUs and `num_nodes` worker nodes of one CPU each."""

    def __init__(self, num_nodes: int, num_cpus: int = 1) -> None:
        self.num_cpus = num_cpus
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": True, "dashboard_port": free_port()},
        )
        self.nodes: list[Any] = []
        for _ in range(num_nodes):
            self.add()

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self) -> Any:
        self.nodes.append(self.cluster.add_node(num_cpus=self.num_cpus, num_gpus=0))
        return self.nodes[-1]

    def of_process(self, pid: int) -> Any:
        """The node whose raylet brought forth the process."""
        return next(n for n in self.nodes if raylet_pid(n) in ancestors(pid))

    def kill(self, node: Any) -> None:
        """SIGKILL to its raylet, then to all that the raylet has started, as when a machine is lost."""
        raylet = raylet_pid(node)
        started = [int(f.name) for f in Path("/proc").glob("[0-9]*") if raylet in ancestors(int(f.name))]
        for pid in [raylet, *started]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.nodes.remove(node)

    def remove(self, node: Any) -> None:
        """Takes it down in good order, so that the cluster knows at once."""
        self.cluster.remove_node(node)
        self.nodes.remove(node)

    def drain(self, node: Any, deadline_seconds: int) -> None:
        """What a cloud's notice becomes: the node will be taken away."""
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.address]
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        subprocess.run(
            [*command, "--node-id", node.node_id, *why, "--deadline-remaining-seconds", str(deadline_seconds)],
            check=True,
            capture_output=True,
        )

    def replace(self, node: Any) -> None:
        """A new node for one that has gone or is about to go."""
        self.kill(node)
        self.add()

    def train_workers(self) -> list[int]:
        """Pids of Ray Train's workers on this cluster."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, StopIteration):
                if b"RayTrainWorker" in (folder / "cmdline").read_bytes():
                    self.of_process(int(folder.name))
                    found.append(int(folder.name))
        return sorted(found)

    def stop(self) -> None:
        with contextlib.suppress(Exception):  # nodes that a test has killed
            self.cluster.shutdown()


def ancestors(pid: int) -> set[int]:
    """The process and those that brought it forth; none if it has ended."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        while pid > 1:
            found.add(pid)
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def raylet_pid(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid
