"""Families of models whose parameters' uses are all found, with the rows of loops; the table is asv_bench/families.py."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


def _load():
    path = Path(__file__).parent.parent / "asv_bench" / "families.py"
    spec = importlib.util.spec_from_file_location("model_families", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


families = _load()

# Their parameters are used past the calls that are seen; scripted functions change when they are optimized.
SLOWER = {"another thread", "custom function, other derivative", "scripted function"}
HIDDEN = "used past the calls of torch that are seen"

# Their attention rounds to float32: what cancels exactly in a softmax is noise, which nothing can be compared with.
ROUNDED = {"Longformer": 1e-6, "Funnel": 1e-6, "Gemma": 1e-6}


@pytest.mark.parametrize("name", [*families.TRANSFORMERS, *families.PLAIN])
def test_rows_are_those_of_loops(name):
    package = families.missing_package(name)
    if package is not None:
        pytest.skip(f"{package} is not installed")
    result = families.examine(name)
    assert result.zero == []
    assert result.error <= ROUNDED.get(name, 1e-12)
    if name in SLOWER:
        assert all(HIDDEN in reason for reason in result.unknown.values())
        assert result.unknown or name == "scripted function"
    elif name not in ROUNDED:
        assert result.unknown == {}
