"""The same operators on every device: the host, the simulated accelerator, and CUDA if there is one.

What is expected is found on the host without a cache, so on the host too the cached forms are compared with it.
"""

import copy
import functools
import random
import re
from contextlib import nullcontext

import numpy as np
import pytest
import simulated
import torch
import torch.distributions as td
from devices import SIMULATED, device_named, on_accelerators, on_every_device
from models import ARCHITECTURES, KINDS, LOSSES, make_case
from scipy.sparse.linalg import aslinearoperator
from tolerances import assert_same
from torch import nn

import fisherops as fo
from fisherops import approximate, linalg
from fisherops._sizes import HOST, SIZES, Sizes

CACHES = ("scores", "factors", "linearization", "none")
SHIFT = 0.5


@pytest.fixture
def device(request):
    return device_named(request.param)


@pytest.fixture(autouse=True)
def _full_precision_of_convolutions():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def _nothing_pending():
    """Leave no check of a result for another test."""
    yield
    fo._torch._pending.clear()


def operator(device, architecture="dense", loss="ce", kind="mc", dtype=torch.float64, moves_data=True, **options):
    case = make_case(architecture, loss, dtype=dtype)
    model = simulated.moved(case.model, device)
    data = [(X.to(device), y.to(device)) for X, y in case.data] if moves_data else case.data
    return KINDS[kind](model, case.loss, data=data, **options)


@functools.cache
def expected(architecture="dense", loss="ce", kind="mc", dtype=torch.float64, **options):
    """F on the host, from products without a cache."""
    op = operator("cpu", architecture, loss, kind, dtype, cache="none", **dict(options))
    return op @ np.eye(op.shape[0], dtype=op.dtype)


def vector_of(op, *shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((op.shape[1], *shape)).astype(op.dtype))


# ---- Models, losses, kinds, caches, rows -------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("architecture", ["attention", "convolutional"])
def test_projections(device, architecture):
    host = operator("cpu", architecture, cache="factors").scores.project(50, 1)
    found = operator(device, architecture, cache="factors").scores.project(50, 1)
    np.testing.assert_allclose(found.value, host.value, atol=1e-12)
    assert found.error == pytest.approx(host.error, rel=1e-9)


@on_every_device
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_losses_and_kinds(architecture, loss, kind, device):
    op = operator(device, architecture, loss, kind)
    assert op.device == device
    F = expected(architecture, loss, kind)
    assert_same(op @ np.eye(op.shape[0]), F, torch.float64)
    assert_same(op.todense(), F, torch.float64)


@pytest.mark.filterwarnings("ignore:rows of the score matrix:fisherops.PlanWarning")
@on_every_device
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_caches(architecture, cache, device):
    op = operator(device, architecture, cache=cache, mc_samples=2)
    F = expected(architecture, mc_samples=2)
    x = vector_of(op, 2)
    for _ in range(2):
        assert_same((op @ x.to(device)).cpu(), F @ x.numpy(), torch.float64)
    G = op.scores
    assert_same((G.T @ (G @ x.to(device))).cpu(), F @ x.numpy(), torch.float64)
    assert_same(op.diagonal(), F.diagonal(), torch.float64)
    np.testing.assert_allclose(op.trace(), np.trace(F), rtol=1e-12)


@on_every_device
@pytest.mark.parametrize("kind", ["mc", "empirical"])
@pytest.mark.parametrize("architecture", ["attention", "recurrent", "image"])
def test_rows_of_data(architecture, kind, device):
    op = operator(device, architecture, kind=kind, rows="datum")
    assert_same(op.todense(), expected(architecture, kind=kind, rows="datum"), torch.float64)


@on_every_device
def test_float32(device):
    op = operator(device, "convolutional", dtype=torch.float32)
    assert_same(op.todense(), expected("convolutional", dtype=torch.float32), torch.float32)


@on_every_device
def test_batches_of_the_host_are_moved(device):
    op = operator(device, moves_data=False)
    assert_same(op.todense(), expected(), torch.float64)


@on_every_device
def test_the_precision_of_the_operator(device):
    model, X = nn.Linear(3, 2).half(), torch.randn(5, 3).half()
    op = fo.FisherLinearOperator(simulated.moved(model, device), nn.MSELoss(), data=[(X.to(device), None)])
    assert op.dtype == np.float32
    moments = torch.cat([X.float(), torch.ones(5, 1)], 1)
    moments = 2 * moments.T @ moments / 10
    assert_same(op.trace(), 2 * moments.trace(), torch.float32)


@on_every_device
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("cache", ["auto", "scores", "factors", "none"])
def test_recurrent_layers(layer, cache, device):
    """The fused cells of accelerators have no rule, and a warning names the slower step."""
    torch.manual_seed(0)
    X, y = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(4, 3, 3, dtype=torch.float64)

    def build(device, cache):
        model = simulated.moved(copy.deepcopy(net), device)
        return fo.EmpiricalFisherLinearOperator(model, nn.MSELoss(), data=[(X.to(device), y.to(device))], cache=cache)

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer(2, 3, batch_first=True).double()

        def forward(self, X):
            return self.layer(X)[0]

    net = First()
    is_fused = device.type == "sim" and layer is not nn.RNN and cache in ("scores", "factors")
    with pytest.warns(fo.PlanWarning, match=r"thnn_fused_(lstm|gru)_cell") if is_fused else nullcontext():
        F = build(device, cache).todense()
    assert_same(F, build("cpu", "none").todense(), torch.float64)


# ---- Vectors ----------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_vectors_come_back_to_where_they_came_from(device, shape):
    op = operator(device)
    F, x = expected(), vector_of(op, *shape)
    others = [torch.device("cpu"), device] + ([torch.device("sim:1")] if device.type == "sim" else [])
    products = {
        "op @ x": (lambda v: op @ v, F),
        "x @ op": (lambda v: (v.T if v.ndim > 1 else v) @ op, F),
        "rdot": (lambda v: op.rdot(v.T if v.ndim > 1 else v), F),
        "damped": (lambda v: op.damped(SHIFT) @ v, F + SHIFT * np.eye(len(F))),
        "composite": (lambda v: (2 * op @ op - op) @ v, 2 * F @ F - F),
        "submatrix": (lambda v: op.submatrix(slice(0, 4)) @ v[:4], F[:4, :4]),
    }
    for name, (product, matrix) in products.items():
        reference = matrix @ x.numpy()[: len(matrix)]
        reference = reference.T if name in ("x @ op", "rdot") else reference
        for place in others:
            result = product(x.to(place))
            assert result.device == place
            assert result.is_contiguous()
            assert_same(result.cpu(), reference, torch.float64, 10_000)
        host = product(x.numpy())
        assert isinstance(host, np.ndarray)
        assert_same(host, reference, torch.float64, 10_000)


@on_every_device
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]
)
def test_dtypes_of_vectors(dtype, device):
    op = operator(device, dtype=torch.float32)
    x = torch.ones(op.shape[0], dtype=dtype).to(device)
    result = op @ x
    assert result.dtype == (dtype if dtype.is_floating_point else torch.float32)
    tolerance = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    assert_same(result.cpu().double(), expected(dtype=torch.float32).sum(1), tolerance)


@on_every_device
def test_complex_vectors(device):
    op = operator(device)
    x = torch.complex(vector_of(op), vector_of(op, seed=1))
    assert_same((op @ x.to(device)).cpu(), expected() @ x.numpy(), torch.float64)
    assert_same((op @ x.to(device).conj()).cpu(), expected() @ x.conj().resolve_conj().numpy(), torch.float64)


@on_every_device
def test_batches_of_vectors(device):
    op = operator(device)
    X = vector_of(op, 2, 3).permute(1, 0, 2)
    assert_same((op @ X.to(device)).cpu(), expected() @ X.numpy(), torch.float64)


@on_every_device
def test_vectors_are_not_changed_and_results_are_fresh(device):
    op = operator(device)
    x = vector_of(op).to(device)
    before, version = x.cpu().clone(), x._version
    first = op @ x
    kept = first.cpu().clone()
    second = op @ x
    first.zero_()
    assert torch.equal(second.cpu(), kept)
    assert torch.equal(x.cpu(), before)
    assert x._version == version


# ---- Draws -----------------------------------------------------------------------------------------


class Returns(nn.Module):
    """A model that returns a distribution, with a buffer."""

    def __init__(self, make, size):
        super().__init__()
        self.make, self.layer = make, nn.Linear(3, size).double()
        self.register_buffer("offset", torch.tensor(0.5, dtype=torch.float64))

    def forward(self, X):
        return self.make(self.layer(X), self.offset)


def affine_mixture(f, offset):
    location, scale, logits = f.chunk(3, -1)
    base = td.Normal(location, scale.exp())
    component = td.TransformedDistribution(
        base, [td.AffineTransform(offset, 2.0), td.ExpTransform(), td.ExpTransform().inv]
    )
    return td.MixtureSameFamily(td.Categorical(logits=logits), component)


DISTRIBUTIONS = {
    # make, outputs, targets: with an inverse, without one, nested
    "normal": (lambda f, offset: td.Normal(f[:, 0], offset + f[:, 1].exp()), 2, lambda: torch.randn(5)),
    "poisson": (lambda f, offset: td.Poisson(f[:, 0].exp() + offset), 1, lambda: torch.ones(5)),
    "gamma": (lambda f, offset: td.Gamma(f[:, 0].exp(), f[:, 1].exp() + offset), 2, lambda: torch.rand(5) + 0.1),
    "student": (lambda f, offset: td.StudentT(3.0, f[:, 0], f[:, 1].exp()), 2, lambda: torch.randn(5)),
    "binomial": (lambda f, offset: td.Binomial(7, logits=f[:, 0]), 1, lambda: torch.ones(5)),
    "dirichlet": (lambda f, offset: td.Dirichlet(f.exp() + offset), 3, lambda: torch.full((5, 3), 1 / 3)),
    "mixture": (affine_mixture, 6, lambda: torch.rand(5) + 0.1),
    "independent": (lambda f, _: td.Independent(td.Gamma(f[:, :2].exp(), f[:, 2:].exp()), 1), 4, lambda: torch.rand(5, 2) + 0.1),
}  # fmt: skip


@on_every_device
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_do_not_depend_on_the_device(name, device):
    make, size, targets = DISTRIBUTIONS[name]
    torch.manual_seed(0)
    model, X, y = Returns(make, size), torch.randn(5, 3, dtype=torch.float64), targets().double()

    def build(device):
        own = simulated.moved(copy.deepcopy(model), device)
        return fo.FisherMCLinearOperator(own, None, data=[(X.to(device), y.to(device))], mc_samples=2)

    assert_same(build(device).todense(), build("cpu").todense(), torch.float64, 10_000)


@on_every_device
def test_class_weights_and_sample_weights(device):
    case = make_case("dense", "ce")
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), label_smoothing=0.1)
    weights = np.linspace(0.5, 2, 7)

    def build(device):
        own = simulated.moved(copy.deepcopy(case.model), device), simulated.moved(copy.deepcopy(loss), device)
        return fo.EmpiricalFisherLinearOperator(*own, data=case.data, sample_weight=weights)

    assert_same(build(device).todense(), build("cpu").todense(), torch.float64)


@on_every_device
def test_resample(device):
    op = operator(device, cache="linearization")
    other = op.resample(7)
    assert_same(other.todense(), expected(seed=7), torch.float64)
    assert_same(op.todense(), expected(), torch.float64)


@on_every_device
@pytest.mark.parametrize("loss", LOSSES)
def test_a_stream_is_one_fixed_matrix(loss, device):
    op = operator(device, loss=loss, sampler="stream")
    F = op.todense()
    assert np.array_equal(F, operator(device, loss=loss, sampler="stream").todense())
    assert not np.array_equal(F, operator(device, loss=loss, sampler="stream", seed=1).todense())


@on_every_device
def test_streams_have_the_same_mean_on_every_device(device):
    """Within 5 standard errors."""
    means = []
    for place in ("cpu", device):
        traces = [operator(place, sampler="stream", seed=s, check_deterministic=False).trace() for s in range(30)]
        means.append((np.mean(traces), np.std(traces) / 30**0.5))
    (a, s), (b, t) = means
    assert abs(a - b) <= 5 * np.hypot(s, t)


@on_every_device
def test_random_states_are_left_alone(device):
    module = torch.get_device_module(device) if device.type != "cpu" else torch
    before = torch.get_rng_state(), module.get_rng_state(), random.getstate()
    make, size, targets = DISTRIBUTIONS["gamma"]
    model, X = simulated.moved(Returns(make, size), device), torch.randn(5, 3, dtype=torch.float64).to(device)
    torch.set_rng_state(before[0])
    for sampler in ("counter", "stream"):
        op = fo.FisherMCLinearOperator(model, None, data=[(X, targets().double().to(device))], sampler=sampler)
        torch.set_rng_state(before[0])
        op.todense()
        linalg.slogdet(op, SHIFT, method="primal")
        assert torch.equal(torch.get_rng_state(), before[0])
        assert torch.equal(module.get_rng_state(), before[1])
        assert random.getstate() == before[2]


# ---- Changes ---------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("change", ["in place", "optimizer", "buffer"])
def test_changes_are_followed(change, device):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().eval()
    simulated.moved(model, device)
    X = torch.randn(5, 3, dtype=torch.float64)
    op = fo.FisherLinearOperator(model, nn.CrossEntropyLoss(), data=[(X.to(device), None)])
    before = op.todense()
    with torch.no_grad():
        if change == "in place":
            model[0].weight.mul_(2)
        elif change == "buffer":
            model[1].running_var.mul_(3)
        else:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            torch.optim.SGD(model.parameters(), lr=0.1).step()
    host = simulated.moved(copy.deepcopy(model), "cpu")
    after = fo.FisherLinearOperator(host, nn.CrossEntropyLoss(), data=[(X, None)]).todense()
    assert not np.allclose(after, before)
    assert_same(op.todense(), after, torch.float64)


@on_every_device
def test_changes_of_contents_alone_are_found_at_a_later_product(device):
    """Of an accelerator the comparison is read when it has arrived, so that no product waits for it."""
    op = operator(device)
    weight = op.score_matrix.parameters.tensors["0.weight"]
    x = vector_of(op)
    op @ x
    alias = weight.data  # has a counter of changes of its own
    alias.mul_(2)
    if device.type != "cpu":
        op @ x
    case = make_case()
    case.model[0].weight.data.mul_(2)
    after = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data) @ x
    assert_same(op @ x, after, torch.float64)


# ---- Score matrices and files ------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("cache", CACHES)
def test_score_matrix(cache, device):
    op, host = operator(device, "attention", cache=cache), operator("cpu", "attention", cache="none")
    G, H = op.scores, host.scores.todense()
    w = torch.from_numpy(np.random.default_rng(1).standard_normal(len(H)))
    assert_same(G.todense(), H, torch.float64)
    assert_same(G.rows(2, 5), H[2:5], torch.float64)
    assert G.rows(0, 2, like=w.to(device)).device == device
    assert_same(G.row_norms(), np.linalg.norm(H, axis=1), torch.float64)
    assert_same(G.gram(), H @ H.T, torch.float64)
    assert_same((G.T @ w.to(device)).cpu(), H.T @ w.numpy(), torch.float64)
    assert_same(op.gradient(), host.gradient(), torch.float64)
    assert np.array_equal(G.datum, host.scores.datum)
    X, y = make_case("attention").data[0]
    for kind in ("empirical", "outputs"):
        own, theirs = (A.scores.on([(X, y)], kind) for A in (op, host))
        assert_same(own.gram(G), theirs.gram(host.scores), torch.float64)


@on_every_device
def test_sums_and_multiples(device):
    a, b = operator(device), operator(device, seed=3)
    F = 2 * expected() + expected(seed=3)
    total = 2 * a + b
    assert_same(total.todense(), F, torch.float64)
    x = vector_of(a)
    assert_same((total.damped(SHIFT) @ x.to(device)).cpu(), F @ x.numpy() + SHIFT * x.numpy(), torch.float64)
    assert_same(total.scores.gram().trace(), np.trace(F), torch.float64)
    damping = torch.linspace(0, 1, len(F), dtype=torch.float64)
    for place in ("cpu", device):
        damped = a.damped(damping.to(place)) @ x.to(device)
        assert_same(damped.cpu(), expected() @ x.numpy() + (damping * x).numpy(), torch.float64)


@on_every_device
def test_standard_error(device):
    op, host = (operator(d, mc_samples=4) for d in (device, "cpu"))
    x = vector_of(op, 2)
    error = op.standard_error(x.to(device))
    assert error.device == device
    assert_same(error.cpu(), host.standard_error(x), torch.float64)


@on_every_device
def test_rows_in_files(device, tmp_path):
    op = operator(device, max_memory=700, spill=tmp_path)
    assert_same(op.todense(), expected(), torch.float64)
    assert "file" in str(op.plan)
    x = vector_of(op)
    for _ in range(2):
        assert_same((op @ x.to(device)).cpu(), expected() @ x.numpy(), torch.float64)


# ---- Linear algebra -----------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("method", ["dual", "dense", "primal"])
def test_linear_algebra(method, device):
    op, F = operator(device), expected()
    D = len(F)
    damped = F + SHIFT * np.eye(D)
    x = vector_of(op, 2)
    b = x.to(device)
    pairs = linalg.eigsh(op, 3, method=method, like=b)
    assert pairs.eigenvectors.device == device
    assert pairs.converged
    np.testing.assert_allclose(pairs.eigenvalues.cpu(), np.linalg.eigvalsh(F)[-3:], rtol=1e-8)
    solved = linalg.solve(op, b, SHIFT, method=method, rtol=1e-9)
    assert solved.x.device == device
    assert solved.converged
    assert_same(solved.x.cpu(), np.linalg.solve(damped, x.numpy()), torch.float32)
    inverse = linalg.inv(op, SHIFT, method=method, rtol=1e-9)
    assert_same((inverse @ b).cpu(), np.linalg.solve(damped, x.numpy()), torch.float32)
    few = {"probes": 6, "steps": 20} if method == "primal" else {}
    log = linalg.slogdet(op, SHIFT, method=method, **few)
    assert abs(log.logabsdet - np.linalg.slogdet(damped)[1]) <= 6 * log.standard_error + 1e-8
    norm = linalg.frobenius_norm(op, method=method)
    assert abs(norm.value - np.linalg.norm(F)) <= 6 * norm.standard_error + 1e-8
    dimension = linalg.effective_dimension(op, SHIFT, method=method, **few)
    exact = np.trace(np.linalg.solve(damped, F))
    assert abs(dimension.value - exact) <= 6 * dimension.standard_error + 1e-8
    density = linalg.spectral_density(op, method=method, **few)
    assert abs(density.counts.sum() + density.below + density.above - D) <= 1e-6 * D


@on_every_device
def test_other_linear_algebra(device):
    case = make_case(loss="mse", reduction="sum")
    models = simulated.moved(copy.deepcopy(case.model), device), case.model
    op, host = (fo.FisherLinearOperator(model, case.loss, data=case.data) for model in models)
    np.testing.assert_allclose(linalg.eigvalsh(op), linalg.eigvalsh(host), atol=1e-12 * host.trace())
    np.testing.assert_allclose(linalg.trace(op).value, host.trace(), rtol=1e-12)
    np.testing.assert_allclose(linalg.diagonal(op).value, host.diagonal(), rtol=1e-10)
    block = op.submatrix("2.bias"), host.submatrix("2.bias")
    np.testing.assert_allclose(*(linalg.crlb(A).covariance for A in block), rtol=1e-8)
    gradients = {name: torch.ones(shape, dtype=torch.float64) for name, shape in op.parameter_shapes.items()}
    step = linalg.natural_gradient(op, {name: g.to(device) for name, g in gradients.items()}, SHIFT)
    for name, g in linalg.natural_gradient(host, gradients, SHIFT).items():
        assert step[name].device == device
        assert_same(step[name].cpu(), g, torch.float32)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("method", ["dual", "dense", "primal"])
def test_linear_algebra_ignores_autocast(method, dtype, device):
    op = operator(device, dtype=torch.float32)
    b = vector_of(op).to(device)
    outside = linalg.solve(op, b, SHIFT, method=method).x.cpu(), linalg.eigsh(op, 2, method=method).eigenvalues
    with torch.autocast(device.type, dtype):
        assert torch.equal(linalg.solve(op, b, SHIFT, method=method).x.cpu(), outside[0])
        assert np.array_equal(linalg.eigsh(op, 2, method=method).eigenvalues, outside[1])
        assert np.isfinite(linalg.slogdet(op, SHIFT, method=method, probes=2).logabsdet)
        assert_same(op @ b.cpu().numpy(), expected(dtype=torch.float32) @ b.cpu().numpy(), torch.float32)


@on_accelerators
def test_gram_matrices_and_spectra_keep_their_digits_where_tf32_is_allowed(device):
    op, F = operator(device, "dense", dtype=torch.float32), expected(dtype=torch.float64)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        op @ np.ones(len(F), np.float32)  # the rows are cached as such
        x = torch.randn(40, 300, device=device)
        exact = x.cpu().double() @ x.cpu().double().T
        assert ((x @ x.T).cpu() - exact).abs().max() > 1e-5 * exact.max(), "TF32 is not used here"
        H = op.scores.todense().astype(np.float64)
        assert_same(op.scores.gram(), H @ H.T, torch.float32, 100)
        values = np.linalg.eigvalsh(H.T @ H)
        for method in ("dual", "dense"):
            np.testing.assert_allclose(linalg.eigsh(op, 3, method=method).eigenvalues, values[-3:], rtol=1e-5)
            np.testing.assert_allclose(linalg.eigvalsh(op, method=method)[-3:], values[-3:], rtol=1e-5)
        assert_same(op.todense(), H.T @ H, torch.float32, 100)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# ---- Moving ------------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_moved_operators_are_the_same_matrix(architecture, kind, device):
    op = operator("cpu", architecture, kind=kind)
    moved = op.damped(SHIFT).to(device)
    assert moved.device == device
    F = expected(architecture, kind=kind) + SHIFT * np.eye(op.shape[0])
    assert_same(moved.todense(), F, torch.float64)
    assert_same(op.todense() + SHIFT * np.eye(len(F)), F, torch.float64)
    assert_same(moved.to("cpu").todense(), F, torch.float64)


@on_every_device
def test_moved_operators_keep_their_options(device):
    op = operator("cpu", mc_samples=3, seed=5, sample_weight=np.linspace(0, 1, 7), cache="factors", max_memory=10**6)
    moved = op.to(device)
    assert type(moved) is type(op)
    assert_same(moved.todense(), op.todense(), torch.float64)
    assert moved.plan.cache == "factors"
    assert moved.plan.max_memory == 10**6
    assert_same(moved.resample(1).todense(), op.resample(1).todense(), torch.float64)
    for A, B in (
        (2 * op + op.resample(1), None),
        (op.submatrix(slice(3, 9)), None),
        (op.damped(np.linspace(0, 1, op.shape[0])), None),
    ):
        B = A.to(device)
        assert B.device == device
        assert_same(B.todense(), A.todense(), torch.float64)
    assert_same(op.scores.to(device).gram(), op.scores.gram(), torch.float64)


@on_every_device
def test_a_model_that_the_user_has_moved_is_used_itself(device):
    model = make_case().model
    case = make_case()
    op = fo.FisherMCLinearOperator(model, case.loss, list(model.parameters())[:2], data=case.data)
    simulated.moved(model, device)
    moved = op.to(device)
    F = moved.todense()
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert not np.allclose(moved.todense(), F)


@on_every_device
def test_functions_of_parameters_are_moved(device):
    torch.manual_seed(0)
    params, X = {"w": torch.randn(3, 2, dtype=torch.float64)}, torch.randn(5, 3, dtype=torch.float64)
    op = fo.FisherLinearOperator(lambda p, X: X @ p["w"], nn.CrossEntropyLoss(), params, data=[(X, None)])
    assert_same(op.to(device).todense(), op.todense(), torch.float64)
    values = {"0.weight": torch.ones(4, 3, dtype=torch.float64)}
    case = make_case()
    op = fo.FisherLinearOperator(case.model, case.loss, values, data=case.data)
    assert_same(op.to(device).todense(), op.todense(), torch.float64)


@on_every_device
def test_losses_are_moved(device):
    class Scaled(fo.likelihoods.Likelihood):
        def __init__(self):
            super().__init__("sum")
            self.width = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

        def log_prob(self, f, y):
            return td.Normal(f, self.width).log_prob(y).sum(-1)

        def sample(self, f, samples, draws):
            return f + self.width * draws.normal(f, samples)

    case = make_case(loss="mse")
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    for loss, data in ((Scaled(), case.data), (weighted, make_case().data)):
        op = fo.FisherMCLinearOperator(case.model, loss, data=data)
        assert_same(op.to(device).todense(), op.todense(), torch.float64)


@on_every_device
def test_composites_are_moved(device):
    op = operator("cpu")
    G, D = op.scores, op.shape[0]
    host = aslinearoperator(np.diag(np.arange(float(D))))
    scaled = op.damped(np.linspace(0, 1, D))
    for A in (2 * op @ op - op, (1j * op + host).damped(SHIFT), op**3, G.T, G.T @ G + scaled, scaled @ op):
        moved = A.to(device)
        assert moved.device == device
        assert_same(moved.todense(), A.todense(), torch.float64, 100)
        x = vector_of(A)
        assert_same((moved @ x.to(device)).cpu(), A @ x.numpy(), torch.float64, 100)
        assert A.device == torch.device("cpu")
    with pytest.raises(TypeError, match="a composite can be moved if its parts can, got Inverse. Make the part anew"):
        (linalg.inv(op, SHIFT) @ op).to(device)


@pytest.mark.parametrize("device", ["nonsense", 3.5, "meta", "sim:7"])
def test_devices_without_memory_are_refused(device):
    with pytest.raises(ValueError, match=re.escape(f"got {device!r}") + ".* Pass one such as"):
        operator("cpu").to(device)


def test_approximations_name_the_devices():
    op, other = operator("cpu"), operator(SIMULATED)
    with pytest.raises(ValueError, match="one device to be combined, got cpu and sim:0"):
        approximate.error(op, approximate.kfac(other))


@pytest.mark.parametrize("build", ["diagonal", "layers", "kfac", "ekfac", "nystrom"])
def test_warm_products_with_approximations_wait_for_nothing(build):
    op = operator(SIMULATED)
    x, K = vector_of(op).to(SIMULATED), getattr(approximate, build)(op)
    expected = getattr(approximate, build)(operator("cpu"))
    for A, B in ((K, expected), (K.inv(SHIFT), expected.inv(SHIFT))):
        assert_same((A @ x).cpu(), B @ x.cpu().numpy(), torch.float64, 1000)
        fo._torch.settle()
        with simulated.watched() as log:
            A @ x
            A @ x
        assert not log.waits


def test_what_cannot_be_moved_says_why():
    with pytest.raises(ValueError, match="sampler='stream' cannot be moved, because the generators of each device"):
        operator("cpu", sampler="stream").to(SIMULATED)
    case = make_case()
    closure = fo.FisherLinearOperator(lambda X: case.model(X), case.loss, case.params, data=case.data)
    with pytest.raises(ValueError, match="callable X -> f, which holds its parameters itself. Move what it holds"):
        closure.to(SIMULATED)


# ---- Errors ------------------------------------------------------------------------------------------


def test_models_that_were_moved_after_construction():
    op = operator("cpu")
    simulated.moved(op.score_matrix.problem.model._module, SIMULATED)
    with pytest.raises(RuntimeError, match=r"on sim:0, and the operator is on cpu. Use `op.to\('sim:0'\)`"):
        op @ vector_of(op)
    assert_same(op.to(SIMULATED).todense(), expected(), torch.float64)
    op = operator(SIMULATED)
    for p in op.score_matrix.parameters.tensors.values():
        p.data = p.data.to("sim:1")
    with pytest.raises(RuntimeError, match=r"must be on sim:0, where the operator was made, got '0.weight' on sim:1"):
        op @ vector_of(op)


def test_parameters_and_data_on_several_devices():
    case = make_case()
    with pytest.raises(ValueError, match="on one device, got '0.weight' on cpu, '2.weight' on sim:0"):
        simulated.moved(case.model[2], SIMULATED)
        fo.FisherMCLinearOperator(case.model, case.loss, data=case.data)
    offset = torch.ones(3, dtype=torch.float64)
    model = simulated.moved(make_case().model, SIMULATED)
    with pytest.raises(RuntimeError, match="same device, but found .*sim:0 and cpu"):
        fo.FisherMCLinearOperator(lambda X: model(X) + offset, case.loss, list(model.parameters()), data=case.data)


def test_operators_on_two_devices_cannot_be_combined():
    a, b = operator("cpu"), operator(SIMULATED)
    with pytest.raises(ValueError, match="one device to be combined, got cpu and sim:0"):
        a @ b
    with pytest.raises(ValueError, match="one device to be combined, got cpu and sim:0"):
        a + b
    with pytest.raises(ValueError, match="one dtype and device, got torch.float64 on cpu and torch.float64 on sim:0"):
        a.scores.gram(b.scores)


# ---- Results that are not finite -------------------------------------------------------------------------


def overflowing(device):
    """An operator whose products with 1e30 exceed float32, on a device."""
    model = nn.Linear(2, 1, bias=False)
    X = torch.full((3, 2), 1e10)
    return fo.FisherLinearOperator(simulated.moved(model, device), nn.MSELoss(), data=[(X.to(device), None)])


@on_every_device
@pytest.mark.parametrize("place", ["host", "device"])
def test_results_that_are_not_finite_are_refused(place, device):
    op = overflowing(device)
    x = torch.full((2,), 1e30)
    match = "must be finite, got NaN or infinity"
    if place == "host" or device.type == "cpu":
        with pytest.raises(FloatingPointError, match=match):
            op @ x
        return
    with simulated.lag(3) if device.type == "sim" else torch.no_grad():
        op @ x.to(device)  # not known yet
        torch.get_device_module(device).synchronize()
        with pytest.raises(FloatingPointError, match=match):
            op @ x.to(device)
    infinite = torch.tensor([torch.inf, 1.0]).to(device)
    op @ infinite
    (op @ infinite).cpu()
    fo._torch.settle()


def test_a_flag_is_not_waited_for_and_not_read_too_early():
    op = overflowing(SIMULATED)
    x = torch.full((2,), 1e30).to(SIMULATED)
    good = torch.ones(2).to(SIMULATED)
    op @ good
    with simulated.lag(10**9), simulated.watched() as log:
        op @ x
        for _ in range(5):
            op @ good  # the device has not come to it yet
        assert not log.waits
        with pytest.raises(FloatingPointError, match="this product or an earlier one on its device"):
            op @ good.cpu()  # which is waited for anyway
        assert [name for name, _ in log.waits].count("event") == 0  # the copy of the result has waited already


def test_one_error_is_enough_for_several_results():
    op, x = overflowing(SIMULATED), torch.full((2,), 1e30).to(SIMULATED)
    with simulated.lag(10**9):
        for _ in range(3):
            op @ x
        with pytest.raises(FloatingPointError, match="must be finite"):
            op @ np.ones(2)
        op @ np.ones(2)


@pytest.mark.parametrize("leave", ["numpy", "torch", "todense", "other operator"])
def test_whatever_leaves_to_the_host_reads_the_flags(leave):
    op, other = overflowing(SIMULATED), operator(SIMULATED)
    x = torch.full((2,), 1e30).to(SIMULATED)
    with simulated.lag(10**9):
        op @ x
        with pytest.raises(FloatingPointError, match="must be finite"):
            if leave == "numpy":
                op @ np.ones(2)
            elif leave == "torch":
                op @ torch.ones(2)
            elif leave == "todense":
                (op @ op).todense()
            else:
                other @ vector_of(other)


@on_every_device
def test_vectors_beyond_the_precision_are_refused(device):
    op = operator(device, dtype=torch.float32)
    for value, match in ((1e39, "got an entry of size 1e.39"), (1e-39, "smallest normal number")):
        x = torch.full(op.shape[:1], value, dtype=torch.float64)
        with pytest.raises(FloatingPointError, match=match):
            op @ x
        with pytest.raises(FloatingPointError, match=match):
            op @ x.to(device)
            fo._torch.settle()
        with pytest.raises(FloatingPointError, match="."):
            fo._torch.settle()
            op @ x


@pytest.mark.parametrize("n", [1, 7, 64, 1000])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_largest_size_is_not_finite_if_an_entry_is_not(n, value):
    for k in {0, n // 2, n - 1}:
        for dtype in (torch.float32, torch.float64, torch.complex64):
            x = torch.ones(n, dtype=dtype)
            x[k] = value
            assert not torch.linalg.vector_norm(x, torch.inf).isfinite()


# ---- Waits --------------------------------------------------------------------------------------------


PRODUCTS = {
    "op @ v": lambda op: (op, ()),
    "op @ V": lambda op: (op, (3,)),
    "G @ v": lambda op: (op.scores, ()),
    "G.T @ w": lambda op: (op.scores.T, ()),
    "composite": lambda op: ((2 * op.damped(SHIFT) + op) @ op - op, ()),
    "power": lambda op: (op**2, ()),
    "stack": lambda op: (2 * op + op, ()),
    "submatrix": lambda op: (op.submatrix(slice(1, 6)), ()),
    "damping by a vector": lambda op: (op.damped(torch.ones(op.shape[0], device=op.device)), ()),
}


@pytest.mark.filterwarnings("ignore::fisherops.PlanWarning")
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("cache", ["scores", "factors", "linearization"])
@pytest.mark.parametrize("architecture", ["dense", "convolutional", "attention", "recurrent", "tied"])
def test_warm_products_wait_for_nothing_and_copy_nothing_but_flags(architecture, cache, batches):
    case = make_case(architecture, sizes=(4,) * batches, dtype=torch.float32)
    model = simulated.moved(case.model, SIMULATED)
    data = [(X.to(SIMULATED), y.to(SIMULATED)) for X, y in case.data]
    op = fo.FisherMCLinearOperator(model, case.loss, data=data, cache=cache)
    for name, make in PRODUCTS.items():
        A, shape = make(op)
        for dtype in (torch.float32, torch.float64, torch.float16)[: 3 if name == "op @ v" else 1]:
            x = torch.ones(A.shape[1], *shape, dtype=dtype, device=SIMULATED)
            A @ x
            fo._torch.settle()
            with simulated.watched() as log:
                A @ x
                A @ x
            assert not log.waits, (name, dtype, log.waits)
            assert all(direction == "to host" and nbytes <= 32 for direction, nbytes, _ in log.copies), log.copies


@pytest.mark.filterwarnings("ignore::fisherops.PlanWarning")
@pytest.mark.parametrize("cache", ["scores", "factors", "linearization"])
@pytest.mark.parametrize("architecture", ["dense", "convolutional", "attention", "recurrent", "tied"])
def test_warm_products_launch_the_same_operations_each_time(architecture, cache):
    """So a graph of CUDA kernels could repeat them: no shape depends on values."""
    op = operator(SIMULATED, architecture, cache=cache)
    traces = []
    for seed in range(3):
        x = vector_of(op, seed=seed).to(SIMULATED)
        with simulated.watched() as log:
            op @ x
        traces.append(log.operations)
    assert traces[1] == traces[2]
    assert len(traces[1]) > 5


def waits_of_steps(function, steps):
    """The waits of one more step: those of many steps less those of few, by the difference of their number."""
    counts = []
    for n in steps:
        with simulated.watched() as log:
            function(n)
        counts.append(len(log.waits))
    return (counts[1] - counts[0]) / (steps[1] - steps[0])


def test_solvers_wait_at_most_once_a_step():
    op = operator(SIMULATED, "attention")
    b = vector_of(op, 2).to(SIMULATED)
    op @ b

    def solve(n):
        linalg.solve(op, b, 1e-6, method="primal", rtol=1e-15, maxiter=n)

    assert waits_of_steps(solve, (3, 9)) <= 1
    assert waits_of_steps(lambda n: linalg.eigsh(op, 1, method="primal", ncv=15, maxiter=n), (4, 10)) <= 1
    assert waits_of_steps(lambda n: linalg.slogdet(op, SHIFT, method="primal", probes=2, steps=n), (3, 8)) <= 2


def test_a_solver_that_reports_waits_for_its_numbers():
    op = operator(SIMULATED)
    seen = []
    b = vector_of(op).to(SIMULATED)
    linalg.solve(op, b, SHIFT, method="primal", callback=lambda done, norm: seen.append((done, float(norm))))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][1] < seen[0][1]


def test_blocks_follow_from_the_properties_of_the_device():
    small, large = SIZES[SIMULATED], None
    with simulated.properties(simulated.H100):
        large = SIZES[SIMULATED]
    assert small == Sizes(cached=2**20, filling=2**9, block=2**18, columns=2**22, merged=2**22)
    assert large == Sizes(25 * 2**20, 132 * 2048 * 8, 80 * 2**20, 5 * 2**28, 5 * 2**28)
    with simulated.properties(None):  # a device that says nothing of itself
        assert SIZES[SIMULATED] == HOST._replace(cached=2**26)


@pytest.mark.parametrize("cache", ["scores", "factors"])
@pytest.mark.parametrize("architecture", ["convolutional", "attention"])
def test_numbers_do_not_depend_on_the_properties_of_the_device(architecture, cache):
    """A small device takes more kernels for the same numbers."""
    F, kernels = expected(architecture), []
    for own in (simulated.TINY, simulated.H100):
        with simulated.properties(own), simulated.watched() as log:
            op = operator(SIMULATED, architecture, cache=cache)
            x = vector_of(op, 12).to(SIMULATED)
            assert_same((op @ x).cpu(), F @ x.cpu().numpy(), torch.float64)
            G = op.scores.todense()
            assert_same(G.T @ G, F, torch.float64)
            assert_same(op.scores.gram(), G @ G.T, torch.float64, 100)
            assert_same(op.diagonal(), F.diagonal(), torch.float64)
            np.testing.assert_allclose(op.trace(), np.trace(F), rtol=1e-12)
        kernels.append(len(log.operations))
    assert kernels[0] > kernels[1]


@on_every_device
def test_natural_gradient_steps(device):
    """The steps of the host, with the state in the dtype of the parameters; a state of one device goes on on another."""
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    batches = [(torch.randn(5, 3).double(), torch.arange(5) % 2) for _ in range(4)]
    options = {"kind": "mc", "damping": 0.1, "momentum": 0.5, "seed": 3}
    model, loss = copy.deepcopy(host).to(device), nn.CrossEntropyLoss()
    own, reference = (fo.optim.NaturalGradient(net, loss, **options) for net in (model, host))
    for k, (X, y) in enumerate(batches):
        if k == 2:
            state = reference.state_dict()
            own = fo.optim.NaturalGradient(model, loss, **options)
            own.load_state_dict(state)
        value = own.step((X.to(device), y.to(device)))
        assert_same(float(value), float(reference.step((X, y))), torch.float64)
    for p, q in zip(model.parameters(), host.parameters(), strict=True):
        assert own.state[p]["previous"].device == p.device
        assert own.state[p]["previous"].dtype == p.dtype
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-8, atol=1e-10)
