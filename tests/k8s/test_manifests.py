"""The overlays as kubectl renders them: valid by strict schemas and rules, with the values they are meant to have."""

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import CRD, OVERLAYS, ROOT, Documents, Rendered, faults, render, schema_faults


@pytest.fixture(scope="module")
def rendered() -> dict[str, Documents]:
    return {name: render(name) for name in OVERLAYS}


def with_component(folder: Path, component: str, **settings: str) -> Documents:
    """An overlay of one's own, as docs/kubernetes.md tells to write it: `gpu` with a component and other settings."""
    # kustomize takes no absolute paths.
    up = "/".join([".."] * (len(folder.resolve().parts) - 1))
    own = {
        "resources": [f"{up}{ROOT}/k8s/overlays/gpu"],
        "components": [f"{up}{ROOT}/k8s/components/{component}"],
        "configMapGenerator": [
            {"name": "cifar-dist", "behavior": "merge", "literals": [f"{k}={v}" for k, v in settings.items()]}
        ],
        "namePrefix": "my-",
        "images": [{"name": "cifar-dist", "newName": "registry.example/cifar-dist", "newTag": "0.1.1"}],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(own))
    return render(folder)


def test_there_is_an_overlay_for_each_kind_of_cluster() -> None:
    assert OVERLAYS == ["cpu-local", "gpu", "gpu-elastic", "kueue"]


def test_the_schema_is_the_one_that_its_readme_names() -> None:
    content = CRD.read_bytes()
    blob = hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()  # as Git names it
    assert f"| {blob} |" in CRD.with_name("README.md").read_text()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_it_is_valid(overlay: str, rendered: dict[str, Documents]) -> None:
    assert faults(rendered[overlay]) == []
    assert sorted(d["kind"] for d in rendered[overlay]) == sorted(
        ("ConfigMap", "NetworkPolicy", "PersistentVolumeClaim", "PodDisruptionBudget", "RayJob", "ServiceAccount")
    )


@pytest.mark.parametrize(
    ("overlay", "workers", "replicas", "requests", "more"),
    [
        ("cpu-local", "2", (2, 2, 2), {"cpu": "1", "memory": "5Gi"}, ["--source", "shapes"]),
        ("gpu", "4", (1, 1, 1), {"cpu": "32", "memory": "128Gi", "nvidia.com/gpu": "4"}, ["--source", "cifar10"]),
        (
            *("gpu-elastic", "1:4", (1, 1, 4), {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "1"}),
            ["--checkpoint-every-seconds", "60"],
        ),
        ("kueue", "2", (2, 2, 2), {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "1"}, ["--source", "cifar10"]),
    ],
)
def test_its_patches_have_arrived(
    *, overlay: str, workers: str, replicas: tuple, requests: dict, more: list[str], rendered: dict[str, Documents]
) -> None:
    """A patch whose target or path matches nothing is passed over by kustomize without a word."""
    r = Rendered(rendered[overlay])
    worker = r.workers
    assert (worker["minReplicas"], worker["replicas"], worker["maxReplicas"]) == replicas
    assert r.containers["worker workers"]["resources"]["requests"] == requests
    command = r.command()
    assert command[:4] == ["python", "jobs/pipeline.py", "--out", "/storage/cifar-dist"]
    assert command[command.index("--workers") + 1] == workers
    assert " ".join(more) in " ".join(command)
    local = overlay == "cpu-local"
    recipes = ["quickstart_fan", "quickstart_resnet50v2"] if local else ["deck_fan", "deck_resnet50v2"]
    assert command[command.index("--recipes") + 1 :][:2] == recipes
    assert r.one("PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteOnce" if local else "ReadWriteMany"]
    queue = {"kueue.x-k8s.io/queue-name": "cifar-dist"} if overlay == "kueue" else {}
    assert r.job["metadata"]["labels"] == {"app.kubernetes.io/part-of": "cifar-dist", **queue}
    tolerated = [t["key"] for t in worker["template"]["spec"].get("tolerations", [])]
    spot = ["cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"]
    assert tolerated == [*["nvidia.com/gpu"] * (not local), *spot * (overlay == "gpu-elastic")]
    assert r.elastic == (overlay == "gpu-elastic")
    for template in r.templates.values():
        assert template["spec"]["containers"][0]["image"] == "cifar-dist:0.1.0"


def test_names_and_images_of_ones_own_reach_the_job_and_s3_takes_the_place_of_the_volume(tmp_path: Path) -> None:
    documents = with_component(tmp_path, "s3", OUT="s3://bucket/deck?region=eu-west-1&scheme=https")
    r = Rendered(documents)
    assert r.job["metadata"]["name"] == "my-cifar-dist"
    assert {c["image"] for c in r.containers.values()} == {"registry.example/cifar-dist:0.1.1"}
    assert not [d for d in documents if d["kind"] == "PersistentVolumeClaim"]
    for name in ("head", "worker workers"):
        assert r.containers[name]["envFrom"] == [{"secretRef": {"name": "cifar-dist-s3"}}]
        assert "storage" not in json.dumps(r.pods[name])
    assert r.command()[3] == "s3://bucket/deck?region=eu-west-1&scheme=https"
    assert faults(documents) == []


def test_workers_get_an_rdma_device_and_may_lock_memory_and_nobody_else(tmp_path: Path) -> None:
    documents = with_component(tmp_path, "rdma", WORKERS="4")
    containers = Rendered(documents).containers
    worker = containers.pop("worker workers")
    for part in ("requests", "limits"):
        assert worker["resources"][part]["rdma/rdma_shared_device_a"] == "1"
        assert worker["resources"][part]["nvidia.com/gpu"] == "4"
    assert worker["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert {"name": "NCCL_IB_HCA", "value": "mlx5"} in worker["env"]
    assert "rdma" not in json.dumps(containers)
    assert "IPC_LOCK" not in json.dumps(containers)
    assert faults(documents) == []


def examples(kind: str) -> list[dict[str, Any]]:
    """The YAML of docs/kubernetes.md of one kind."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "kubernetes.md").read_text(), re.DOTALL)
    return [d for block in blocks for d in yaml.safe_load_all(block) if d["kind"] == kind]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_overlays_that_the_docs_show_are_valid(number: int, tmp_path: Path) -> None:
    assert len(examples("Kustomization")) == 4  # the last is the subject of test_monitoring.py
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    own = tmp_path / "k8s" / "overlays" / "own"
    own.mkdir()
    (own / "kustomization.yaml").write_text(yaml.safe_dump(examples("Kustomization")[number]))
    documents = render(own)
    assert faults(documents) == []
    command = Rendered(documents).command()
    assert ("--epochs", "deck_fan", "s3://bucket/cifar-dist?region=eu-west-1")[number] in command


def test_the_reader_that_the_docs_show_is_valid_and_confined(rendered: dict[str, Documents]) -> None:
    (pod,) = examples("Pod")
    assert schema_faults(json.dumps(pod)) == ()
    job = Rendered(rendered["gpu"])
    mine, worker = pod["spec"], job.pods["worker workers"]
    assert mine["securityContext"].items() <= worker["securityContext"].items()
    assert mine["containers"][0]["securityContext"].items() <= worker["containers"][0]["securityContext"].items()
    assert mine["volumes"] == worker["volumes"][:1]
    assert mine["containers"][0]["image"] == worker["containers"][0]["image"]


@pytest.mark.parametrize("setting", ["OUT", "RECIPES", "WORKERS", "DATA"])
def test_a_setting_that_is_missing_stops_the_submitter(setting: str, rendered: dict[str, Documents]) -> None:
    documents = copy.deepcopy(rendered["gpu"])
    r = Rendered(documents)
    assert r.command()
    del r.settings[setting]
    assert r.command() == []


def keys(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every key of nested objects."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(value, dict):
            yield (*path, key)
        yield from keys(item, (*path, key))


# What may be left out: the defaults are sound, or it is then a job without a queue.
OPTIONAL = {"fsGroupChangePolicy", "terminationGracePeriodSeconds", "kueue.x-k8s.io/queue-name"}


@pytest.mark.parametrize("change", ["mistyped", "taken out"])
def test_a_field_that_is_mistyped_or_taken_out_is_found(change: str, rendered: dict[str, Documents]) -> None:
    seen, missed = set(), []
    for documents in rendered.values():
        for number, document in enumerate(documents):
            for path in keys(document):
                if (document["kind"], path) in seen:
                    continue
                seen.add((document["kind"], path))
                wrong = list(documents)
                wrong[number] = at = copy.deepcopy(document)
                for key in path[:-1]:
                    at = at[key]
                value = at.pop(path[-1])
                if change == "mistyped":
                    at[f"{path[-1]}x"] = value
                if not faults(wrong) and not (change == "taken out" and path[-1] in OPTIONAL):
                    missed.append((document["kind"], path))
    assert len(seen) > 250
    assert missed == []
