"""What the documentation says can be run, and gives what it says."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import fisherops
import fisherops.approximate
import fisherops.linalg

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
MODULES = [module.name for module in pkgutil.walk_packages(fisherops.__path__, "fisherops.")]


PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCTESTED = [
    "fisherops.approximate.distance",
    "fisherops.approximate.exact",
    "fisherops.approximate.factored",
    "fisherops.approximate.lowrank",
    "fisherops.approximate.structured",
    "fisherops.fisher",
    "fisherops.likelihoods.base",
    "fisherops.likelihoods.density",
    "fisherops.linalg.bounds",
    "fisherops.linalg.density",
    "fisherops.linalg.eigen",
    "fisherops.linalg.estimates",
    "fisherops.linalg.inv_quad",
    "fisherops.linalg.sample",
    "fisherops.linalg.solve",
    "fisherops.operators",
    "fisherops.optim",
    "fisherops.score_matrix",
    "fisherops.scores.protocol",
    "fisherops.stored",
]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
EXAMPLE_SCRIPTS = sorted((ROOT / "docs" / "examples").glob("*.py"))
HOW_TO = ROOT / "docs" / "how-to"
# Characters of code that are visible in a page at 1280 px.
WIDTH = 72
# Peers and clients, which some environments do not have.
LEFT_OUT = [
    name
    for name in ("curvlinops", "transformers", "laplace", "primate", "skerch")
    if importlib.util.find_spec(name) is None
]


PAGE_EXAMPLES = [
    (page, number, code)
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.mark.parametrize(
    ("page", "number", "code"), PAGE_EXAMPLES, ids=[f"{page.stem}-{number}" for page, number, _ in PAGE_EXAMPLES]
)
def test_examples_of_the_pages_run(page, number, code):
    missing = [name for name in LEFT_OUT if re.search(rf"^(from|import) {name}", code, re.MULTILINE)]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    exec(compile(code, f"{page.name} example {number}", "exec"), {})


def test_the_pages_have_examples():
    found = {page.stem for page, *_ in PAGE_EXAMPLES}
    assert found >= {"accuracy", "linalg", "scores", "distributed", "likelihood", "memory", "own-model", "sequences"}
    fences = sum(page.read_text(encoding="utf-8").count("```python") for page in PAGES)
    assert len(PAGE_EXAMPLES) == fences  # the pattern misses none


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_of_the_readme_run(number, tmp_path, monkeypatch):
    assert len(EXAMPLES) == 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})


def test_doctests_are_found_where_they_are_written():
    written = []
    for name in MODULES:
        lines = Path(importlib.util.find_spec(name).origin).read_text("utf-8").splitlines()
        if any(">>> " in line and "doctest: +SKIP" not in line for line in lines):
            written.append(name)
    assert set(written) == set(DOCTESTED)


def test_code_of_the_pages_is_visible():
    """Pages show so many columns at 1280 px; what is longer is cut off."""
    blocks = {
        str(page): re.findall(r"```(?:python|sh|text)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for page in PAGES
    }
    blocks["README.md"] = EXAMPLES  # its two commands are one line each, to be copied
    blocks |= {
        script.name: [script.read_text(encoding="utf-8")]
        for script in (*TUTORIALS, *EXAMPLE_SCRIPTS, HOW_TO / "several_processes.py")
    }
    assert len(TUTORIALS) >= 6
    assert sum(map(len, blocks.values())) > 45
    lines = [(name, line) for name, codes in blocks.items() for code in codes for line in code.splitlines()]
    assert [(name, line) for name, line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("name", DOCTESTED)
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (module, name)
        for module in (fisherops.linalg, fisherops.approximate)
        for name in module.__all__
        if inspect.isfunction(getattr(module, name))
    ],
)
def test_the_docstrings_of_functions_are_complete(module, name):
    """Every parameter is described, and so are results, errors and an example."""
    function = getattr(module, name)
    _, *sections = re.split(r"^(\w[\w ]*)\n-+$", inspect.getdoc(function), flags=re.MULTILINE)
    sections = dict(zip(sections[::2], sections[1::2], strict=True))
    assert {"Parameters", "Returns", "Raises", "Examples"} <= set(sections)
    described = re.findall(r"^(\S.*?) : .*\n    +\S", sections["Parameters"], flags=re.MULTILINE)
    listed = [part for names in described for part in names.split(", ")]
    expected = [
        f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name for p in inspect.signature(function).parameters.values()
    ]
    listed += re.findall(r"^(\*\*\w+)\n    +\S", sections["Parameters"], flags=re.MULTILINE)
    assert listed == expected
    assert re.search(r"^\S.*\n    +\S", sections["Returns"], flags=re.MULTILINE)
    assert f"fo.{module.__name__.removeprefix('fisherops.')}.{name}" in sections["Examples"]


def test_links_of_the_readme_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_mathematics_names_tests_that_exist():
    """Each formula is tied to the test that checks it."""
    page = (ROOT / "docs" / "reference" / "mathematics.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", page)
    assert len(named) > 40
    for file, function in named:
        assert f"\ndef {function}(" in (ROOT / file).read_text(encoding="utf-8"), (file, function)
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    without = [section.split("\n")[0] for section in sections if "tests/test_" not in section]
    assert without == ["Notation"]


def test_the_reference_has_every_public_name():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    modules = ["fisherops", "fisherops.likelihoods"]
    modules += [f"fisherops.{name}" for name in fisherops.__all__ if isinstance(getattr(fisherops, name), ModuleType)]
    for module in modules:
        for name in importlib.import_module(module).__all__:
            known = name == "__version__" or f"fisherops.{name}" in modules
            # Functions have directives; classes are listed for pages of their own.
            assert known or re.search(rf"^(\.\. .*:: (fisherops\.)?|   ){name}$", pages, re.MULTILINE), name


def test_the_constraints_pin_everything_they_name():
    lines = (ROOT / "tests" / "constraints.txt").read_text().split()
    assert "torch==2.13.0" in lines
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
