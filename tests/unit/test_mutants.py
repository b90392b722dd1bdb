"""The table of planted faults fits the source as it is; make mutants plants them."""

import ast
import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
AREAS = ("networks", "recipes", "order", "loop", "optimizer", "checkpoint", "evaluation", "staging", "pictures")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tests/mutants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutants = load()
TABLE = mutants.read_table()


def test_every_area_has_its_faults():
    by_area = Counter(mutant.area for mutant in TABLE)
    assert len(TABLE) >= 60
    assert min(by_area[area] for area in AREAS) >= 7
    assert len({(mutant.area, mutant.wrong) for mutant in TABLE}) == len(TABLE)
    assert sum(bool(mutant.survives) for mutant in TABLE) <= 3


@pytest.mark.parametrize("mutant", TABLE, ids=lambda mutant: f"{mutant.area}: {mutant.wrong}")
def test_every_fault_can_be_planted(mutant):
    source = (ROOT / mutant.file).read_text()
    assert source.count(mutant.text) == 1
    assert mutant.text != mutant.fault
    ast.parse(source.replace(mutant.text, mutant.fault))
    file, _, function = mutant.test.partition("::")
    names = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}
    assert function.partition("[")[0] in names


def test_the_copy_is_what_is_imported_also_in_other_processes():
    mutant = next(m for m in TABLE if m.file == "cifar_dist/deck.py")
    code = "import sys, subprocess, cifar_dist.deck as d; print(open(d.__file__).read()); "
    code += "sys.argv[1:] and subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with mutants.copied(mutant) as folder:
        exit_code, output = mutants.run_python(folder, "-c", code, code)
    assert (exit_code, output.count(mutant.fault), output.count(mutant.text)) == (0, 2, 0)


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "1 passed", "SURVIVED"),
        (1, "FAILED tests/a.py::test_b - assert 1 == 2", "caught"),
        (1, "FAILED tests/a.py::test_b[1-x] - assert 1 == 2", "caught"),
        (1, "FAILED tests/a.py::test_bc - assert 1 == 2", "NO ANSWER"),
        (1, "ERROR tests/a.py::test_b - a fixture failed", "NO ANSWER"),
        (2, "ERROR tests/a.py", "NO ANSWER"),
        (None, "FAILED tests/a.py::test_b", "NO ANSWER"),
    ],
)
def test_only_a_failure_of_the_named_test_counts(code, output, expected):
    assert mutants.outcome(code, output, "tests/a.py::test_b").startswith(expected)
