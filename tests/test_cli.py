"""The command line, run as a user runs it."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tolerances import assert_same
from torch import nn

import fisherops as fo
from fisherops import cli, linalg

MODEL = """
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, X):
            return self.drop(self.layer(X))

    def make():
        torch.manual_seed(0)
        return Net()

    def no_module():
        return 3

    def broken():
        raise RuntimeError("out of\\nluck")

    ready = make()
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a model file and data, as the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(textwrap.dedent(MODEL))
    rng = np.random.default_rng(0)
    np.savez("data.npz", X=rng.standard_normal((20, 4)), y=rng.integers(3, size=20))
    yield tmp_path
    for name in ("model",):
        sys.modules.pop(name, None)
    while str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))
    while "." in sys.path:
        sys.path.remove(".")


OWN = ["spectrum", "--model", "model.py:make", "--data", "data.npz", "-k", "3"]


def run(arguments, capsys):
    status = cli.main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


def expected_operator(**options):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    with np.load("data.npz") as data:
        X, y = data["X"].astype(np.float32), data["y"]
    return fo.FisherMCLinearOperator(layer, nn.CrossEntropyLoss(), data=(X, y), **options)


def test_the_default_job_from_a_fresh_process(tmp_path):
    """The main job end to end: digits, training, eigsh, table, picture and JSON; nothing on stderr."""
    process = subprocess.run(
        [sys.executable, "-m", "fisherops", "spectrum", "-k", "12", "--out", str(tmp_path / "new" / "folder")],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert "held-out accuracy: 9" in process.stdout
    assert "rank    eigenvalue  share of trace  cumulative" in process.stdout
    assert "products in" in process.stdout
    result = json.loads((tmp_path / "new" / "folder" / "spectrum.json").read_text())
    assert result["held_out_accuracy"] > 0.95
    assert result["data"] == 1437
    values = result["eigenvalues"]
    assert len(values) == 12
    assert values == sorted(values, reverse=True)
    assert sum(values) < result["trace"]
    assert (tmp_path / "new" / "folder" / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["spectrum.json", "spectrum.png"]


def test_own_model_and_data(work, capsys):
    status, out, err = run(OWN, capsys)
    assert (status, err) == (0, "")
    F = expected_operator().todense()
    result = json.loads((work / "spectrum.json").read_text())
    assert_same(result["eigenvalues"], np.linalg.eigvalsh(F)[::-1][:3], np.float32)
    assert_same(result["trace"], np.trace(F), np.float32)
    assert result["parameters"] == 15
    assert "   3  " in out


def test_every_option_reaches_the_operator(work, capsys):
    np.savez("data.npz", X=np.random.default_rng(0).standard_normal((20, 4)), y=np.zeros((20, 3)))
    options = "--loss mse --reduction sum --mc-samples 3 --seed 5 --batch-size 8 --dtype float64 --tol 1e-9 --json"
    status, out, err = run([*OWN, *options.split()], capsys)
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert result == json.loads((work / "spectrum.json").read_text())
    torch.manual_seed(0)
    with np.load("data.npz") as data:
        X, y = data["X"].astype(np.float32), data["y"]
    op = fo.FisherMCLinearOperator(
        nn.Linear(4, 3), nn.MSELoss(reduction="sum"), data=(X, y), seed=5, mc_samples=3, batch_size=8, dtype="float64"
    )
    assert_same(result["eigenvalues"], np.linalg.eigvalsh(op.todense())[::-1][:3], np.float64, 10_000)
    assert result["dtype"] == "float64"


@pytest.mark.parametrize("where", ["model.py:ready", "model:make"])
def test_other_ways_to_name_a_model(work, capsys, where):
    status, _, err = run([*OWN[:2], where, *OWN[3:]], capsys)
    assert (status, err) == (0, "")


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_weights(work, capsys, name):
    state = {"layer.weight": torch.ones(3, 4), "layer.bias": torch.zeros(3)}
    save_file(state, name) if name.endswith("safetensors") else torch.save(state, name)
    status, _, err = run([*OWN, "--weights", name], capsys)
    assert (status, err) == (0, "")
    values = json.loads((work / "spectrum.json").read_text())["eigenvalues"]
    layer = nn.Linear(4, 3)
    layer.load_state_dict({"weight": state["layer.weight"], "bias": state["layer.bias"]})
    with np.load("data.npz") as data:
        op = fo.FisherMCLinearOperator(layer, nn.CrossEntropyLoss(), data=(data["X"], data["y"]))
    assert_same(values, np.linalg.eigvalsh(op.todense())[::-1][:3], np.float32)


def write(name, **arrays):
    return lambda: np.savez(name, **arrays)


def one_array():
    with open("data.npz", "wb") as file:
        np.save(file, X)


X, Y = np.zeros((5, 4)), np.zeros(5, int)
BAD = {
    "no data file": (["--data", "none.npz"], None, r"--data none.npz does not exist"),
    "no model file": (["--model", "none.py:make"], None, "the file none.py does not exist"),
    "no module": (["--model", "none.such:make"], None, "importing none.such raised ModuleNotFoundError"),
    "no colon": (["--model", "model.py"], None, "write FILE.py:FACTORY or package.module:FACTORY"),
    "no factory": (["--model", "model.py:nope"], None, "model.py has no 'nope'; it has Net, broken, make, no_module, ready"),
    "not a module": (["--model", "model.py:no_module"], None, "returned int: it must return an nn.Module"),
    "factory raises": (["--model", "model.py:broken"], None, "broken in model.py raised RuntimeError: out of luck"),
    "data alone": (["--model", ""], None, "--data was given alone: give both"),
    "k too large": (["-k", "16"], None, "-k is 16, but the model has 15 parameters: choose k ≤ 15"),
    "k not a number": (["-k", "x"], None, "argument -k: got 'x', an integer of at least 1 is taken"),
    "k zero": (["-k", "0"], None, "argument -k: got 0, an integer of at least 1 is taken"),
    "tol": (["--tol", "-1"], None, "argument --tol: got '-1', a number from 0 to 1"),
    "loss": (["--loss", "l1"], None, "argument --loss: invalid choice: 'l1'"),
    "unknown option": (["--what"], None, "unrecognized arguments: --what"),
    "device": (["--device", "nodevice"], None, "--device nodevice cannot be used"),
    "weights missing": (["--weights", "none.pt"], None, "--weights none.pt is no file"),
    "weights not readable": (["--weights", "data.npz"], None, "--weights data.npz cannot be read"),
    "out is a file": (["--out", "model.py"], None, "--out model.py cannot be made"),
    "no X": ([], write("data.npz", a=X, y=Y), r"has the arrays \['a', 'y'\]: X and y are needed"),
    "rows": ([], write("data.npz", X=X, y=Y[:3]), r"have shapes \(5, 4\) and \(3,\): they must have one row for each"),
    "NaN": ([], write("data.npz", X=np.where(X[2:3] == X, np.nan, X), y=Y), r"X in data.npz has NaN or infinity in row 0"),
    "NaN in a later row": ([], write("data.npz", X=np.vstack([X, X[:1] + np.inf]), y=np.zeros(6, int)), "in row 5"),
    "strings": ([], write("data.npz", X=X.astype(str), y=Y), "X in data.npz has dtype <U32: real numbers"),
    "objects": ([], lambda: np.savez("data.npz", X=np.array([None] * 5), y=Y), "cannot be read as .npz: Object arrays"),
    "float classes": ([], write("data.npz", X=X, y=Y * 1.0), "--loss ce takes integer classes"),
    "no rows": ([], write("data.npz", X=X[:0], y=Y[:0]), r"shapes \(0, 4\) and \(0,\)"),
    "width": ([], write("data.npz", X=X[:, :2], y=Y), r"on X \(5, 2\) and y \(5,\) failed: RuntimeError: mat1 and mat2"),
    "class": ([], write("data.npz", X=X, y=Y + 7), r"failed: batch 0: class index 7 is not in \[0, 3\)"),
    "weights empty": (["--weights", "empty.pt"], lambda: Path("empty.pt").touch(), "--weights empty.pt cannot be read"),
    "all ignored": ([], write("data.npz", X=X, y=Y - 100), "every loss term of the data is ignored"),
    "not an archive": ([], lambda: Path("data.npz").write_bytes(b"x" * 100), "data.npz cannot be read as .npz"),
    "one array": ([], one_array, "is one array, not an archive"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line_and_status_2_and_writes_nothing(work, capsys, name):
    options, prepare, message = BAD[name]
    if prepare:
        prepare()
    before = sorted(os.listdir(work))
    status, out, err = run([*OWN, *options], capsys)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("python -m fisherops")
    assert "error: " in err
    assert re.search(message, err), err
    assert [f for f in sorted(os.listdir(work)) if f != "__pycache__"] == before


def test_bad_input_without_a_command(capsys):
    status, _, err = run([], capsys)
    assert status == 2
    assert "the following arguments are required: COMMAND" in err
    status, _, err = run(["spectrum", "--loss", "mse"], capsys)
    assert status == 2
    assert "--loss mse needs --model and --data" in err


def test_failure_while_writing_leaves_the_old_files(work, capsys, monkeypatch):
    assert run(OWN, capsys)[0] == 0
    before = {name: (work / name).read_bytes() for name in ("spectrum.json", "spectrum.png")}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    status, _, err = run([*OWN, "--seed", "3"], capsys)
    assert status == 2
    assert "cannot write to .: No space left on device" in err
    assert {name: (work / name).read_bytes() for name in before} == before
    assert not [name for name in os.listdir(work) if name.startswith(".fisherops")]


def test_an_interrupt_writes_nothing(work, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(linalg, "eigsh", interrupt)
    status, out, err = run(OWN, capsys)
    assert (status, out) == (130, "")
    assert "interrupted, nothing was written" in err
    assert not (work / "spectrum.json").exists()


def test_no_convergence_is_said(work, capsys, monkeypatch):
    eigsh = linalg.eigsh
    monkeypatch.setattr(linalg, "eigsh", lambda *args, **options: eigsh(*args, **options, maxiter=4))
    status, _, err = run([*OWN, "--method", "primal"], capsys)
    assert status == 2
    assert "eigsh gave up after 4 products before --tol 0: ask for fewer eigenvalues" in err
    monkeypatch.undo()
    monkeypatch.chdir(work)
    solve = linalg.solve
    monkeypatch.setattr(linalg, "solve", lambda *args, **options: solve(*args, **options, maxiter=1))
    status, _, err = run(["solve", *OWN[1:5], "--damping", "1e-3", "--method", "primal", "--rtol", "1e-9"], capsys)
    assert status == 2
    assert re.search("the residual is .* after 1 iterations and does not come to --rtol 1e-09", err)
    assert not (work / "natural_gradient.npz").exists()


@pytest.mark.parametrize("method", ["auto", "dual", "dense", "primal"])
def test_density(work, capsys, method):
    status, out, err = run(["density", *OWN[1:5], "--method", method, "--probes", "4", "--steps", "15"], capsys)
    assert (status, err) == (0, "")
    result = json.loads((work / "density.json").read_text())
    assert result["parameters"] == 15
    assert sum(result["counts"]) + result["below"] + result["above"] == pytest.approx(15)
    assert result["method"] == method or method == "auto"
    assert "eigenvalues" in out
    assert (work / "density.png").read_bytes().startswith(b"\x89PNG")
    status, out, _ = run(["density", *OWN[1:5], "--json"], capsys)
    assert json.loads(out)["method"] in ("dual", "dense")


@pytest.mark.parametrize("method", ["auto", "dense", "primal"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_solve_gives_the_natural_gradient(work, capsys, method, reduction):
    arguments = ["solve", *OWN[1:5], "--damping", "0.1", "--method", method, "--reduction", reduction]
    status, out, err = run([*arguments, "--batch-size", "7", "--dtype", "float64", "--rtol", "1e-10"], capsys)
    assert (status, err) == (0, "")
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    with np.load("data.npz") as data:
        X, y = torch.from_numpy(data["X"]).float(), torch.from_numpy(data["y"])
    nn.CrossEntropyLoss(reduction=reduction)(layer(X), y).backward()
    g = torch.cat([p.grad.reshape(-1) for p in layer.parameters()]).double().numpy()
    op = fo.FisherMCLinearOperator(layer, nn.CrossEntropyLoss(reduction=reduction), data=(X, y), dtype="float64")
    expected = np.linalg.solve(op.todense() + 0.1 * np.eye(15), g)
    with np.load("natural_gradient.npz") as found:
        assert sorted(found.files) == ["layer.bias", "layer.weight"]
        assert found["layer.weight"].shape == (3, 4)
        x = np.concatenate([found["layer.weight"].ravel(), found["layer.bias"]])
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert "residual" in out


def test_trace(work, capsys):
    F = expected_operator().todense().astype(float)
    status, out, err = run(["trace", *OWN[1:5], "--damping", "0.1", "--json"], capsys)
    assert (status, err) == (0, "")
    result = json.loads(out)
    values = np.linalg.eigvalsh(F).clip(0)
    assert result["trace"] == pytest.approx(values.sum(), rel=1e-5)
    assert result["frobenius_norm"] == pytest.approx(np.linalg.norm(F), rel=1e-5)
    assert result["effective_dimension"] == pytest.approx((values / (values + 0.1)).sum(), rel=1e-5)
    assert result["log_determinant"] == pytest.approx(np.log(values + 0.1).sum(), rel=1e-5)
    assert set(result["standard_errors"].values()) == {0.0}
    status, out, err = run(["trace", *OWN[1:5]], capsys)
    assert (status, err) == (0, "")
    assert "effective dimension" not in out
    assert "frobenius norm" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["solve"], "the following arguments are required: --damping"),
        (["solve", "--damping", "0"], "argument --damping: got '0', a number above 0 is taken"),
        (["trace", "--damping", "x"], "argument --damping: got 'x', a number above 0 is taken"),
        (["density", "--probes", "1"], "argument --probes: got 1, an integer of at least 2 is taken"),
        (["density", "--method", "gram"], "argument --method: invalid choice: 'gram'"),
    ],
)
def test_options_of_the_other_commands(work, capsys, arguments, message):
    status, out, err = run([*arguments[:1], *OWN[1:5], *arguments[1:]], capsys)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("library", ["matplotlib", "sklearn"])
def test_a_missing_extra_is_named(tmp_path, library):
    (tmp_path / library).mkdir()
    (tmp_path / library / "__init__.py").write_text("raise ImportError")
    process = subprocess.run(
        [sys.executable, "-m", "fisherops", "spectrum", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert process.returncode == 2
    assert "pip install 'fisherops[demo]'" in process.stderr
    assert process.stderr.count("\n") == 1


def test_importing_the_library_imports_nothing_optional():
    code = "import fisherops, sys; print([m for m in ('matplotlib', 'sklearn', 'safetensors', 'cupy', 'jax') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


def test_help_and_version(capsys):
    for arguments, text in [
        (["--help"], "spectrum"),
        (["spectrum", "--help"], "--mc-samples"),
        (["--version"], "0.1.0"),
    ]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 0
        assert text in capsys.readouterr().out


def launch(arguments, folder):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fisherops",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=folder, env=environment, timeout=200, check=False
    )


def test_several_processes_are_heard_once(work, capsys):
    assert run([*OWN, "--out", "alone"], capsys)[0] == 0
    process = launch([*OWN, "--out", "together"], work)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Monte-Carlo Fisher of") == 1
    assert "in 2 processes" in process.stdout
    one, two = (json.loads((work / where / "spectrum.json").read_text()) for where in ("alone", "together"))
    np.testing.assert_allclose(two["eigenvalues"], one["eigenvalues"], rtol=1e-4)
    assert two["processes"] == 2
    assert (work / "together" / "spectrum.png").stat().st_size > 1000
    assert sorted(path.name for path in (work / "together").iterdir()) == ["spectrum.json", "spectrum.png"]


def test_an_error_of_several_processes_is_said_once(work):
    process = launch(["trace", "--model", "nothing.py:make", "--data", "data.npz"], work)
    assert process.returncode != 0
    assert process.stderr.count("error: --model: the file nothing.py does not exist") == 1
