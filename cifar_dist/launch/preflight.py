"""Quick checks before a run: every node must see the same data and storage, and have what training needs.

`gather_facts` runs on each node; `assess` checks and compares the facts. Neither imports torch or Ray, which take
seconds to load.
"""

import math
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_dist.data.manifest import Manifest, read_manifest
from cifar_dist.data.staged import staging_root
from cifar_dist.errors import UserError
from cifar_dist.launch import cuda
from cifar_dist.storage import Folder
from cifar_dist.versions import package_versions

FOLDER = "preflight"  # in the run's folder, for files that show whether all nodes share its storage
SPLITS = ("train", "validation")  # that training stages, where the data set has them
MIB = 1 << 20
# NCCL and Ray's object store use /dev/shm. Containers get 64 MiB by default, which is too little for both.
LEAST_SHM_BYTES, GOOD_SHM_BYTES = 64 * MIB, 512 * MIB


@dataclass(frozen=True)
class Finding:
    """One check on one node. status: ok, warning or failed."""

    check: str
    node: str
    status: str
    text: str


def gather_facts(node: str, run_uri: str, data_uri: str, staging_folder: str | None, token: str) -> dict[str, Any]:
    """Returns facts about this node as plain values. If a fact cannot be found, its value is the fault's text."""

    def value_or_fault(action: Callable[[], str]) -> str:
        try:
            return action()
        except (UserError, OSError) as error:
            return f"fault: {error}"

    def storage() -> str:
        run = Folder(run_uri)
        try:
            run.write(f"{FOLDER}/{token}/{node}", token.encode())
            same = run.read(f"{FOLDER}/{token}/token") == token.encode()
        except FileNotFoundError:
            same = False
        return token if same else f"fault: it does not see what the driver has written to {run_uri}; is it shared?"

    manifest_sha256 = value_or_fault(lambda: read_manifest(data_uri).sha256)
    staging = value_or_fault(lambda: str(staging_root(staging_folder)))
    folder = Path(staging_folder or tempfile.gettempdir()) if staging.startswith("fault:") else Path(staging)
    existing = next(f for f in (folder, *folder.parents) if os.access(f, os.F_OK))
    shm = Path("/dev/shm")
    return {
        "node": node,
        "name": socket.gethostname(),
        "packages": package_versions(),
        "manifest_sha256": manifest_sha256,
        "storage": value_or_fault(storage),
        "staging_folder": str(folder),
        "staged": [s for s in SPLITS if os.access(folder / manifest_sha256[:16] / f"{s}.arrow", os.F_OK)],
        "staging": staging,
        "disk_free_bytes": shutil.disk_usage(existing).free,
        "shm_free_bytes": shutil.disk_usage(shm).free if shm.exists() else 0,
        "gpus": value_or_fault(cuda.gpus),
        "torch_cuda": cuda.torch_cuda(),
        "c_compiler": value_or_fault(cuda.c_compiler),
        "rdma": cuda.rdma(),
    }


def num_bytes_to_stage(manifest: Manifest, splits: Collection[str], decoded: Collection[str]) -> int:
    """Returns the bytes that staging needs: the splits' Arrow files, one Parquet file and the pixels of `decoded`."""
    sizes = [file["num_bytes"] for split in splits for file in manifest.splits[split]["files"]]
    kept = [split for split in splits if split in decoded]
    pixels = sum(manifest.num_rows(split) * math.prod(manifest.image_shape(split) or (0,)) * 3 for split in kept)
    return sum(sizes) + max(sizes, default=0) + pixels


def assess(
    seen: list[dict[str, Any]],
    manifest: Manifest,
    *,
    token: str,
    decoded: Collection[str],
    use_gpu: bool,
    compiles: bool,
    written: list[str],
) -> list[Finding]:
    """Returns the findings on the facts in `seen`. `written`: names in the preflight folder that the driver sees.

    `decoded`: the splits whose pixels are kept. `compiles`: whether torch.compile will need a C compiler on a GPU."""
    found: list[Finding] = []
    for facts in seen:
        missing = [split for split in manifest.training_splits if split not in facts["staged"]]
        need = num_bytes_to_stage(manifest, missing, decoded)
        checks = [versions(facts), storage(facts, token, written), data_set(facts, manifest), disk(facts, need)]
        checks += [shared_memory(facts)]
        checks += [cuda_build(facts), gpu_driver(facts), rdma(facts)] if use_gpu else []
        checks += [compiler(facts)] if use_gpu and compiles else []
        node = f"{facts['name']}/{facts['node'][:8]}"
        for check, text, fault, warning in checks:
            status = "failed" if fault else "warning" if warning else "ok"
            found.append(Finding(check, node, status, fault or warning or text))
    return found


# A check of a node: (name, text if it passed, fault or '', warning or '').
Check = tuple[str, str, str, str]


def versions(facts: dict[str, Any]) -> Check:
    here, wanted = facts["packages"], package_versions()
    differ = [f"{n} {here.get(n)} here, {v} at the driver" for n, v in wanted.items() if here.get(n) != v]
    fault = ", ".join(differ) + "; give all nodes the same environment" * bool(differ)
    return "versions", ", ".join(f"{n} {v}" for n, v in here.items()), fault, ""


def storage(facts: dict[str, Any], token: str, written: list[str]) -> Check:
    fault = facts["storage"]
    if fault == token:
        is_seen = facts["node"] in written
        fault = "" if is_seen else "the driver does not see what this node has written; is it shared?"
    return "storage", "read and written", fault, ""


def data_set(facts: dict[str, Any], manifest: Manifest) -> Check:
    sha = facts["manifest_sha256"]
    other = f"{sha[:300]}, where the driver sees {manifest.sha256[:16]}; is it shared?"
    return "data set", f"sha256 {sha[:16]}", other * (sha != manifest.sha256), ""


def disk(facts: dict[str, Any], need: int) -> Check:
    free, folder = facts["disk_free_bytes"], facts["staging_folder"]
    lacks = f"{folder} has {free // MIB} MiB free, staging needs {need // MIB + 1} MiB; set --staging-folder"
    fault = lacks * (free < need)
    if facts["staging"].startswith("fault: "):
        fault = facts["staging"].removeprefix("fault: ")
    return "disk", f"{free // MIB} MiB free in {folder}, {need // MIB} MiB needed", fault, ""


def shared_memory(facts: dict[str, Any]) -> Check:
    free = facts["shm_free_bytes"]
    small = f"/dev/shm has {free // MIB} MiB free; mount a larger one (docker run --shm-size=1g)"
    return "/dev/shm", f"{free // MIB} MiB free", small * (free < LEAST_SHM_BYTES), small * (free < GOOD_SHM_BYTES)


def gpu_driver(facts: dict[str, Any]) -> Check:
    return "GPU driver", facts["gpus"].replace("\n", "; "), cuda.gpu_fault(facts["gpus"], facts["torch_cuda"]), ""


def cuda_build(facts: dict[str, Any]) -> Check:
    fault = cuda.build_fault(facts["torch_cuda"], facts["packages"])
    return "CUDA build", f"torch and DALI for CUDA {facts['torch_cuda']}", fault, ""


def compiler(facts: dict[str, Any]) -> Check:
    found = facts["c_compiler"]
    return "compiler", found, found.removeprefix("fault: ") if found.startswith("fault: ") else "", ""


def rdma(facts: dict[str, Any]) -> Check:
    found = facts["rdma"] or "no RDMA device: NCCL uses TCP between nodes"
    limited = f"{found}: NCCL locks more; allow it (`ulimit -l unlimited`, LimitMEMLOCK of the container runtime)"
    return "RDMA", found, "", limited * (bool(facts["rdma"]) and "unlimited" not in found)


def table(findings: list[Finding]) -> str:
    """Returns the findings as lines of a table: ok, then warnings, then failures."""
    order = {"ok": 0, "warning": 1, "failed": 2}
    rows = [(f.check, f.node, f.status, f.text) for f in sorted(findings, key=lambda f: order[f.status])]
    rows.insert(0, ("check", "node", "status", "found"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows)
