"""Checks that take seconds before a run: does every node see the same data and storage, and can it do the work?

`look` runs on each node and only gathers; `judge` compares. Neither imports torch or Ray, which take seconds to load.
"""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_dist.data.manifest import Manifest, read_manifest
from cifar_dist.data.staged import staging_root
from cifar_dist.errors import UserError
from cifar_dist.storage import Folder
from cifar_dist.versions import package_versions

FOLDER = "preflight"  # in the run's folder, for the files by which the nodes see each other's storage
MIB = 1 << 20
# NCCL and Ray's object store use it; containers get 64 MiB unless told otherwise, which is too little for both.
LEAST_SHM_BYTES, GOOD_SHM_BYTES = 64 * MIB, 512 * MIB
# Oldest driver branch for a CUDA major version (NVIDIA's CUDA compatibility guide).
LEAST_DRIVER = {"nvidia-dali-cuda130": 580, "nvidia-dali-cuda120": 525}


@dataclass(frozen=True)
class Finding:
    """One check on one node. status: ok, warning or failed."""

    check: str
    node: str
    status: str
    text: str


def look(node: str, run_uri: str, data_uri: str, staging_folder: str | None, token: str) -> dict[str, Any]:
    """What this node has and sees, as plain values; a fault is the text of its entry."""

    def tried(action: Callable[[], str]) -> str:
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

    manifest_sha256 = tried(lambda: read_manifest(data_uri).sha256)
    staging = tried(lambda: str(staging_root(staging_folder)))
    folder = Path(staging_folder or tempfile.gettempdir()) if staging.startswith("fault:") else Path(staging)
    there = next(f for f in (folder, *folder.parents) if os.access(f, os.F_OK))
    shm = Path("/dev/shm")
    return {
        "node": node,
        "name": socket.gethostname(),
        "packages": package_versions(),
        "manifest_sha256": manifest_sha256,
        "storage": tried(storage),
        "staging_folder": str(folder),
        "is_staged": os.access(folder / manifest_sha256[:16] / "train.arrow", os.F_OK),
        "staging": staging,
        "disk_free_bytes": shutil.disk_usage(there).free,
        "shm_free_bytes": shutil.disk_usage(shm).free if shm.exists() else 0,
        "gpus": tried(gpus),
    }


def gpus() -> str:
    """'driver version, name' of each GPU, a line each; empty without nvidia-smi, its complaint where it has one."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=30).stdout.strip()
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"


def num_bytes_to_stage(manifest: Manifest, decoded: bool) -> int:
    """Bytes that staging the train split takes on a node: the Arrow file, one Parquet file at a time, the pixels."""
    split = manifest.splits["train"]
    sizes = [file["num_bytes"] for file in split["files"]]
    shape = manifest.image_shape("train")
    pixels = split["num_rows"] * shape[0] * shape[1] * 3 if decoded and shape else 0
    return sum(sizes) + max(sizes) + pixels


def judge(
    seen: list[dict[str, Any]], manifest: Manifest, token: str, decoded: bool, use_gpu: bool, written: list[str]
) -> list[Finding]:
    """The findings for what `look` saw; `written` are the names in the run's preflight folder as the driver sees it."""
    findings = []
    wanted, need = package_versions(), num_bytes_to_stage(manifest, decoded)
    for facts in seen:
        node = f"{facts['name']}/{facts['node'][:8]}"

        def add(check: str, text: str, fault: str = "", warning: str = "", node: str = node) -> None:
            status = "failed" if fault else "warning" if warning else "ok"
            findings.append(Finding(check, node, status, fault or warning or text))

        found = facts["packages"]
        differ = [f"{n} {found.get(n)} here, {v} at the driver" for n, v in wanted.items() if found.get(n) != v]
        same = "; give all nodes the same environment" if differ else ""
        add("versions", ", ".join(f"{n} {v}" for n, v in found.items()), ", ".join(differ) + same)
        sees = "" if facts["node"] in written else "the driver does not see what this node has written; is it shared?"
        add("storage", "read and written", sees if facts["storage"] == token else facts["storage"])
        sha = facts["manifest_sha256"]
        other = (
            ""
            if sha == manifest.sha256
            else f"{sha[:300]}, where the driver sees {manifest.sha256[:16]}; is it shared?"
        )
        add("data set", f"sha256 {sha[:16]}", other)
        free, folder = facts["disk_free_bytes"], facts["staging_folder"]
        enough = free >= need or facts["is_staged"]
        lacks = (
            ""
            if enough
            else f"{folder} has {free // MIB} MiB free, staging needs {need // MIB + 1} MiB; set --staging-folder"
        )
        locked = facts["staging"].removeprefix("fault: ") if facts["staging"].startswith("fault: ") else ""
        add("disk", f"{free // MIB} MiB free in {folder}, {need // MIB} MiB needed", locked or lacks)
        shm = facts["shm_free_bytes"]
        small = f"/dev/shm has {shm // MIB} MiB free; mount a larger one (docker run --shm-size=1g)"
        add("/dev/shm", f"{shm // MIB} MiB free", small * (shm < LEAST_SHM_BYTES), small * (shm < GOOD_SHM_BYTES))
        if use_gpu:
            add("GPU driver", facts["gpus"].replace("\n", "; "), driver_fault(facts["gpus"], found))
    return findings


def driver_fault(gpus: str, packages: dict[str, str]) -> str:
    """What is wrong with the driver in gpus() for the CUDA build of DALI that is installed; '' if nothing."""
    least = min((LEAST_DRIVER[name] for name in packages if name in LEAST_DRIVER), default=0)
    version = gpus.split(",", maxsplit=1)[0].strip()
    if not version.split(".")[0].isdigit():
        said = "; ".join(gpus.splitlines()) or "it is not there"
        return f"nvidia-smi names no driver ({said}); install NVIDIA's driver, or use --device cpu"
    if int(version.split(".")[0]) < least:
        return f"driver {version} is older than {least}, which this build of DALI and torch needs; see README, GPUs"
    return ""


def table(findings: list[Finding]) -> str:
    """The findings as lines, what is wrong last."""
    order = {"ok": 0, "warning": 1, "failed": 2}
    rows = [(f.check, f.node, f.status, f.text) for f in sorted(findings, key=lambda f: order[f.status])]
    rows.insert(0, ("check", "node", "status", "found"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows)
