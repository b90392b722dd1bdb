"""Who may import whom, who may read the environment, and the size of the entry points: read from the source."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = {f"jobs.{path.stem}": path for path in (ROOT / "jobs").glob("*.py")}
PACKAGE = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "cifar_dist").rglob("*.py")
}
MODULES = JOBS | PACKAGE

# What a module of the package (the longest prefix counts) may import of it besides its own folder.
BASE = {"config", "cpus", "environment", "errors", "storage", "versions"}
TRAIN = {
    f"train.{name}"
    for name in (
        *(
            "attempt",
            "checkpoint",
            "cluster",
            "communication",
            "features",
            "log",
            "loop",
            "metrics",
            "optim",
            "plan",
            "precision",
            "preflight",
        ),
        *("progress", "readiness", "saver", "setup", "telemetry", "trainer"),
    )
}
MAY_IMPORT = {
    "stopping": set(),
    "cpus": set(),
    "errors": {"stopping"},
    "versions": set(),
    "config": {"environment", "errors"},
    "environment": set(),
    "storage": {"errors"},
    "recipes": {"config", "errors"},
    "deck": {"config"},
    "data": BASE,
    "models": BASE,
    "train": BASE | {"stopping", "data", "models", "deck"} | TRAIN,
    "train.worker": BASE | {"data", "models"} | TRAIN,
    "train.launch": BASE | {"data"} | TRAIN | {"train.worker"},
    "evaluate": BASE | {"deck", "data", "train.checkpoint", "train.log", "train.setup", "models.frozen"},
}
JOBS_MAY_IMPORT = {
    "stopping",
    "config",
    "environment",
    "errors",
    "recipes",
    "storage",
    "data.sources",
    "data.store",
    "evaluate",
    "train.cluster",
    "train.launch",
    "train.plan",
    "train.preflight",
    "train.progress",
    "models",
}
RAY = {
    *("cifar_dist.train.cluster", "cifar_dist.train.launch", "cifar_dist.train.worker", "cifar_dist.train.telemetry"),
    "cifar_dist.train.trainer",
    "cifar_dist.evaluate.driver",
}
DALI = {"cifar_dist.data.check", "cifar_dist.data.pipeline"}


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


@pytest.mark.parametrize("module", sorted(PACKAGE))
def test_layers(module):
    name = module.removeprefix("cifar_dist").removeprefix(".")
    own = name.split(".")[0]
    places = [place for place in MAY_IMPORT if within(name, {place})]
    assert places or not name, f"{module} belongs to no layer: give it one in MAY_IMPORT"
    allowed = MAY_IMPORT[max(places, key=len)] if places else set()
    if own in ("data", "models", "evaluate"):
        allowed = allowed | {own}
    assert {i for i in of_the_package(module) if not within(i.removeprefix("cifar_dist."), allowed)} == set()


@pytest.mark.parametrize("module", sorted(JOBS))
def test_jobs_import_what_they_may(module):
    wrong = {i for i in of_the_package(module) if not within(i.removeprefix("cifar_dist."), JOBS_MAY_IMPORT)}
    assert wrong == set()


def test_the_package_does_not_import_the_jobs():
    jobs = {module.removeprefix("jobs.") for module in JOBS} | {"jobs"}
    for module, path in PACKAGE.items():
        assert not {i for i in imports(path.read_text(), module) if i.split(".")[0] in jobs}, module


def test_no_module_imports_itself_by_a_circle():
    list(graphlib.TopologicalSorter({m: of_the_package(m) - {m} for m in PACKAGE}).static_order())


@pytest.mark.parametrize("module", sorted(PACKAGE))
def test_ray_and_dali_stay_where_they_are(module):
    tops = imports(PACKAGE[module].read_text(), module)
    assert any(within(i, {"ray"}) for i in tops) <= (module in RAY)
    assert any(within(i, {"nvidia"}) for i in tops) <= (module in DALI)


def test_ray_and_dali_are_where_the_test_looks_for_them():
    for module, package in [(m, "ray") for m in RAY] + [(m, "nvidia") for m in DALI]:
        assert any(within(i, {package}) for i in imports(PACKAGE[module].read_text())), module


@pytest.mark.parametrize("module", sorted(set(PACKAGE) - {"cifar_dist.environment"}))
def test_environment_and_argv_are_read_in_one_place(module):
    assert environment_reads(PACKAGE[module].read_text()) == set()


@pytest.mark.parametrize("module", sorted(JOBS))
def test_entry_points_are_short(module):
    assert len(JOBS[module].read_text().splitlines()) < 100


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_says_what_it_is(module):
    source = MODULES[module].read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source))
