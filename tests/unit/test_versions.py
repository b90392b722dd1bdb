"""The commit that checkpoints and benchmarks name."""

import re
from pathlib import Path

import pytest

from cifar_dist import versions


def test_in_an_image_it_is_the_commit_that_the_image_was_built_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "versions.py"))
    assert versions.git_commit() == "unknown"
    (tmp_path / "REVISION").write_text("0123abcd\n")
    assert versions.git_commit() == "0123abcd"


def test_in_a_checkout_it_is_that_of_the_checkout() -> None:
    if not (Path(__file__).parents[2] / ".git").exists():
        pytest.skip("not a checkout")
    assert re.fullmatch(r"[0-9a-f]{40}\+?", versions.git_commit())
