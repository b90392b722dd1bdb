"""k8s/rayjob.yaml against KubeRay's CRD, made strict: a field that the CRD does not know fails."""

import copy
import importlib
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CRD = ROOT.parent / "shared" / "kuberay-crds" / "ray.io_rayjobs.yaml"


def strict(schema: Any) -> Any:
    """The CRD's schema as plain JSON schema without unknown fields."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    keywords = ("properties", "items", "type", "enum", "required", "additionalProperties", "pattern", "minimum")
    made = {k: v for k, v in schema.items() if k in keywords}
    if isinstance(made.get("properties"), dict):
        made["properties"] = {name: strict(s) for name, s in made["properties"].items()}
        made.setdefault("additionalProperties", False)
        defaulted = {name for name, s in schema["properties"].items() if "default" in s}
        made["required"] = [name for name in made.get("required", []) if name not in defaulted]
    for key in ("items", "additionalProperties"):
        if isinstance(made.get(key), dict):
            made[key] = strict(made[key])
    return made


@pytest.fixture(scope="module")
def schema() -> dict:
    if not CRD.exists():
        pytest.skip(f"KubeRay's CRDs are not beside this checkout ({CRD.name})")
    crd = yaml.load(CRD.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
    made = strict(version["schema"]["openAPIV3Schema"])
    made["properties"]["metadata"] = {"type": "object"}
    return made


@pytest.fixture
def manifest() -> dict:
    documents = list(yaml.safe_load_all((ROOT / "k8s" / "rayjob.yaml").read_text()))
    assert [d["kind"] for d in documents] == ["PersistentVolumeClaim", "RayJob"]
    return documents[1]


def containers(manifest: dict) -> list[dict]:
    spec = manifest["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [spec["submitterPodTemplate"]["spec"], *(g["template"]["spec"] for g in groups)]
    return [c for pod in pods for c in pod["containers"]]


def test_it_is_valid(manifest: dict, schema: dict) -> None:
    jsonschema.validate(manifest, schema)


@pytest.mark.parametrize("path", [("spec",), ("spec", "rayClusterSpec"), ("spec", "rayClusterSpec", "headGroupSpec")])
def test_a_mistyped_field_is_not(manifest: dict, schema: dict, path: tuple[str, ...]) -> None:
    wrong = copy.deepcopy(manifest)
    at = wrong
    for key in path:
        at = at[key]
    at["entrypiont"] = "x"
    assert not jsonschema.Draft202012Validator(schema).is_valid(wrong)


def test_pods_are_confined_and_gpu_limits_equal_requests(manifest: dict) -> None:
    for container in containers(manifest):
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        requests, limits = (container["resources"].get(kind, {}) for kind in ("requests", "limits"))
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
        assert requests["memory"] == limits["memory"]
    assert len({container["image"] for container in containers(manifest)}) == 1


def test_the_entrypoint_parses(manifest: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    python, script, *args = shlex.split(manifest["spec"]["entrypoint"])
    assert (python, script) == ("python", "jobs/pipeline.py")
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    importlib.import_module("pipeline").parser().parse_args(args)
