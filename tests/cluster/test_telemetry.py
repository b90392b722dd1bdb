"""What a run exports for Prometheus, scraped from the real endpoint while it runs and after a worker was killed."""

import contextlib
import os
import re
import signal
import urllib.request
from pathlib import Path

from job_process import Job, read_metrics, train_args, wait_until
from ray_cluster import Nodes

from cifar_dist.launch.progress import GAUGES


def scrape(nodes: Nodes) -> dict[str, float]:
    """Metric with its labels -> value, of all nodes."""
    found = {}
    for node in nodes.cluster.global_state.node_table():
        if node["Alive"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            # On a busy machine an agent may take its time: it is asked again.
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
                for line in answer.read().decode().splitlines():
                    if not line.startswith("#"):
                        name, _, value = line.rpartition(" ")
                        found[name] = float(value)
    return found


def of_run(nodes: Nodes, run: str) -> dict[str, float]:
    """The run's gauges by their short names."""
    found = {}
    for name, value in scrape(nodes).items():
        match = re.match(r"ray_cifar_dist_(\w+)\{(.*)\}", name)
        if match and f'run="{run}"' in match[2]:
            assert 'model="resnet50v2"' in match[2]
            assert match[1] not in found
            found[match[1]] = value
    return found


def test_prometheus_gets_what_training_measures(nodes: Nodes, tiny_uri: str, tmp_path: Path) -> None:
    job = Job(*train_args(tiny_uri, tmp_path, "scraped", 2, "--epochs", "200", "--checkpoint-every-steps", "1"))

    seen: dict[str, float] = {}

    def is_there(recoveries: int) -> bool:
        assert job.process.poll() is None, job.wait()
        seen.update(of_run(nodes, "scraped"))
        return set(seen) == set(GAUGES) and seen["recoveries"] == recoveries

    wait_until(lambda: is_there(0))
    os.kill(nodes.train_workers()[0], signal.SIGKILL)
    wait_until(lambda: is_there(1))

    def is_logged(name: str) -> bool:
        """The gauges are ahead of the log, which is written with each checkpoint: what they said comes into it."""
        assert job.process.poll() is None, job.wait()
        return seen[name] in [line[name] for line in read_metrics(tmp_path / "scraped") if name in line]

    wait_until(lambda: is_logged("train_loss"))
    wait_until(lambda: is_logged("validation_accuracy"))
    lines = read_metrics(tmp_path / "scraped")
    assert seen["num_workers"] == 2
    assert 0 < seen["images_per_second"] < 10_000
    assert 0 <= seen["data_wait_share"] <= 1
    assert 0 <= seen["communication_share"] <= 1
    assert 0 < seen["global_step"] <= lines[-1]["global_step"] + 100

    def of_nodes() -> set[str]:
        return {name.partition("{")[0] for name in scrape(nodes)}

    wait_until(lambda: {"ray_node_cpu_utilization", "ray_node_mem_used"} <= of_nodes())  # which the dashboard shows too
