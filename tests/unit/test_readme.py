"""The commands of the README and the docs parse, their tests and links exist, and the README's tree is the folders'."""

import contextlib
import importlib.util
import re
import shlex
import unicodedata
from pathlib import Path

import pytest

from cifar_dist.cli import module_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
README = (ROOT / "README.md").read_text()
DOCS = "\n".join(page.read_text() for page in PAGES)
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)).replace("\\\n", " ")
JOBS = re.findall(r"python (jobs/\w+\.py .*)", BLOCKS)
MOST_LINES, MOST_COLUMNS = 90, 100


def without_code(text: str) -> str:
    """The page without its code blocks and code spans, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text: str) -> set[str]:
    """Of each heading, as GitHub makes them: lower case, without punctuation, spaces as hyphens."""
    found: set[str] = set()
    for heading in re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    ):
        kept = [c for c in heading.lower() if c in "-_ " or unicodedata.category(c)[0] in "LN"]
        found.add("".join(kept).replace(" ", "-"))
    return found


def broken_links(page: Path, text: str) -> list[str]:
    """The links of a page that lead to no file of the project, or to no heading of it."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if re.match(r"https?://", target):
            continue
        if not file.is_relative_to(ROOT) or not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


def long_lines(text: str) -> list[str]:
    """Lines that are too long, but for those with a URL that leaves no room."""
    lines = [line for line in text.splitlines() if len(line) > MOST_COLUMNS]
    return [line for line in lines if not re.search(r"https?://\S{60,}", line)]


def folders_of(tree: str) -> set[str]:
    return set(re.findall(r"^([\w/]+)/ ", tree, re.MULTILINE))


def product_folders() -> set[str]:
    """Every folder that holds files of the product."""
    found = {
        str(path.parent.relative_to(ROOT))
        for folder in ("jobs", "cifar_dist", "benchmarks", "k8s")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".j2", ".yaml", ".json") and path.read_text().strip()
    }
    assert len(found) > 10
    return found


TREE = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1]


def is_listed(folder: str, listed: set[str]) -> bool:
    """Itself, or a folder above it that holds no files of its own, such as that of all manifests."""
    above = [str(parent) for parent in Path(folder).parents if not any(p.is_file() for p in (ROOT / parent).iterdir())]
    return bool({folder, *above} & listed)


def test_it_shows_every_job():
    assert {command.split()[0] for command in JOBS} == {f"jobs/{p.name}" for p in (ROOT / "jobs").glob("*.py")}


@pytest.mark.parametrize("command", JOBS)
def test_every_command_of_a_job_parses(command, tmp_path):
    script, *args = shlex.split(command, comments=True)
    if "--config" in args:  # a run's card, which is not at hand
        (tmp_path / "card.toml").write_text('recipe = "deck_fan"')
        args[args.index("--config") + 1] = str(tmp_path / "card.toml")
    ends = pytest.raises(SystemExit, match="0") if "--print-config" in args else contextlib.nullcontext()
    with ends:
        module_of(Path(script).stem).COMMAND.parse(args, script)


def test_the_page_of_settings_is_that_of_the_declarations():
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "docs" / "settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "settings.md").read_text() == module.page(), "run: make settings"


def test_every_make_target_it_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", DOCS, re.MULTILINE))
    assert {"demo", "test", "bench", "mutants"} <= named
    assert {target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("name", NAMES)
def test_no_line_is_too_long(name):
    assert long_lines((ROOT / name).read_text()) == []


def test_a_long_line_would_be_found():
    assert long_lines("word " * 21) != []
    assert long_lines(f"see https://example.org/{'x' * 80}") == []


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name):
    assert broken_links(ROOT / name, (ROOT / name).read_text()) == []


def test_a_broken_link_would_be_found():
    page = ROOT / "docs" / "recovery.md"
    text = "[a](none.md) [b](../README.md#none) [c](#elastic) [d](../../../etc/passwd)"
    assert broken_links(page, text) == ["none.md", "../README.md#none", "../../../etc/passwd"]
    assert anchors('## The deck\'s "10% val_accuracy"') == {"the-decks-10-val_accuracy"}


def test_the_tree_has_every_folder_of_the_product():
    listed = folders_of(TREE)
    assert {folder for folder in product_folders() if not is_listed(folder, listed)} == set()
    assert all((ROOT / folder).is_dir() for folder in listed), listed
    assert len(listed) == len(TREE.splitlines())


def test_a_folder_that_is_missing_in_the_tree_would_be_found():
    listed = folders_of(TREE) - {"cifar_dist/data/sources", "k8s"}
    missed = {folder for folder in product_folders() if not is_listed(folder, listed)}
    assert {"cifar_dist/data/sources", "k8s/base"} < missed


def test_the_tests_that_the_docs_name_exist():
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", DOCS))
    assert len(named) > 10
    for file, test in named:
        assert re.search(rf"^def {test}\(" if test else "", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{test}"


def test_the_pictures_it_shows_exist():
    assert all((ROOT / name).exists() for name in re.findall(r"!\[.*?\]\((.*?)\)", README))
