"""The commands of the README and the docs parse, their tests exist, and the README's list of files is the tree."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCS = "\n".join([README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))])
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)).replace("\\\n", " ")
JOBS = re.findall(r"python (jobs/\w+\.py .*)", BLOCKS)


def test_it_shows_every_job() -> None:
    assert {command.split()[0] for command in JOBS} == {f"jobs/{p.name}" for p in (ROOT / "jobs").glob("*.py")}


@pytest.mark.parametrize("command", JOBS)
def test_every_command_of_a_job_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script, *args = shlex.split(command, comments=True)
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    importlib.import_module(Path(script).stem).parser().parse_args(args)


def test_every_make_target_it_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)[`\s]", DOCS):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_it_lists_every_file_of_the_product() -> None:
    listed = set(re.findall(r"^\| `([^`]+)` \|", README, re.MULTILINE))
    there = {
        str(path.relative_to(ROOT))
        for folder in ("jobs", "cifar_dist", "benchmarks", "k8s")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".j2", ".yaml") and path.read_text().strip()
    }
    there -= {name for name in there if f"{Path(name).parent}/" in listed}  # the manifests are listed by folder
    assert there <= listed, there - listed
    assert all((ROOT / name).exists() for name in listed), listed


def test_the_tests_that_the_docs_name_exist() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", DOCS))
    assert len(named) > 10
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{test}"


def test_the_pictures_it_shows_exist() -> None:
    assert all((ROOT / name).exists() for name in re.findall(r"!\[.*?\]\((.*?)\)", README))
