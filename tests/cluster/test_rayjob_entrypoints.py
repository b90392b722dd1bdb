"""The entrypoint of each RayJob, word for word as it was rendered, on a real Ray cluster.

The settings are given by the ConfigMap, as a user would give others: the folder, and (but for one overlay) less data.
The operator's submitter is a bash with the ConfigMap as its environment that calls `ray job submit -- ENTRYPOINT`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from job_process import Job, free_port, read_metrics, run_command, train_args, wait_until
from manifests import OVERLAYS, ROOT, Rendered, render
from ray_cluster import Nodes


def num_nodes(nodes: Nodes) -> int:
    return sum(node["Alive"] for node in nodes.cluster.global_state.node_table())


LESS = {
    "DATA": "--source shapes --num-train 60 --num-test 20",
    "OPTIONS": "--train-images 20 --global-batch-size 10 --epochs 1",
}


def submit(nodes: Nodes, overlay: str, **settings: str) -> tuple[int, str]:
    """(exit code, output) of the entrypoint as the submitter would run it; of the settings, OPTIONS adds to its own."""
    r = Rendered(render(overlay))
    assert settings.keys() <= r.settings.keys()
    settings["OPTIONS"] = f"{r.settings['OPTIONS']} {settings.get('OPTIONS', '')}"
    # The image has its environment on PATH and its jobs in the working folder, which is the cluster's own here too.
    path = json.dumps({"env_vars": {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}})
    address, cluster = f"http://{nodes.cluster.webui_url}", f"--runtime-env-json '{path}'"
    command = f"{Path(sys.executable).with_name('ray')} job submit --address {address} {cluster} -- "
    script = command + r.spec["entrypoint"]
    return run_command(["/bin/bash", "-ce", "--", script], {**os.environ, **r.settings, **settings})


def check_report(out: Path, recipes: str, num_test: int) -> None:
    runs = json.loads((out / "report" / "report.json").read_text())["runs"]
    assert [run["name"] for run in runs] == recipes.split()
    assert {run["model"] for run in runs} == {"fan", "resnet50v2"}
    assert all(run["splits"]["test"]["num_images"] == num_test for run in runs)
    assert (out / "report" / "report.html").exists()


def test_the_cluster_has_the_jobs_in_its_working_folder() -> None:
    assert Path.cwd() == ROOT, "run pytest in the project's folder"


@pytest.mark.slow
@pytest.mark.parametrize("overlay", [o for o in OVERLAYS if o != "cpu-local"])
def test_it_trains_both_networks_and_reports(overlay: str, nodes: Nodes, tmp_path: Path) -> None:
    more = [nodes.add()] if overlay == "gpu" else []  # four workers need four nodes of one CPU
    try:
        code, output = submit(nodes, overlay, OUT=str(tmp_path), **LESS)
    finally:
        for node in more:
            nodes.remove(node)
    assert code == 0, output
    assert "finished: best" in output
    check_report(tmp_path, "deck_fan deck_resnet50v2", 20)


@pytest.mark.slow
def test_the_local_overlay_runs_at_full_size_and_a_retry_goes_on_from_storage(nodes: Nodes, tmp_path: Path) -> None:
    for state in ("finished: best", "is finished already"):
        code, output = submit(nodes, "cpu-local", OUT=str(tmp_path))
        assert code == 0, output
        assert output.count(state) == 2, output
        check_report(tmp_path, "quickstart_fan quickstart_resnet50v2", 300)


@pytest.mark.slow
def test_a_pod_that_is_told_to_go_stores_a_checkpoint(nodes: Nodes, tiny_uri: str, tmp_path: Path) -> None:
    """Kubernetes sends SIGTERM to the pod's `ray start --block`, here with the environment of the worker's pod."""
    worker = Rendered(render("gpu-elastic")).containers["worker workers"]
    ray = [str(Path(sys.executable).with_name("ray")), "start", f"--address={nodes.address}", "--num-cpus=1", "--block"]
    pod = subprocess.Popen(
        [*ray, f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=100000000"],
        env={**os.environ, **{e["name"]: e["value"] for e in worker["env"] if e["name"] != "HOME"}},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run = tmp_path / "run"
    try:
        more = ["--checkpoint-every-steps", "0", "--epochs", "8"]
        wait_until(lambda: num_nodes(nodes) == 5)  # the head, three raylets, and the pod
        job = Job(*train_args(tiny_uri, tmp_path, "run", 4, *more))
        wait_until(lambda: any((run / "checkpoints").glob("*/meta.json")) or job.process.poll() is not None)
        pod.terminate()
        wait_until(lambda: pod.poll() is not None, timeout=45)  # terminationGracePeriodSeconds
        other = nodes.add()
        code, output = job.wait()
        nodes.remove(other)
    finally:
        pod.kill()
        pod.wait()
    assert code == 0, output
    assert "a node is about to be taken away: storing a checkpoint" in output
    steps = [line["global_step"] for line in read_metrics(run) if line["kind"] == "step"]
    assert steps == list(range(1, 33))
