"""The files that GitHub reads: valid by their schemas, and the workflow runs what .ci/run runs."""

import copy
import importlib.resources
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/test.yaml").read_text())
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STEPS = WORKFLOW["jobs"]["test"]["steps"]


def faults(document: Any, schema: str) -> list[str]:
    """By one of the schemas that check-jsonschema brings. YAML reads the key `on` as true."""
    folder = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    validator = jsonschema.Draft7Validator(json.loads((folder / f"{schema}.json").read_text()))
    document = {"on" if key is True else key: value for key, value in document.items()}
    return [error.message for error in validator.iter_errors(document)]


def test_the_workflow_is_valid_and_a_fault_would_be_found():
    assert faults(WORKFLOW, "github-workflows") == []
    wrong = copy.deepcopy(WORKFLOW)
    wrong["jobs"]["test"]["runs_on"] = wrong["jobs"]["test"].pop("runs-on")
    assert faults(wrong, "github-workflows")


def test_the_workflow_runs_what_ci_runs():
    *_, command = (ROOT / ".ci/run").read_text().strip().splitlines()
    assert command == "CI=true make test"  # GitHub sets CI itself
    assert [step["run"] for step in STEPS if "run" in step] == [command.removeprefix("CI=true ")]


def test_the_workflow_may_read_only_and_names_versions():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in WORKFLOW["jobs"].values())
    actions = [step["uses"] for step in STEPS if "uses" in step]
    assert actions
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions)


def test_the_workflow_s_python_is_one_that_the_project_supports():
    (version,) = [step["with"]["python-version"] for step in STEPS if "python" in step.get("uses", "")]
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_the_classifiers_name_the_supported_pythons():
    low, high = (int(minor) for minor in re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups())
    named = {found[1] for word in PROJECT["classifiers"] if (found := re.search(r"Python :: 3\.(\d+)$", word))}
    assert named == {str(minor) for minor in range(low, high)}


@pytest.mark.parametrize("key", ["version", "license"])
def test_the_citation_is_valid_and_says_what_the_project_says(key):
    assert faults(CITATION, "citation-file-format") == []
    assert CITATION[key] == PROJECT[key]


def test_the_licence_is_the_whole_text():
    lines = [line.strip() for line in (ROOT / "LICENSE").read_text().splitlines()]
    assert lines[1:4] == ["Apache License", "Version 2.0, January 2004", "http://www.apache.org/licenses/"]
    assert "END OF TERMS AND CONDITIONS" in lines
    assert lines[-1] == "limitations under the License."
