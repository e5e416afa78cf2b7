"""Every benchmark runs, and so does the comparison with a frozen copy."""

import importlib
import importlib.util
import itertools
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import simulated

import fisherops as fo

ASV = Path(__file__).parent.parent / "asv_bench"
PEER = importlib.util.find_spec("curvlinops") is not None


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(ASV))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def suites(module):
    return [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__]


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules([str(ASV / "benchmarks")])])
def test_benchmarks_run(name):
    module = importlib.import_module(f"benchmarks.{name}")
    if hasattr(module, "DEVICE"):
        module.DEVICE = str(simulated.register())
    ran = 0
    for suite in suites(module):
        methods = [m for m in dir(suite) if m.startswith(("time_", "track_", "peakmem_"))]
        if not methods:
            continue
        params = suite.params if isinstance(suite.params, tuple) else (suite.params,)
        smallest = [[values[0], values[-1]] if len(values) > 2 else values[:1] for values in params]
        for choice in itertools.product(*smallest):
            bench = suite()
            bench.pairs, bench.N, bench.tolerance = 1, 64, 1e-1
            try:
                bench.setup(*choice)
            except NotImplementedError:
                continue  # a combination that is left out
            for method in methods:
                try:
                    result = getattr(bench, method)(*choice)
                except NotImplementedError:
                    assert not PEER  # what compares with the peer is left out where that is not installed
                    continue
                assert not method.startswith("track_") or result > 0
                ran += 1
    assert ran > 0 or name == "networks"


def test_the_working_tree_is_compared_with_itself():
    paired = importlib.import_module("paired")
    networks = importlib.import_module("benchmarks.networks")
    for work in paired.WORK:
        result = paired.prepare(fo, networks, network="mlp", work=work, size=8)()
        assert bool((abs(result) > 0).any()), work
    options = ["--pairs", "2", "--size", "8", "--only", "mlp product 1"]
    command = [sys.executable, ASV / "paired.py", ASV.parent, *options]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = re.search(
        r"^\| mlp product 1 \| \S+ \| \S+ \| ([\d.]+) \([\d.]+ to [\d.]+\) \|$", process.stdout, re.MULTILINE
    )
    assert found is not None, process.stdout
    assert float(found[1]) > 0


def test_an_unknown_reference_is_named():
    command = [sys.executable, ASV / "paired.py", "no-such-commit"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "REF must be a commit of this repository or a folder, got 'no-such-commit'." in process.stderr


def test_growth_is_measured():
    growth = importlib.import_module("growth")
    values = [10, 100, 316, 1000]
    assert abs(growth.slope(values, [7, 2e4, 2e5, 2e6], least=0) - 2) < 0.01
    assert growth.slope(values, [1, 2, 3, 4], least=5) is None
    command = [sys.executable, ASV / "growth.py", "--only", "K", "--points", "2"]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert re.search(r"^\| K, 1 to 10 \| MLP, MC \|", process.stdout, re.MULTILINE), process.stdout
    seconds = re.search(r"^  ms product: ([\d.]+), ([\d.]+)$", process.stdout, re.MULTILINE)
    assert seconds is not None, process.stdout
    assert all(float(number) > 0 for number in seconds.groups())
