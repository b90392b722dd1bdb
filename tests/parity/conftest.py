"""Real Keras, once per session."""

from pathlib import Path

import numpy as np
import pytest
from keras_run import CIFAR10, run_keras_or_skip, some_images


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The option that names real images, where they are at hand."""
    if not CIFAR10.exists():
        return []
    path = tmp_path_factory.mktemp("images") / "real.npz"
    np.savez(path, images=some_images())
    return ["--images", path]


@pytest.fixture(scope="session")
def reference(image_file: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that keras_reference.py writes."""
    folder = tmp_path_factory.mktemp("keras")
    run_keras_or_skip(folder, *image_file)
    return folder
