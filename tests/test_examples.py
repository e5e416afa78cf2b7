"""The examples of the documentation run in their short form, which asserts what it shows."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "examples"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.stem != "figures")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_example_runs(script, capsys):
    runpy.run_path(str(script), run_name="__main__")
    assert "error" in (shown := capsys.readouterr().out) or "accuracy" in shown


def test_every_example_has_a_page_with_a_picture():
    assert len(SCRIPTS) == 5
    listed = (FOLDER / "index.md").read_text(encoding="utf-8")
    for script in SCRIPTS:
        page = script.with_name(script.stem.replace("_", "-") + ".md").read_text(encoding="utf-8")
        assert f"literalinclude}} {script.name}" in page
        assert f"{script.stem}.png" in page
        assert script.with_suffix(".png").exists()
        assert script.stem.replace("_", "-") in listed
