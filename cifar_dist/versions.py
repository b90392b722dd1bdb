"""Versions of packages and the commit of the source, to record with results."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cifar_dist.errors import UserError

PACKAGES = ("torch", "ray", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "pyarrow", "numpy", "cifar-dist")


DALI_PACKAGES = tuple(name for name in PACKAGES if "dali" in name)


def check_dali() -> None:
    """Raises UserError if DALI is not installed."""
    if not package_versions().keys() & set(DALI_PACKAGES):
        raise UserError(
            "NVIDIA DALI is not installed; `uv sync --extra cuda13` (or cuda12, for older GPU drivers) installs it and "
            "torch of the same CUDA generation, as `pip install cifar-dist[cuda13]` does"
        )


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed PACKAGES, without importing them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # the other DALI build, or cifar-dist itself if not installed
            continue
    return found


def git_commit() -> str:
    """Returns the commit of the source tree, with '+' if the tree was changed.

    In an image without git, returns the commit in its file REVISION, or 'unknown'."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", ".")
    except (OSError, subprocess.CalledProcessError):
        built_from = Path(__file__).with_name("REVISION")
        return built_from.read_text().strip() if built_from.exists() else "unknown"
    return commit + ("+" if changed else "")
