"""The figures that the docs quote from benchmarks are those of the committed result files.

Those of the form MEDIAN (LEAST to GREATEST); that they stand in the right row is for a reader to see.
"""

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = {path.name: json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")}
CELL = re.compile(r"([\d,]+(?:\.\d+)?(?:e-\d+)?) \(([\d,.e-]+) to ([\d,.e-]+)\)")


def sections() -> Iterator[tuple[str, list[str], list[tuple[str, str, str]]]]:
    """(page and heading, result files that it names, its figures of the form MEDIAN (LEAST to GREATEST))."""
    for page in ("performance.md", "fidelity.md"):
        text = (ROOT / "docs" / page).read_text()
        for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
            files = [name for name in RESULTS if f"results/{name}" in part]
            figures = [found.groups() for line in part.splitlines() if line[:1] == "|" for found in CELL.finditer(line)]
            yield f"{page}: {part.splitlines()[0]}", files, figures


SECTIONS = [section for section in sections() if section[2]]


def summaries(tree: Any) -> Iterator[tuple[float, float, float]]:
    """(median, least, greatest) of all that was measured several times."""
    if isinstance(tree, dict):
        if {"median", "low", "high"} <= tree.keys():
            yield tree["median"], tree["low"], tree["high"]
        for value in tree.values():
            yield from summaries(value)
    elif isinstance(tree, list):
        if tree and all(isinstance(value, int | float) for value in tree):
            yield statistics.median(tree), min(tree), max(tree)
        elif tree and all(isinstance(value, dict) for value in tree):
            groups: dict[tuple, list[dict]] = {}
            for row in tree:
                case = tuple((key, value) for key, value in row.items() if isinstance(value, int | str))
                groups.setdefault(case, []).append(row)
            for rows in groups.values():  # of the same case, such as a scale
                for key in rows[0]:
                    yield from summaries([row[key] for row in rows if isinstance(row.get(key), float)])
        for value in tree:
            yield from summaries(value)


def is_shown(value: float, text: str) -> bool:
    """Whether the text is the value, rounded to as many digits."""
    mantissa, _, exponent = text.replace(",", "").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(value - float(f"{mantissa}e{exponent or 0}")) <= 0.5001 * unit


@pytest.mark.parametrize(("section", "files", "figures"), SECTIONS, ids=[section[0] for section in SECTIONS])
def test_quoted_figures_are_in_the_result_files(section: str, files: list[str], figures: list[tuple[str, ...]]):
    assert files, f"{section} quotes figures and names no file of benchmarks/results"
    measured = [found for name in files for found in summaries(RESULTS[name])]
    for figure in figures:
        match = any(all(map(is_shown, found, figure)) for found in measured)
        assert match, f"{section}: {figure} is not in {', '.join(files)}"


def test_there_are_figures_to_look_at():
    assert sum(len(figures) for _, _, figures in SECTIONS) > 50
    assert is_shown(0.0000312, "3.1e-5")
    assert is_shown(1234.56, "1,234.6")
    assert not is_shown(1.06, "1.05")


def test_make_bench_runs_every_command_that_is_quoted():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    bench = re.sub(r"\s+", " ", makefile.partition("\nbench:")[2].partition("\n\n")[0])
    pages = "".join((ROOT / "docs" / page).read_text() for page in ("performance.md", "fidelity.md"))
    quoted = re.findall(r"`python (benchmarks/[^`]*)`", pages)
    assert len(quoted) >= 7
    for command in quoted:
        assert re.sub(r"\s+", " ", command).replace("--data cifar10", "--data $(DATA)") in bench, command
