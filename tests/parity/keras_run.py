"""Runs keras_reference.py in an environment of its own; finds some real images for it."""

import os
import shutil
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_dist.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("keras_reference.py")
CIFAR10 = ROOT.parent / "shared/data/cifar10-jpeg.tar.gz"
NUM_REAL = 64


def script_command(script: Path) -> list[str]:
    """What runs a script in its own environment, which is made first.

    Raises UserError where the environment cannot be made, without uv or a network.
    """
    uv = shutil.which("uv") or shutil.which(str(ROOT / ".uv/bin/uv"))
    if not uv:
        raise UserError(f"the environment of {script.name} cannot be made: there is no uv")
    words = ["--locked", "--script", str(script)]
    made = subprocess.run([uv, "sync", *words], check=False, capture_output=True, text=True, env=outside())
    if made.returncode:
        raise UserError(f"the environment of {script.name} cannot be made: {made.stderr.strip()}")
    return [uv, "run", *words]


def outside() -> dict[str, str]:
    """The environment variables without those of this project's own environment."""
    return {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}


def run_keras(*words: object) -> None:
    """Runs the reference script. Raises UserError where its environment cannot be made."""
    command = [*script_command(SCRIPT), *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=outside())
    assert done.returncode == 0, done.stderr[-4000:]


def run_keras_or_skip(*words: object) -> None:
    """As run_keras, for tests: they are skipped where it cannot run, but never in CI."""
    try:
        run_keras(*words)
    except UserError as error:
        pytest.fail(str(error)) if os.environ.get("CI") else pytest.skip(str(error))


def some_images() -> np.ndarray:
    """Uint8 [NUM_REAL, 32, 32, 3] of the real CIFAR-10."""
    images: list[np.ndarray] = []
    with tarfile.open(CIFAR10) as archive:
        for member in archive:
            if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg")):
                file = archive.extractfile(member)
                assert file
                images.append(np.asarray(Image.open(BytesIO(file.read())).convert("RGB")))
                if len(images) == NUM_REAL:
                    break
    return np.stack(images)


def images_option(folder: Path) -> list[object]:
    """The option of the reference script that names real images, which are put into `folder`; none without them."""
    if not CIFAR10.exists():
        return []
    np.savez(folder / "real.npz", images=some_images())
    return ["--images", folder / "real.npz"]
