"""Who may import whom, who may read the environment, and the size of the entry points: read from the source."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = {f"jobs.{path.stem}": path for path in (ROOT / "jobs").glob("*.py")}
PACKAGE = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "cifar_dist").rglob("*.py")
}
MODULES = JOBS | PACKAGE

# The import law, one line a wing: what its modules may import of the package. The ground is every module that lies in
# no folder.
MAY_IMPORT = {
    "ground": {"models.spec"},  # the names of the networks, which are settings
    "data": {"ground"},
    "models": {"ground"},
    "run": {"ground", "data", "models"},
    "train": {"ground", "data", "models", "run"},
    "evaluate": {"ground", "data", "models", "run"},
    "launch": {"ground", "data", "models", "run", "train.job", "train.worker"},
    "cli": {"ground", "data", "models", "run", "train.job", "evaluate", "launch"},
}
JOBS_MAY_IMPORT = {"cli"}
# Wings and modules that may import Ray.
RAY = {"launch", "train.worker", "evaluate.driver"}
DALI = {"data.check", "data.pipeline"}


def within(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def imports(source: str, module: str = "") -> set[str]:
    """Every module that the source imports anywhere, functions included; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def of_the_package(module: str) -> set[str]:
    """The package's modules that a module imports: the longest known prefix of each import."""
    found = set()
    for name in imports(MODULES[module].read_text(), module):
        while name.startswith("cifar_dist") and name not in PACKAGE:
            name = name.rpartition(".")[0]
        if name in PACKAGE:
            found.add(name)
    return found


def environment_reads(source: str) -> set[str]:
    wanted = {("os", "environ"), ("os", "environb"), ("os", "getenv"), ("os", "putenv"), ("sys", "argv")}
    tree = ast.parse(source)
    attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    used = {(n.value.id, n.attr) for n in attributes} | {tuple(name.rsplit(".", 1)) for name in imports(source)}
    return {".".join(pair) for pair in used & wanted}


def test_the_reader_sees_every_form():
    source = "import a.b\nfrom c import d, e\ndef f():\n    from . import g\n    from ..h import i\nimport os\n"
    assert imports(source, "p.q.r") == {"a.b", "c.d", "c.e", "p.q.g", "p.h.i", "os"}
    assert environment_reads("import os, sys\nprint(os.environ['A'], sys.argv)") == {"os.environ", "sys.argv"}
    assert environment_reads("from os import getenv") == {"os.getenv"}
    assert len(JOBS) >= 4
    assert len(PACKAGE) >= 25
    assert "cifar_dist.train.loop" in of_the_package("cifar_dist.train.worker")


def place(module: str) -> str:
    """A module's name in the package; "ground.NAME" for one that lies in no folder."""
    name = module.removeprefix("cifar_dist").removeprefix(".") or "__init__"
    if name == "__main__":
        return "cli.__main__"
    is_folder = PACKAGE[module].name == "__init__.py" and name != "__init__"
    return name if "." in name or is_folder else f"ground.{name}"


@pytest.mark.parametrize("module", sorted(PACKAGE))
def test_every_wing_imports_what_it_may(module):
    own = place(module).split(".")[0]
    assert own in MAY_IMPORT, f"{own} is a new wing: give it a line in MAY_IMPORT"
    allowed = MAY_IMPORT[own] | {own}
    assert {name for found in of_the_package(module) if not within(name := place(found), allowed)} == set()


@pytest.mark.parametrize("module", sorted(JOBS))
def test_jobs_import_the_command_line_alone(module):
    assert {name for found in of_the_package(module) if not within(name := place(found), JOBS_MAY_IMPORT)} == set()


def test_the_package_does_not_import_the_jobs():
    jobs = {module.removeprefix("jobs.") for module in JOBS} | {"jobs"}
    for module, path in PACKAGE.items():
        assert not {i for i in imports(path.read_text(), module) if i.split(".")[0] in jobs}, module


def test_no_module_imports_itself_by_a_circle():
    list(graphlib.TopologicalSorter({m: of_the_package(m) - {m} for m in PACKAGE}).static_order())


@pytest.mark.parametrize("module", sorted(PACKAGE))
def test_ray_and_dali_stay_where_they_are(module):
    tops = imports(PACKAGE[module].read_text(), module)
    assert any(within(i, {"ray"}) for i in tops) <= within(place(module), RAY)
    assert any(within(i, {"nvidia"}) for i in tops) <= within(place(module), DALI)


@pytest.mark.parametrize(("package", "places"), [("ray", RAY), ("nvidia", DALI)])
def test_ray_and_dali_are_where_the_test_looks_for_them(package, places):
    for where in places:
        modules = [module for module in PACKAGE if within(place(module), {where})]
        assert any(within(i, {package}) for m in modules for i in imports(PACKAGE[m].read_text())), where


@pytest.mark.parametrize("module", sorted(set(PACKAGE) - {"cifar_dist.environment", "cifar_dist.cli"}))
def test_environment_and_argv_are_read_in_one_place(module):
    assert environment_reads(PACKAGE[module].read_text()) == set()


@pytest.mark.parametrize("module", sorted(JOBS))
def test_entry_points_are_short(module):
    assert len(JOBS[module].read_text().splitlines()) < 10


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_says_what_it_is(module):
    source = MODULES[module].read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source))


MOST_LINES, MOST_FUNCTION_LINES, MOST_WORKER_LINES, MOST_FIELDS = 300, 50, 215, 4


def size(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("module", sorted(PACKAGE))
def test_files_and_functions_stay_small(module):
    source = PACKAGE[module].read_text()
    assert len(source.splitlines()) <= MOST_LINES
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    assert [n.name for n in functions if size(n) > MOST_FUNCTION_LINES] == []


def test_the_worker_conducts_and_does_not_play():
    tree = ast.parse(PACKAGE["cifar_dist.train.worker"].read_text())
    (worker,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Worker"]
    assert size(worker) <= MOST_WORKER_LINES


@pytest.mark.parametrize("module", sorted(PACKAGE))
def test_dataclasses_of_many_fields_are_built_by_keyword(module):
    for node in ast.walk(ast.parse(PACKAGE[module].read_text())):
        if isinstance(node, ast.ClassDef) and "dataclass" in (made := " ".join(map(ast.unparse, node.decorator_list))):
            fields = [
                n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)
            ]
            assert len(fields) <= MOST_FIELDS or "kw_only=True" in made, node.name


@pytest.mark.parametrize("module", sorted(set(PACKAGE) - {"cifar_dist.launch.ray_private"}))
def test_private_apis_of_ray_are_named_in_one_file(module):
    source = PACKAGE[module].read_text()
    named = {name for name in imports(source, module) if within(name, {"ray"})}
    named |= {ast.unparse(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)}
    private = {name for name in named if re.match(r"ray\.(.*\.)?_", name) or ".v2." in name}
    assert private == set()


@pytest.mark.parametrize("module", sorted(PACKAGE))
def test_workers_report_nothing_to_ray(module):
    """Ray takes a report every half second, so a report an epoch would hold up epochs that are faster."""
    called = {ast.unparse(n.func) for n in ast.walk(ast.parse(PACKAGE[module].read_text())) if isinstance(n, ast.Call)}
    assert not {name for name in called if name.endswith("train.report") or name == "report"}
