"""What a result was made with: versions of the networks and packages, and the commit of the source."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "ray", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "pyarrow", "numpy", "cifar-dist")
# Raised when the same weights mean another function. resnet50v2: version 1 had no ReLU behind the head's convolution.
MODEL_VERSIONS = {"fan": 1, "resnet50v2": 2}
MODEL_CHANGES = {"resnet50v2": ", with a ReLU behind the head's convolution"}  # what the newest version brought


def package_versions() -> dict[str, str]:
    """Python's version and those of the packages that are installed, without importing them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # one of the two DALI builds, or run from a folder without being installed
            continue
    return found


def git_commit() -> str:
    """The commit of the source tree, with '+' if it was changed, or the one that an image was built from (its file
    REVISION); else 'unknown'."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", ".")
    except (OSError, subprocess.CalledProcessError):
        built_from = Path(__file__).with_name("REVISION")
        return built_from.read_text().strip() if built_from.exists() else "unknown"
    return commit + ("+" if changed else "")
