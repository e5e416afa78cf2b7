"""The command line, run as a user runs it."""

import io
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
from fisherops import linalg
from fisherops.app import cli

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


@pytest.fixture
def asked(work):
    rng = np.random.default_rng(1)
    np.savez("query.npz", X=rng.standard_normal((8, 4)), y=rng.integers(3, size=8))
    return ["influence", *OWN[1:3], "--train", "data.npz", "--query", "query.npz", "--dtype", "float64"]


def run(arguments, capsys):
    # Progress depends on the speed of the machine, so that these tests leave it out.
    status = cli.main([*arguments[:1], "--quiet", *arguments[1:]])
    out, err = capsys.readouterr()
    return status, out, err


def expected_operator(**options):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    with np.load("data.npz") as data:
        X, y = data["X"].astype(np.float32), data["y"]
    return fo.FisherMCLinearOperator(layer, nn.CrossEntropyLoss(), data=(X, y), **options)


# A line per ten seconds at most: what is done, how far it is, and the time.
PROGRESS = r"(?:(?:importing matplotlib|training a small|reading the data|computing the largest eigenvalues)[^\n]* \(\d+ s\)\n)*"


def test_the_default_job_from_a_fresh_process(tmp_path):
    """The main job end to end: digits, training, eigsh, table, picture and JSON; progress alone on stderr."""
    process = subprocess.run(
        [sys.executable, "-m", "fisherops", "spectrum", "-k", "12", "--out", str(tmp_path / "new" / "folder")],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert re.fullmatch(PROGRESS, process.stderr), process.stderr
    assert "held-out accuracy: 9" in process.stdout
    assert "index    eigenvalue  share of trace  cumulative" in process.stdout
    assert re.search(r"\d s in total, of which \d+\.\d s for imports", process.stdout)
    result = json.loads((tmp_path / "new" / "folder" / "spectrum.json").read_text())
    assert result["held_out_accuracy"] > 0.95
    assert result["examples"] == 1437
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
        X, y = data["X"], data["y"]  # all digits of the data are used
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
    "k not a number": (["-k", "x"], None, "argument -k: must be an integer of at least 1, got 'x'"),
    "k zero": (["-k", "0"], None, "argument -k: must be an integer of at least 1, got '0'"),
    "tol": (["--tol", "-1"], None, "argument --tol: must be a number from 0 to 1, got '-1'"),
    "loss": (["--loss", "l3"], None, "argument --loss: invalid choice: 'l3'"),
    "unknown option": (["--what"], None, "unrecognized arguments: --what"),
    "device": (["--device", "nodevice"], None, "--device nodevice cannot be used"),
    "weights missing": (["--weights", "none.pt"], None, "--weights none.pt is not a file"),
    "weights not readable": (["--weights", "data.npz"], None, "--weights data.npz cannot be read"),
    "out is a file": (["--out", "model.py"], None, "--out model.py cannot be made"),
    "no X": ([], write("data.npz", a=X, y=Y), r"has the arrays \['a', 'y'\]: X and y are needed"),
    "rows": ([], write("data.npz", X=X, y=Y[:3]), r"have shapes \(5, 4\) and \(3,\): they must have one row for each example"),
    "NaN": ([], write("data.npz", X=np.where(X[2:3] == X, np.nan, X), y=Y), r"X in data.npz has NaN or infinity in row 0"),
    "NaN in a later row": ([], write("data.npz", X=np.vstack([X, X[:1] + np.inf]), y=np.zeros(6, int)), "in row 5"),
    "strings": ([], write("data.npz", X=X.astype(str), y=Y), "X in data.npz has dtype <U32: it must be real numbers"),
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
    assert "Frobenius norm" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["solve"], "the following arguments are required: --damping"),
        (["solve", "--damping", "0"], "argument --damping: must be a number above 0, got '0'"),
        (["trace", "--damping", "x"], "argument --damping: must be a number above 0, got 'x'"),
        (["density", "--probes", "1"], "argument --probes: must be an integer of at least 2, got '1'"),
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


def test_several_processes_are_heard_once(work, asked, capsys):
    assert run([*asked, "--out", "alone"], capsys)[0] == 0
    process = launch([*asked, "--out", "together", "--batch-size", "3"], work)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Monte-Carlo Fisher of") == 1
    assert "in 2 processes" in process.stdout
    assert json.loads((work / "together" / "influence.json").read_text())["processes"] == 2
    with np.load("alone/influence.npz") as one, np.load("together/influence.npz") as two:
        np.testing.assert_allclose(two["influence"], one["influence"], rtol=1e-6, atol=1e-9)
    assert sorted(path.name for path in (work / "together").iterdir()) == ["influence.json", "influence.npz"]


def test_an_error_of_several_processes_is_said_once(work):
    process = launch(["trace", "--model", "nothing.py:make", "--data", "data.npz"], work)
    assert process.returncode != 0
    assert process.stderr.count("error: --model: the file nothing.py does not exist") == 1


# ---- Every option, compared with the API -----------------------------------------------------------------

LIKELIHOODS = """
    import torch

    class Net(torch.nn.Module):
        def __init__(self, size, last):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = torch.nn.Linear(3, 4), torch.nn.Linear(4, size)
            self.last = last

        def forward(self, X):
            return self.last(self.head(self.body(X).tanh()))

    def logits():
        return Net(3, lambda z: z)

    def log_probabilities():
        return Net(3, lambda z: z.log_softmax(1))

    def probabilities():
        return Net(3, torch.sigmoid)

    def mean_and_variance():
        return Net(6, lambda z: (z[:, :3], z[:, 3:].exp()))

    def distribution():
        return Net(3, lambda z: torch.distributions.Normal(z, 1.0))

    def tokens():
        return Net(6, lambda z: z.view(-1, 3, 2))
"""
CLASSES, BITS, REALS = np.arange(12) % 3, np.arange(36).reshape(12, 3) % 2, np.linspace(-1, 1, 36).reshape(12, 3)
LOSSES = {
    "ce": ("logits", nn.CrossEntropyLoss, CLASSES),
    "nll": ("log_probabilities", nn.NLLLoss, CLASSES),
    "bce": ("logits", nn.BCEWithLogitsLoss, BITS),
    "bce-probabilities": ("probabilities", nn.BCELoss, BITS),
    "mse": ("logits", nn.MSELoss, REALS),
    "gaussian": ("mean_and_variance", nn.GaussianNLLLoss, REALS),
    "l1": ("logits", nn.L1Loss, REALS),
    "smooth-l1": ("logits", nn.SmoothL1Loss, REALS),
    "huber": ("logits", nn.HuberLoss, REALS),
    "poisson": ("logits", nn.PoissonNLLLoss, 3 * BITS),
    "distribution": ("distribution", lambda: None, REALS),
}


@pytest.fixture
def likelihoods(work):
    (work / "likelihoods.py").write_text(textwrap.dedent(LIKELIHOODS))
    space = {}
    exec(textwrap.dedent(LIKELIHOODS), space)

    def prepare(factory, y):
        X = np.random.default_rng(0).standard_normal((12, 3))
        np.savez("data.npz", X=X, y=y)
        return space[factory](), (X, y), ["--model", f"likelihoods.py:{factory}", "--data", "data.npz"]

    return prepare


OPERATORS = {
    "mc": fo.FisherMCLinearOperator,
    "exact": fo.FisherLinearOperator,
    "empirical": fo.EmpiricalFisherLinearOperator,
}


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_and_kind(likelihoods, capsys, name, kind):
    factory, loss, y = LOSSES[name]
    model, data, own = likelihoods(factory, y)
    status, out, err = run(["trace", *own, "--loss", name, "--kind", kind, "--json"], capsys)
    assert (status, err) == (0, "")
    result = json.loads(out)
    op = OPERATORS[kind](model, loss(), data=data)
    assert_same(result["trace"], op.trace(), np.float32)
    assert (result["kind"], result["loss"], result["rows"]) == (kind, name, op.num_rows)
    assert (result["mc_samples"], result["seed"]) == ((1, 2147483647) if kind == "mc" else (None, None))
    assert result["reduction"] == ("sum" if name == "distribution" else "mean")


def test_every_loss_of_the_library_has_a_name():
    from fisherops.app.problems import LOSSES as NAMES
    from fisherops.likelihoods.losses import SUPPORTED

    assert NAMES.keys() == LOSSES.keys()
    assert {loss.__name__ for loss in NAMES.values() if loss} == set(SUPPORTED.split(", "))


def test_chosen_parameters(likelihoods, capsys, work):
    _, _, own = likelihoods("logits", CLASSES)
    status, _, err = run(["solve", *own, "--damping", "0.1", "--params", "head.*", "*.bias"], capsys)
    assert (status, err) == (0, "")
    with np.load("natural_gradient.npz") as found:
        assert sorted(found.files) == ["body.bias", "head.bias", "head.weight"]
    assert json.loads((work / "solve.json").read_text())["parameters"] == 4 + 15
    status, _, err = run(["trace", *own, "--params", "head.*", "tail.*"], capsys)
    assert status == 2
    assert "--params tail.* matches no parameter; the model has body.weight, body.bias, head.weight, head.bias" in err


def test_rows_by_example(likelihoods, capsys):
    model, data, own = likelihoods("tokens", np.arange(24).reshape(12, 2) % 3)
    for rows, count in (("term", 24), ("datum", 12)):
        status, out, err = run(["trace", *own, "--rows", rows, "--mc-samples", "2", "--seed", "7", "--json"], capsys)
        assert (status, err) == (0, "")
        op = fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=data, rows=rows, mc_samples=2, seed=7)
        assert_same(json.loads(out)["trace"], op.trace(), np.float32)
        assert json.loads(out)["rows"] == 2 * count


@pytest.mark.parametrize(
    "options", ["--cache scores --batch-size 5", "--cache none", "--cache linearization", "--max-memory 1MiB"]
)
def test_options_that_do_not_change_the_result(likelihoods, capsys, options):
    model, data, own = likelihoods("logits", CLASSES)
    status, out, err = run(["trace", *own, *options.split(), "--json"], capsys)
    assert (status, err) == (0, "")
    assert_same(
        json.loads(out)["trace"], fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=data).trace(), np.float32
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--kind exact --mc-samples 2", "--mc-samples does not apply to --kind exact: leave it out"),
        ("--kind empirical --seed 2", "--seed does not apply to --kind empirical: leave it out"),
        ("--kind exact --rows term", "--rows does not apply to --kind exact: leave it out"),
        ("--loss distribution --reduction mean", "--reduction mean does not apply to --loss distribution"),
        ("--max-memory much", "`max_memory` .* 'much'"),
        ("--cache all", "argument --cache: invalid choice: 'all'"),
        ("--kind ggn", "argument --kind: invalid choice: 'ggn'"),
    ],
)
def test_options_that_do_not_apply(work, capsys, options, message):
    status, out, err = run(["trace", *OWN[1:5], *options.split()], capsys)
    assert (status, out) == (2, "")
    assert re.search(message, err), err
    assert err.count("\n") == 1
    assert not (work / "trace.json").exists()


# ---- Through the API alone --------------------------------------------------------------------------------


def test_solve_with_ignored_tokens(likelihoods, capsys):
    """The gradient has the divisor of the loss: the targets that count."""
    y = np.arange(24).reshape(12, 2) % 3
    y[:, 1], y[:3] = -100, -100
    model, (X, y), own = likelihoods("tokens", y)
    options = ["--damping", "1e-2", "--dtype", "float64", "--rtol", "1e-12", "--batch-size", "4", "--json"]
    status, out, err = run(["solve", *own, *options], capsys)
    assert (status, err) == (0, "")
    model.double()
    X, y = torch.tensor(X), torch.tensor(y)
    nn.CrossEntropyLoss()(model(X), y).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()]).numpy()
    F = fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=(X, y)).todense()
    with np.load("natural_gradient.npz") as file:
        x = np.concatenate([file[name].ravel() for name, _ in model.named_parameters()])
    np.testing.assert_allclose(x, np.linalg.solve(F + 1e-2 * np.eye(len(F)), g), rtol=1e-8, atol=1e-12)
    assert json.loads(out)["gradient_norm"] == pytest.approx(np.linalg.norm(g), rel=1e-12)


def test_solve_with_unused_parameters(work, capsys):
    with open("model.py", "a") as file:
        file.write("\ndef unused():\n    net = make()\n    net.extra = torch.nn.Linear(2, 2)\n    return net\n")
    status, _, err = run(["solve", "--model", "model.py:unused", *OWN[3:5], "--damping", "0.1"], capsys)
    assert (status, err) == (0, "")
    with np.load("natural_gradient.npz") as found:
        assert not found["extra.weight"].any()
        assert found["layer.weight"].any()


@pytest.mark.parametrize("order", ["<", ">"])
def test_float64_data_keep_their_digits(work, capsys, order):
    """Seconds since 1970, in either byte order, are the same number in float32."""
    net = """
        import torch

        class Times(torch.nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.layer = torch.nn.Linear(1, 1)

            def forward(self, X):
                return self.layer((X - 1.7e9) / 100)
    """
    (work / "times.py").write_text(textwrap.dedent(net))
    space = {}
    exec(textwrap.dedent(net), space)
    X = (1.7e9 + np.linspace(0, 400, 10)[:, None]).astype(f"{order}f8")
    np.savez("data.npz", X=X, y=np.sin(X / 100).astype(f"{order}f8"))
    options = "--loss mse --kind exact --dtype float64 --json"
    status, out, err = run(["trace", "--model", "times.py:Times", "--data", "data.npz", *options.split()], capsys)
    assert (status, err) == (0, "")
    inputs = (X.astype(float) - 1.7e9) / 100
    assert json.loads(out)["trace"] == pytest.approx(2 * np.mean(inputs**2 + 1), rel=1e-12)


def test_one_hot_targets(work, capsys):
    with np.load("data.npz") as data:
        X, y = data["X"], data["y"]
    assert run(["trace", *OWN[1:5]], capsys)[0] == 0
    expected = json.loads((work / "trace.json").read_text())["trace"]
    np.savez("data.npz", X=X, y=np.eye(3, dtype=int)[y])
    status, _, err = run(["trace", *OWN[1:5]], capsys)
    assert status == 2
    assert err.rstrip().endswith("; y looks one-hot: pass classes, such as y.argmax(1)")
    np.savez("data.npz", X=X, y=np.eye(3)[y])  # probabilities
    status, _, err = run(["trace", *OWN[1:5]], capsys)
    assert (status, err) == (0, "")
    assert json.loads((work / "trace.json").read_text())["trace"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["random", "profile", "colorsys", "json"])
def test_a_model_file_named_like_a_standard_module(work, capsys, name):
    """It does not replace the module, neither at once nor when the module is imported later; neighbors are found."""
    (work / "models").mkdir()
    (work / "models" / f"{name}.py").write_text("from layers_of_mine import make\n")
    (work / "models" / "layers_of_mine.py").write_text(textwrap.dedent(MODEL))
    path = list(sys.path)
    before = sys.modules.pop(name, None)
    try:
        status, _, err = run(["trace", "--model", f"models/{name}.py:make", *OWN[3:5]], capsys)
        assert (status, err) == (0, "")
        assert not hasattr(__import__(name), "make")
    finally:
        sys.path[:] = path
        sys.modules.pop("layers_of_mine", None)
        if before is not None:
            sys.modules[name] = before


WRAPPERS = {
    "DataParallel": lambda state: {f"module.{name}": t for name, t in state.items()},
    "torch.compile": lambda state: {f"_orig_mod.{name}": t for name, t in state.items()},
    "both": lambda state: {f"module._orig_mod.{name}": t for name, t in state.items()},
    "checkpoint": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
    "Lightning": lambda state: {"state_dict": {f"model.{name}": t for name, t in state.items()}},
    "model": lambda state: {"model": {f"module.{name}": t for name, t in state.items()}},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_weights(work, capsys, wrapper):
    state = {"layer.weight": torch.ones(3, 4), "layer.bias": torch.arange(3.0)}
    found = []
    for weights in (state, WRAPPERS[wrapper](state)):
        torch.save(weights, "weights.pt")
        status, _, err = run(["trace", *OWN[1:5], "--weights", "weights.pt"], capsys)
        assert (status, err) == (0, "")
        found.append(json.loads((work / "trace.json").read_text())["trace"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"layer.weight": torch.ones(3, 4), "body.bias": torch.ones(3), "a": torch.ones(1), "b": torch.ones(1)},
            "do not fit the model: layer.bias is missing, body.bias is not in the model, a is not in the model and 1 more",
        ),
        ({"layer.weight": torch.ones(2, 4), "layer.bias": torch.ones(3)}, "size mismatch for layer.weight"),
        (torch.ones(3), "holds Tensor, not a state dict: save model.state_dict()"),
    ],
)
def test_weights_that_do_not_fit(work, capsys, state, message):
    torch.save(state, "weights.pt")
    status, _, err = run(["trace", *OWN[1:5], "--weights", "weights.pt"], capsys)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


# ---- What is printed --------------------------------------------------------------------------------------


def test_the_number_of_eigenvalues_is_at_most_that_of_parameters(work, capsys):
    for options in ([], ["-k", "15"]):
        status, out, err = run([*OWN[:5], *options], capsys)
        assert (status, err) == (0, "")
        assert len(json.loads((work / "spectrum.json").read_text())["eigenvalues"]) == 15
        assert "\n   15  " in out


def test_why_eigenvalues_are_zero(work, capsys):
    with np.load("data.npz") as data:
        np.savez("data.npz", X=data["X"][:4], y=data["y"][:4])
    for command in ("spectrum", "density", "trace"):
        status, out, err = run([command, *OWN[1:5], "--mc-samples", "2"], capsys)
        assert (status, err) == (0, "")
        assert "F is a sum over 8 rows, so at least 7 eigenvalues are zero\n" in out
    assert "rank" not in out


def test_errors_are_printed_for_estimates_only(work, capsys):
    own = ["density", *OWN[1:5]]
    assert "std. error" not in run(own, capsys)[1]
    assert "std. error" in run([*own, "--method", "primal", "--probes", "4", "--steps", "5"], capsys)[1]


@pytest.mark.parametrize(
    ("command", "files"),
    [
        (["spectrum"], ["spectrum.json", "spectrum.png"]),
        (["density"], ["density.json", "density.png"]),
        (["solve", "--damping", "1"], ["natural_gradient.npz", "solve.json"]),
        (["trace"], ["trace.json"]),
    ],
)
def test_every_command_writes_to_out(work, capsys, command, files):
    status, out, err = run([*command, *OWN[1:5], "--out", "new/folder"], capsys)
    assert (status, err) == (0, "")
    assert sorted(os.listdir("new/folder")) == files
    assert all(f"new/folder/{file}" in out for file in files)
    result = json.loads(Path(f"new/folder/{command[0]}.json").read_text())
    page = (Path(__file__).parent.parent / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert [key for key in result if f"`{key}`" not in page] == []


def test_help_names_the_defaults_and_what_is_missing(capsys):
    page = (Path(__file__).parent.parent / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    for command in ("spectrum", "density", "solve", "trace", "influence"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "Only the Python API has custom likelihoods" in text
        for option in set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*(?=[ ,])", text.split("options:")[1])) - {
            "--help",
            "-h",
        }:
            assert option in page, option


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_from_the_second_second_on(work, capsys, monkeypatch, is_terminal):
    class Stream(io.StringIO):
        def isatty(self):
            return is_terminal

    (work / "slow.py").write_text("import time\ntime.sleep(1.3)\nfrom model import make\n")
    monkeypatch.setattr(sys, "stderr", Stream())
    assert cli.main(["trace", "--model", "slow.py:make", *OWN[3:5], "--json"]) == 0
    shown, line = sys.stderr.getvalue(), "loading the model and the data (1 s)"
    assert shown.startswith(f"\r\x1b[K{line}" if is_terminal else f"{line}\n")
    assert shown.endswith("\r\x1b[K" if is_terminal else "\n")
    json.loads(capsys.readouterr().out)


def test_the_demonstration_trains_with_one_thread(monkeypatch):
    from fisherops.app import demo

    monkeypatch.setattr(demo, "_EPOCHS", 2)
    seen, before, state = [], torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        demo.train(lambda text: seen.append((text, torch.get_num_threads())))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen[1:] == [("epoch 1 of 2", 1), ("epoch 2 of 2", 1)]
    assert torch.equal(torch.get_rng_state(), state)


def test_approximate(work, capsys):
    own = ["approximate", *OWN[1:5], "--kind", "exact", "--dtype", "float64", "--damping", "0.1", "0.01"]
    status, out, err = run([*own, "--json"], capsys)
    assert (status, err) == (0, "")
    result = json.loads(out)
    found = result["approximations"]
    assert list(found) == ["none", "diagonal", "layers", "kfac", "ekfac", "kronecker", "nystrom"]
    assert found["layers"]["error"] == pytest.approx(0, abs=1e-7)  # the model has one layer
    assert 0 < found["ekfac"]["error"] <= found["kfac"]["error"] < 1
    assert [x["damping"] for x in found["kfac"]["iterations"]] == [0.1, 0.01]
    assert (work / "approximate.png").read_bytes()[:4] == b"\x89PNG"
    status, out, err = run([*own, "--approximations", "kfac"], capsys)
    assert (status, err) == (0, "")
    assert "iterations of CG" in out
    assert len([line for line in out.splitlines() if line.startswith(("none", "kfac"))]) == 2
    status, _, err = run([*own, "--method", "dual"], capsys)
    assert status == 2
    assert "--method" in err


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_influence(asked, capsys, kind, reduction):
    damping = 0.02 * (20 if reduction == "sum" else 1)
    options = ["--kind", kind, "--reduction", reduction, "--damping", str(damping), "--batch-size", "7", "--top", "2"]
    status, out, err = run([*asked, *options, "--json"], capsys)
    assert (status, err) == (0, "")
    result = json.loads(out)
    torch.manual_seed(0)
    layer, loss = nn.Linear(4, 3).double(), nn.CrossEntropyLoss()
    rows = []
    for name in ("data.npz", "query.npz"):
        with np.load(name) as file:
            X, y = (torch.from_numpy(file[key]) for key in "Xy")
        grads = [
            torch.autograd.grad(loss(layer(x[None]), t[None]), list(layer.parameters()))
            for x, t in zip(X, y, strict=True)
        ]
        rows.append(torch.stack([torch.cat([g.flatten() for g in own]) for own in grads]).numpy())
        if name == "data.npz":
            operator = {"exact": fo.FisherLinearOperator, "mc": fo.FisherMCLinearOperator}.get(
                kind, fo.EmpiricalFisherLinearOperator
            )
            F = operator(layer, loss, data=(X, y)).todense()
    expected = rows[1] @ np.linalg.solve(F + 0.02 * np.eye(15), rows[0].T) / 20
    with np.load("influence.npz") as file:
        found = file["influence"]
    np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(expected).max())
    assert (result["queries"], result["examples"], result["damping"]) == (8, 20, damping)
    for own, ranked in zip(expected, result["ranked"], strict=True):
        order = np.argsort(own)
        assert [entry["example"] for entry in ranked["harmful"]] == order[:2].tolist()
        assert [entry["example"] for entry in ranked["helpful"]] == order[::-1][:2].tolist()
        np.testing.assert_allclose([entry["score"] for entry in ranked["helpful"]], own[order[::-1][:2]], rtol=1e-6)
    page = (Path(__file__).parent.parent / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert [key for key in result if f"`{key}`" not in page] == []
    assert not Path("influence.png").exists()  # these are no images


def test_influence_predicts_the_loss_without_an_example(asked, capsys):
    """The regularized fit is a minimum, where the scores of the exact Fisher are derivatives by the weight."""
    (Path("fitted.py")).write_text(
        textwrap.dedent("""
        import numpy as np
        import torch

        def fit(keep=slice(None)):
            model = torch.nn.Linear(4, 3, dtype=torch.float64)
            torch.nn.init.zeros_(model.weight)
            torch.nn.init.zeros_(model.bias)
            with np.load("data.npz") as file:
                X, y = (torch.from_numpy(file[key])[keep] for key in "Xy")
            optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-12)

            def closure():
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(X), y, reduction="sum")
                loss = loss + sum(p.square().sum() for p in model.parameters())
                loss.backward()
                return loss

            optimizer.step(closure)
            return model
    """)
    )
    asked[2] = "fitted.py:fit"
    status, _, err = run([*asked, "--kind", "exact", "--reduction", "sum", "--damping", "2"], capsys)
    assert (status, err) == (0, "")
    with np.load("influence.npz") as file:
        found = file["influence"]
    sys.path.insert(0, str(Path.cwd()))
    from fitted import fit

    with np.load("query.npz") as file:
        X, y = (torch.from_numpy(file[key]) for key in "Xy")

    def losses(model):
        with torch.no_grad():
            return nn.functional.cross_entropy(model(X), y, reduction="none").numpy()

    whole = losses(fit())
    true = np.stack([losses(fit(np.delete(np.arange(20), n))) - whole for n in range(20)], 1)
    assert np.corrcoef(true.ravel(), found.ravel())[0, 1] > 0.98
    assert 0.7 < (true * found).sum() / (found * found).sum() < 1.4
    sys.modules.pop("fitted")


def test_influence_of_images(asked, capsys):
    Path("images.py").write_text(
        textwrap.dedent("""
        import torch

        def make():
            torch.manual_seed(0)
            return torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 3))
    """)
    )
    rng = np.random.default_rng(0)
    for name, count in (("data.npz", 12), ("query.npz", 9)):
        np.savez(name, X=rng.random((count, 3, 4, 4)), y=rng.integers(3, size=count))
    asked[2] = "images.py:make"
    status, out, err = run([*asked, "--out", "new"], capsys)
    assert (status, err) == (0, "")
    assert sorted(os.listdir("new")) == ["influence.json", "influence.npz", "influence.png"]
    assert Path("new/influence.png").read_bytes()[:4] == b"\x89PNG"
    assert "... and 3 more queries, which are in the file" in out
    damping = json.loads(Path("new/influence.json").read_text())["damping"]
    import importlib.util

    spec = importlib.util.spec_from_file_location("images_again", "images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with np.load("data.npz") as file:
        op = fo.FisherMCLinearOperator(module.make().double(), nn.CrossEntropyLoss(), data=(file["X"], file["y"]))
    assert damping == pytest.approx(0.1 * op.trace() / op.shape[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--query", "none.npz"], "--query none.npz does not exist"),
        (["--train", "none.npz"], "--train none.npz does not exist"),
        (["--model", ""], "--train and --query were given alone: give --model FILE.py:FACTORY, --train FILE.npz and "),
        (["--query", "wide.npz"], r"X in wide.npz has shape \(2, 5\), and X in data.npz \(20, 4\): all examples must"),
        (["--query", "nan.npz"], "X in nan.npz has NaN or infinity in row 1"),
        (["--damping", "0"], "argument --damping: must be a number above 0, got '0'"),
        (["--data", "data.npz"], "unrecognized arguments: --data"),
        (["--top", "0"], "argument --top: must be an integer of at least 1"),
    ],
)
def test_bad_input_of_influence(asked, capsys, options, message):
    np.savez("wide.npz", X=np.zeros((2, 5)), y=np.zeros(2, int))
    np.savez("nan.npz", X=np.array([[0.0] * 4, [np.nan] * 4]), y=np.zeros(2, int))
    status, out, err = run([*asked, *options], capsys)
    assert (status, out) == (2, "")
    assert re.search(message, err), err
    assert not Path("influence.npz").exists()
