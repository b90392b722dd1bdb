"""Faults planted into the rendered manifests, one at a time: each must be found, by the check that the table names.

`pytest tests/k8s/test_faults.py -v` shows the table.
"""

import copy
from typing import Any

import pytest
from manifests import RULES, Documents, faults, render

MISSING = object()
HEAD, WORKER = "/spec/rayClusterSpec/headGroupSpec", "/spec/rayClusterSpec/workerGroupSpecs/0"
HEAD_POD, POD, SUBMITTER = f"{HEAD}/template/spec", f"{WORKER}/template/spec", "/spec/submitterPodTemplate/spec"
CONTAINER = f"{POD}/containers/0"
REQUESTS, LIMITS = f"{CONTAINER}/resources/requests", f"{CONTAINER}/resources/limits"
GPU = "nvidia.com~1gpu"
PROBE = {"httpGet": {"path": "/", "port": 8265}}
CLUSTER = "/spec/rayClusterSpec"

# (what is wrong, overlay, kind, {JSON pointer: value}, the check that finds it). MISSING: taken out.
FAULTS: list[tuple[str, str, str, dict[str, Any], str]] = [
    # The schemas: fields, types and words that the API server or the operator would refuse, or pass over in silence.
    ("entrypoint mistyped", "gpu", "RayJob", {"/spec/entrypiont": "python jobs/pipeline.py"}, "schema"),
    ("volumeMounts mistyped", "gpu", "RayJob", {f"{CONTAINER}/volumeMount": []}, "schema"),
    ("tolerations inside a container", "gpu", "RayJob", {f"{CONTAINER}/tolerations": []}, "schema"),
    ("securityContext inside resources", "gpu", "RayJob", {f"{CONTAINER}/resources/securityContext": {}}, "schema"),
    ("replicas as text", "kueue", "RayJob", {f"{WORKER}/replicas": "2"}, "schema"),
    ("start parameter as a number", "gpu", "RayJob", {f"{HEAD}/rayStartParams/num-cpus": 0}, "schema"),
    ("unit of memory unknown", "gpu", "RayJob", {f"{REQUESTS}/memory": "32Gx"}, "schema"),
    ("autoscaler version unknown", "gpu-elastic", "RayJob", {f"{CLUSTER}/autoscalerOptions/version": "v3"}, "schema"),
    ("auth mode unknown", "gpu", "RayJob", {f"{CLUSTER}/authOptions/mode": "tokens"}, "schema"),
    ("submitter without containers", "gpu", "RayJob", {f"{SUBMITTER}/containers": MISSING}, "schema"),
    ("ingress mistyped", "gpu", "NetworkPolicy", {"/spec/ingres": []}, "schema"),
    ("port as a list", "gpu", "NetworkPolicy", {"/spec/egress/1/ports/0/port": [53]}, "schema"),
    ("budget of an API that is gone", "gpu", "PodDisruptionBudget", {"/apiVersion": "policy/v1beta1"}, "schema"),
    ("claim's request mistyped", "gpu", "PersistentVolumeClaim", {"/spec/resources/request": {}}, "schema"),
    ("setting as a number", "gpu", "ConfigMap", {"/data/WORKERS": 4}, "schema"),
    # Names.
    ("claim that is not there", "gpu", "RayJob", {f"{POD}/volumes/0/persistentVolumeClaim/claimName": "data"}, "names"),
    (
        *("settings that are not there", "gpu", "RayJob"),
        *({f"{SUBMITTER}/containers/0/envFrom/0/configMapRef/name": "cifar"}, "names"),
    ),
    ("Secret mistyped", "gpu", "RayJob", {f"{CONTAINER}/envFrom": [{"secretRef": {"name": "cifar-s3"}}]}, "names"),
    ("service account that is not there", "gpu", "RayJob", {f"{HEAD_POD}/serviceAccountName": "ray"}, "names"),
    ("name too long for the operator", "gpu", "RayJob", {"/metadata/name": "cifar-dist-" + "x" * 40}, "names"),
    # The entrypoint and its settings.
    ("a second command", "gpu", "RayJob", {"/spec/entrypoint": "python jobs/pipeline.py && true"}, "entrypoint"),
    ("another script", "gpu", "RayJob", {"/spec/entrypoint": "python jobs/pipelin.py"}, "entrypoint"),
    ("option mistyped", "gpu", "ConfigMap", {"/data/OPTIONS": "--epoch 3"}, "entrypoint"),
    ("recipe mistyped", "gpu", "ConfigMap", {"/data/RECIPES": "deck_fan deck_resnet50"}, "entrypoint"),
    ("one network only", "gpu", "ConfigMap", {"/data/RECIPES": "deck_fan best_fan"}, "entrypoint"),
    ("setting that nothing takes", "gpu", "ConfigMap", {"/data/EPOCHS": "3"}, "entrypoint"),
    ("results on the pod's own disk", "gpu", "ConfigMap", {"/data/OUT": "/tmp/cifar-dist"}, "entrypoint"),
    ("settings not given to the submitter", "gpu", "RayJob", {f"{SUBMITTER}/containers/0/envFrom": []}, "entrypoint"),
    # Places for the workers.
    ("more workers than GPUs", "gpu", "ConfigMap", {"/data/WORKERS": "8"}, "scale"),
    ("range not that of the autoscaler", "gpu-elastic", "RayJob", {f"{WORKER}/maxReplicas": 3}, "scale"),
    ("fewest above most", "gpu-elastic", "RayJob", {f"{WORKER}/minReplicas": 5}, "scale"),
    ("a range without autoscaling", "kueue", "RayJob", {f"{WORKER}/maxReplicas": 4}, "scale"),
    ("fewer CPUs than GPUs", "gpu", "RayJob", {f"{REQUESTS}/cpu": "2"}, "scale"),
    # Security.
    ("root", "gpu", "RayJob", {f"{POD}/securityContext/runAsUser": 0}, "security"),
    ("no seccomp", "gpu", "RayJob", {f"{HEAD_POD}/securityContext/seccompProfile": MISSING}, "security"),
    (
        *("a capability", "gpu", "RayJob"),
        *({f"{CONTAINER}/securityContext/capabilities/add": ["SYS_PTRACE"]}, "security"),
    ),
    ("privileged", "gpu", "RayJob", {f"{CONTAINER}/securityContext/privileged": True}, "security"),
    (
        *("writable root of the submitter", "gpu", "RayJob"),
        *({f"{SUBMITTER}/containers/0/securityContext/readOnlyRootFilesystem": False}, "security"),
    ),
    ("the host's network", "gpu", "RayJob", {f"{POD}/hostNetwork": True}, "security"),
    ("a folder of the host", "gpu", "RayJob", {f"{POD}/volumes/0": {"name": "storage", "hostPath": {}}}, "schema"),
    (
        *("a folder of the host, well-formed", "gpu", "RayJob"),
        *({f"{POD}/volumes/0": {"name": "storage", "hostPath": {"path": "/data"}}}, "security"),
    ),
    ("token of the API server for workers", "gpu", "RayJob", {f"{POD}/automountServiceAccountToken": True}, "security"),
    (
        *("no token for the autoscaler", "gpu-elastic", "RayJob"),
        *({f"{HEAD_POD}/automountServiceAccountToken": False}, "security"),
    ),
    (
        *("autoscaler not confined", "gpu-elastic", "RayJob"),
        *({f"{CLUSTER}/autoscalerOptions/securityContext": MISSING}, "security"),
    ),
    # Resources.
    ("GPU limit missing", "gpu", "RayJob", {f"{LIMITS}/{GPU}": MISSING}, "resources"),
    ("GPU limit above the request", "gpu", "RayJob", {f"{LIMITS}/{GPU}": "8"}, "resources"),
    ("memory request above the limit", "gpu", "RayJob", {f"{REQUESTS}/memory": "256Gi"}, "resources"),
    ("no memory limit", "gpu", "RayJob", {f"{HEAD_POD}/containers/0/resources/limits": MISSING}, "resources"),
    ("GPU for the head", "gpu", "RayJob", {f"{HEAD_POD}/containers/0/resources/requests/{GPU}": "1"}, "resources"),
    ("taint of GPU nodes not tolerated", "gpu", "RayJob", {f"{POD}/tolerations": MISSING}, "resources"),
    ("a resource mistyped", "gpu", "RayJob", {f"{REQUESTS}/nvidia.com~1gpus": "4"}, "resources"),
    # Volumes.
    ("a mount without its volume", "gpu", "RayJob", {f"{CONTAINER}/volumeMounts/0/name": "data"}, "volumes"),
    ("a volume twice", "gpu", "RayJob", {f"{POD}/volumes/1": {"name": "shm", "emptyDir": {}}}, "volumes"),
    ("shared memory on disk", "gpu", "RayJob", {f"{POD}/volumes/2/emptyDir/medium": MISSING}, "volumes"),
    ("shared memory without a limit", "gpu", "RayJob", {f"{POD}/volumes/2/emptyDir/sizeLimit": MISSING}, "volumes"),
    ("shared memory above the memory", "gpu", "RayJob", {f"{POD}/volumes/2/emptyDir/sizeLimit": "256Gi"}, "volumes"),
    (
        *("object store above the shared memory", "gpu", "RayJob"),
        *({f"{HEAD}/rayStartParams/object-store-memory": "4294967296"}, "volumes"),
    ),
    ("storage at another path", "gpu", "RayJob", {f"{CONTAINER}/volumeMounts/0/mountPath": "/data"}, "volumes"),
    ("nowhere to write", "gpu", "RayJob", {f"{CONTAINER}/volumeMounts/1/mountPath": "/scratch"}, "volumes"),
    # The image and the environment.
    ("no version of the image", "gpu", "RayJob", {f"{CONTAINER}/image": "cifar-dist"}, "image"),
    (":latest", "gpu", "RayJob", {f"{CONTAINER}/image": "cifar-dist:latest"}, "image"),
    ("another image", "gpu", "RayJob", {f"{SUBMITTER}/containers/0/image": "cifar-dist:0.0.9"}, "image"),
    ("a variable twice", "gpu", "RayJob", {f"{CONTAINER}/env/1": {"name": "HOME", "value": "/tmp"}}, "environment"),
    (
        *("a variable of the operator", "gpu", "RayJob"),
        *({f"{CONTAINER}/env/1": {"name": "RAY_ADDRESS", "value": "auto"}}, "environment"),
    ),
    (
        *("a key in plain text", "gpu", "RayJob"),
        *({f"{CONTAINER}/env/1": {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}}, "environment"),
    ),
    ("killed before it has drained", "gpu", "RayJob", {f"{POD}/terminationGracePeriodSeconds": 10}, "environment"),
    # From start to end.
    ("ttl without shutdown", "gpu", "RayJob", {"/spec/shutdownAfterJobFinishes": False}, "lifecycle"),
    (
        *("two rules for the end", "gpu", "RayJob"),
        *(
            {"/spec/deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}, "onFailure": {"policy": "DeleteNone"}}},
            "lifecycle",
        ),
    ),
    ("not tried again", "gpu", "RayJob", {"/spec/backoffLimit": 0}, "lifecycle"),
    ("no deadline to start", "gpu", "RayJob", {"/spec/preRunningDeadlineSeconds": MISSING}, "lifecycle"),
    ("submitter in the head's pod", "gpu", "RayJob", {"/spec/submissionMode": "SidecarMode"}, "lifecycle"),
    ("suspended for good", "gpu", "RayJob", {"/spec/suspend": True}, "lifecycle"),
    ("a probe of one's own", "gpu", "RayJob", {f"{CONTAINER}/livenessProbe": PROBE}, "lifecycle"),
    ("pods that restart under autoscaler v2", "gpu-elastic", "RayJob", {f"{POD}/restartPolicy": "Always"}, "lifecycle"),
    # Ray and the operator.
    ("no token", "gpu", "RayJob", {f"{CLUSTER}/authOptions": MISSING}, "ray"),
    ("another version of Ray", "gpu", "RayJob", {f"{CLUSTER}/rayVersion": "2.46.0"}, "ray"),
    ("a closed feature gate", "gpu", "RayJob", {f"{CLUSTER}/networkPolicy": {}}, "ray"),
    ("work on the head", "gpu", "RayJob", {f"{HEAD}/rayStartParams/num-cpus": "2"}, "ray"),
    ("autoscaler v1", "gpu-elastic", "RayJob", {f"{CLUSTER}/autoscalerOptions/version": "v1"}, "ray"),
    ("Kueue with autoscaling", "gpu-elastic", "RayJob", {"/metadata/labels/kueue.x-k8s.io~1queue-name": "q"}, "ray"),
    # Who is meant.
    (
        *("budget for all pods", "gpu", "PodDisruptionBudget"),
        *({"/spec/selector/matchLabels/app.kubernetes.io~1component": MISSING}, "selectors"),
    ),
    (
        *("budget that Ray's pods cannot have", "gpu", "PodDisruptionBudget"),
        *({"/spec/minAvailable": MISSING, "/spec/maxUnavailable": 0}, "selectors"),
    ),
    ("budget in per cent", "gpu", "PodDisruptionBudget", {"/spec/minAvailable": "50%"}, "selectors"),
    (
        *("workers outside the network policy", "gpu", "RayJob"),
        *({f"{WORKER}/template/metadata/labels/app.kubernetes.io~1part-of": "other"}, "selectors"),
    ),
    ("open to everybody", "gpu", "NetworkPolicy", {"/spec/ingress/0/from": MISSING}, "selectors"),
    ("closed to the operator", "gpu", "NetworkPolicy", {"/spec/ingress/1/ports/0/port": 8266}, "selectors"),
    ("no way out to HTTPS", "gpu", "NetworkPolicy", {"/spec/egress/2/ports/0/port": 80}, "selectors"),
    # Words.
    ("effect mistyped", "gpu", "RayJob", {f"{POD}/tolerations/0/effect": "NoSchedul"}, "words"),
    ("access mode unknown", "gpu", "PersistentVolumeClaim", {"/spec/accessModes": ["ReadWriteAll"]}, "words"),
]


@pytest.fixture(scope="module")
def rendered() -> dict[str, Documents]:
    return {overlay: render(overlay) for overlay in {fault[1] for fault in FAULTS}}


def plant(documents: Documents, kind: str, changes: dict[str, Any]) -> Documents:
    """The documents with one of them changed."""
    documents = [copy.deepcopy(d) if d["kind"] == kind else d for d in documents]
    for pointer, value in changes.items():
        (at,) = [d for d in documents if d["kind"] == kind]
        *path, last = [part.replace("~1", "/") for part in pointer.split("/")[1:]]
        for key in path:
            at = at[int(key) if isinstance(at, list) else key]
        where = int(last) if isinstance(at, list) else last
        if value is MISSING:
            del at[where]
        else:
            at[where] = value
    return documents


@pytest.mark.parametrize(
    ("overlay", "kind", "changes", "check"), [f[1:] for f in FAULTS], ids=[f"{f[0]} -> {f[4]}" for f in FAULTS]
)
def test_a_planted_fault_is_found(
    overlay: str, kind: str, changes: dict[str, Any], check: str, rendered: dict[str, Documents]
) -> None:
    assert check in [name for name, _ in faults(plant(rendered[overlay], kind, changes))]


def test_there_are_enough_and_every_check_finds_one() -> None:
    assert len(FAULTS) >= 40
    assert len({fault[0] for fault in FAULTS}) == len(FAULTS)
    assert {fault[4] for fault in FAULTS} == {"schema", *(rule.__name__ for rule in RULES)}
