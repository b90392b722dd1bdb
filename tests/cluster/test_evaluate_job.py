"""jobs/evaluate.py and jobs/pipeline.py on a real Ray cluster, in separate hosts' raylets, and on S3."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from job_process import Job, run_job, train_args, wait_until
from moto.server import ThreadedMotoServer
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray_cluster import Nodes

from cifar_dist.data.staged import DataSet
from cifar_dist.errors import UserError
from cifar_dist.evaluate import driver, shard
from cifar_dist.launch.cluster import connect
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.storage import Folder


def integers(report: Path) -> dict:
    run = json.loads((report / "report.json").read_text())["runs"][0]
    return {split: values["counts"] for split, values in run["splits"].items()}


@pytest.fixture(scope="module")
def one_shard(whole_run: tuple[Path, str], tiny_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    code, output = run_job(
        *("evaluate.py", "--runs", str(whole_run[0]), "--data", tiny_uri, "--out", str(out), "--shards", "1"),
        *("--precision", "fp32"),
    )
    assert code == 0, output
    assert json.loads((out / "report.json").read_text())["runs"][0]["evaluation_precision"] == "fp32"
    return out


def test_every_image_is_predicted_exactly_once(one_shard: Path) -> None:
    sizes = {"train": 40, "validation": 20, "test": 40}
    ids = {}
    for split, size in sizes.items():
        table = pq.read_table(one_shard / "predictions" / f"whole-{split}.parquet")
        ids[split] = table["id"].to_pylist()
        assert len(ids[split]) == len(set(ids[split])) == size
        assert np.sum(integers(one_shard)[split]["confusion"]) == size
        correct = np.sum(table["label"].to_numpy() == table["prediction_1"].to_numpy())
        assert np.trace(integers(one_shard)[split]["confusion"]) == correct
    assert ids["test"] == list(range(40))
    assert not set(ids["train"]) & set(ids["validation"])


def test_any_number_of_shards_gives_the_same_integers_and_a_killed_shard_is_retried(
    one_shard: Path, whole_run: tuple[Path, str], tiny_uri: str, tmp_path: Path
) -> None:
    job = Job(
        *("evaluate.py", "--runs", str(whole_run[0]), "--data", tiny_uri, "--out", str(tmp_path), "--shards", "3"),
        *("--precision", "fp32"),
        local=True,
    )
    wait_until(lambda: job.family("ray::evaluate_shard"))
    assert job.kill("ray::evaluate_shard")
    code, output = job.wait()
    assert code == 0, output
    assert integers(tmp_path) == integers(one_shard)
    for split in integers(one_shard):
        name = Path("predictions") / f"whole-{split}.parquet"
        assert pq.read_table(tmp_path / name).equals(pq.read_table(one_shard / name))


@pytest.fixture
def connected(nodes: Nodes) -> Iterator[None]:
    """This process is the driver: the tests say what its tasks run."""
    connect(nodes.address, 1)
    yield
    ray.shutdown()


def dying(num_deaths: int, attempts: Path) -> Callable[[shard.Shard], dict]:
    """evaluate_shard, whose worker process dies in the last shard's first attempts; each leaves a line in a file."""

    def evaluate_shard(given: shard.Shard) -> dict:
        if given.index == given.num_shards - 1:
            with open(attempts, "a") as file:
                file.write("tried\n")
            if len(attempts.read_text().splitlines()) <= num_deaths:
                os.kill(os.getpid(), signal.SIGKILL)
        return shard.evaluate_shard(given)

    return evaluate_shard


@pytest.mark.usefixtures("connected")
def test_a_shard_that_is_lost_three_times_comes_with_the_fourth_attempt(
    one_shard: Path, whole_run: tuple[Path, str], tiny_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = tmp_path / "attempts"
    monkeypatch.setattr(driver, "evaluate_shard", dying(3, attempts))
    data = DataSet.open(tiny_uri)
    chosen = driver.choose([str(whole_run[0])], data)
    (found,) = driver.evaluate(chosen, data, str(tmp_path), num_shards=2, precision="fp32")
    assert len(attempts.read_text().splitlines()) == 4
    assert {split: counts.to_dict() for split, counts in found.counts.items()} == integers(one_shard)
    for split, table in found.predictions.items():
        assert table.equals(pq.read_table(one_shard / "predictions" / f"whole-{split}.parquet"))


@pytest.mark.usefixtures("connected")
def test_a_shard_that_is_lost_four_times_is_given_up(
    whole_run: tuple[Path, str], tiny_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = tmp_path / "attempts"
    monkeypatch.setattr(driver, "evaluate_shard", dying(100, attempts))
    data = DataSet.open(tiny_uri)
    chosen = driver.choose([str(whole_run[0])], data)
    with pytest.raises(UserError, match="an evaluation shard was lost more than 3 times"):
        driver.evaluate(chosen, data, str(tmp_path), num_shards=1)
    assert len(attempts.read_text().splitlines()) == 4
    assert not list(tmp_path.glob("predictions/*"))


def test_a_shard_on_a_gpu_has_a_process_of_its_own(nodes: Nodes) -> None:
    """Ray counts GPUs that it is told of, so this needs none."""
    node = nodes.cluster.add_node(num_cpus=1, num_gpus=1)
    connect(nodes.address, 1)
    try:
        for gpu, num_processes in ((True, 3), (False, 1)):
            task = driver.task_of(lambda: os.getpid(), gpu=gpu)  # noqa: PLW0108 - Ray takes no built-in function
            where = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            pids = [ray.get(task.options(scheduling_strategy=where).remote()) for _ in range(3)]
            assert len(set(pids)) == num_processes
    finally:
        ray.shutdown()
        nodes.cluster.remove_node(node)


def test_a_run_of_another_data_set_is_refused(whole_run: tuple[Path, str], shapes_uri: str, tmp_path: Path) -> None:
    code, output = run_job("evaluate.py", "--runs", str(whole_run[0]), "--data", shapes_uri, "--out", str(tmp_path))
    assert code == 1
    assert "was trained on another data set" in output
    assert "Traceback" not in output
    assert not (tmp_path / "report.json").exists()


def test_the_main_job_reports_both_models_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    args = (
        *("pipeline.py", "--out", str(tmp_path), "--num-train", "80", "--num-test", "20", "--workers", "2"),
        *("--train-images", "40", "--global-batch-size", "20", "--epochs", "1", "--shards", "2"),
    )
    code, output = run_job(*args)
    assert code == 0, output
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [run["model"] for run in report["runs"]] == ["fan", "resnet50v2"]
    assert all(run["splits"]["test"]["num_images"] == 20 for run in report["runs"])
    assert all(run["evaluation_precision"] == run["run_card"]["precision"] for run in report["runs"])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "quickstart_fan" in page
    assert "quickstart_resnet50v2" in page
    code, output = run_job(*args)
    assert code == 0, output
    assert output.count("is finished already") == 2
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report


@pytest.mark.slow
def test_two_raylets_share_a_run(tiny_uri: str, tmp_path: Path) -> None:
    """A head without CPUs and two nodes of one CPU: a worker on each, data staged by each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        more = ["--address", cluster.address, "--staging-folder", str(tmp_path / "staged"), "--epochs", "1"]
        code, output = run_job(*train_args(tiny_uri, tmp_path, "run", 2, *more))
        assert code == 0, output
        too_many = run_job(*train_args(tiny_uri, tmp_path, "other", 3, *more))
        assert too_many[0] == 1
        assert "3 workers need a CPU each, the cluster has 2" in too_many[1]
        evaluate = ("--runs", str(tmp_path / "run"), "--data", tiny_uri, "--out", str(tmp_path / "report"))
        code, output = run_job("evaluate.py", *evaluate, "--address", cluster.address)
        assert code == 0, output
        assert "run test:" in output
    finally:
        cluster.shutdown()


def test_data_run_and_report_on_s3(tmp_path: Path) -> None:
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        _, port = server.get_host_and_port()
        env = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
        options = f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        code, output = run_job(
            *("pipeline.py", "--out", f"s3://bucket/job{options}", "--num-train", "60", "--num-test", "20"),
            *("--recipes", "quickstart_resnet50v2", "--train-images", "20", "--global-batch-size", "10"),
            *("--epochs", "1", "--shards", "1", "--staging-folder", str(tmp_path)),
            env=env,
            local=True,
        )
        assert code == 0, output
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            folder = Folder(f"s3://bucket/job{options}")
            assert {"data", "report", "runs"} <= set(folder.names())
            assert Checkpoints(f"s3://bucket/job/runs/quickstart_resnet50v2{options}").best()
            report = folder.read("report/report.json")
            assert json.loads(report)["runs"][0]["splits"]["test"]["num_images"] == 20
            assert b"AWS_SECRET" not in report
    finally:
        server.stop()
