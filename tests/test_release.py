"""What a release says of itself: its version, its citation, its changelog, and the lowest versions of what it needs."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import fisherops

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def pins(name):
    lines = (ROOT / "tests" / name).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r.specifier for r in requirements}


def declared():
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["demo"], *extras["test"]]
    return [r for r in map(Requirement, lines) if r.name != PROJECT["name"]]


def test_the_version_is_written_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    assert str(Version(fisherops.__version__)) == fisherops.__version__
    assert importlib.metadata.version("fisherops") == fisherops.__version__  # else: install again


def test_the_citation_is_complete_and_of_this_version():
    assert CITATION["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(CITATION)
    known = {"abstract", "cff-version", "date-released", "doi", "identifiers", "repository-code", "type", "url"}
    assert set(CITATION) <= known | {"message", "title", "authors", "version", "license", "keywords"}
    assert CITATION["type"] == "software"
    assert CITATION["authors"] == PROJECT["authors"]
    assert str(CITATION["version"]) == fisherops.__version__
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["keywords"] == PROJECT["keywords"]
    assert all(isinstance(CITATION[key], str) for key in ("message", "title", "abstract"))


def test_the_changelog_keeps_its_form():
    headings = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    releases = [heading for heading in headings if heading != "Unreleased"]
    assert headings == ["Unreleased"] * ("Unreleased" in headings) + releases
    for release in releases:
        assert re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d{2}-\d{2}", release), release
    versions = [Version(release.split(" ")[0]) for release in releases]
    assert versions == sorted(versions, reverse=True)
    if "Unreleased" not in headings:
        assert str(versions[0]) == fisherops.__version__
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for section in re.split(r"^## ", CHANGELOG, flags=re.MULTILINE)[1:]:
        found = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert found, section
        assert set(found) <= kinds
        assert len(found) == len(set(found))
        assert section.count("\n\n- ") == len(found)  # each is followed by its list


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_the_lowest_versions_are_those_that_are_tested(requirement):
    (bound,) = requirement.specifier
    (pin,) = pins("constraints-lowest.txt")[canonicalize_name(requirement.name)]
    assert bound.operator == ">="
    assert pin.operator == "=="
    assert Version(pin.version) == Version(bound.version)


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_the_constraints_pin_what_is_declared(requirement):
    (pin,) = pins("constraints.txt")[canonicalize_name(requirement.name)]
    assert pin.operator == "=="
    assert requirement.specifier.contains(pin.version)


def test_the_python_versions_agree():
    lowest = PROJECT["requires-python"].removeprefix(">=")
    listed = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert listed[0] == lowest
    assert f"Python ≥ {lowest}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_workflow_calls_the_scripts_that_run_calls():
    """What GitHub checks and what ``.ci/run`` checks are the same scripts, on every Python that is declared."""
    if not (ROOT / ".ci").exists():
        pytest.skip("an sdist has no .ci")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    called = {step["run"].split()[1] for step in steps if "run" in step}
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    order = " ".join(re.findall(r"run_steps ([^|)\n]+)", run))
    names = re.findall(r"[a-z]+", re.sub(r"--[a-z]+|(?<=install) [a-z,]+", "", order))
    assert called == {f".ci/{name}" for name in names}
    assert all((ROOT / name).is_file() for name in called)
    listed = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python-version"] == listed
