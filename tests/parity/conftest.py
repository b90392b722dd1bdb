"""Real Keras, once per session."""

from pathlib import Path

import pytest
from keras_run import images_option, run_keras_or_skip


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The option that names real images, where they are at hand."""
    return images_option(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def reference(image_file: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that keras_reference.py writes."""
    folder = tmp_path_factory.mktemp("keras")
    run_keras_or_skip(folder, *image_file)
    return folder
