"""Habits that users bring along, and the errors for those that do not work: value, expectation and cure."""

import copy
import pickle
import subprocess
import sys
from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import fisherops as fo
from fisherops import linalg

KINDS = [fo.FisherMCLinearOperator, fo.FisherLinearOperator, fo.EmpiricalFisherLinearOperator]
CE = nn.CrossEntropyLoss()


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture
def X():
    return torch.randn(12, 4)


@pytest.fixture
def y():
    return torch.randint(3, (12,))


def empirical(model, X, y):
    """Σ g gᵀ / N by a loop over the examples, in float64."""
    model = copy.deepcopy(model).double()
    rows = []
    for x, target in zip(X, y, strict=True):
        loss = nn.functional.cross_entropy(model(x[None].double()), target[None].long())
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]))
    G = torch.stack(rows).numpy()
    return G.T @ G / len(rows)


# ---- What leaves is checked as it leaves --------------------------------------------------------------


@pytest.fixture
def half(model, X, y):
    """An operator of a half-precision model, gradients that overflow float16 when solved for, and the step in float64."""
    model = model.half()
    op = fo.FisherMCLinearOperator(model, CE, data=(X, y))
    gradients = {name: (1e3 * torch.randn(p.shape)).half() for name, p in model.named_parameters()}
    flat = torch.cat([g.reshape(-1) for g in gradients.values()])
    step = np.linalg.solve(op.todense().astype(float) + 1e-2 * np.eye(op.shape[0]), flat.double().numpy())
    assert abs(step).max() > 65504
    return op, gradients, flat, step


def test_steps_for_half_precision_gradients_are_in_the_compute_precision(half):
    op, gradients, flat, step = half
    tolerance = 1e-5 * np.linalg.norm(step) + 1e-5 * np.linalg.norm(flat.double()) / 1e-2
    found = linalg.natural_gradient(op, gradients, damping=1e-2)
    assert {name: s.dtype for name, s in found.items()} == dict.fromkeys(gradients, torch.float32)
    for x in (
        torch.cat([s.reshape(-1) for s in found.values()]),
        torch.cat([s.reshape(-1) for s in linalg.natural_gradient(op, list(gradients.values()), damping=1e-2)]),
        linalg.natural_gradient(op, flat, damping=1e-2),
        linalg.solve(op, flat, 1e-2).x,
        linalg.solve(op, flat, 1e-2, method="primal").x,
        torch.from_numpy(linalg.solve(op, flat.numpy(), 1e-2).x),
        torch.from_numpy(linalg.solve(op, flat[:, None].numpy(), 1e-2).x[:, 0]),
    ):
        assert x.dtype == torch.float32
        assert np.linalg.norm(x.double().numpy() - step) <= tolerance


def test_a_solution_meets_its_tolerance_in_the_dtype_in_which_it_leaves(model, X, y):
    op = fo.FisherMCLinearOperator(model, CE, data=(X, y), dtype="float64")
    b = torch.randn(op.shape[0])
    solution = linalg.solve(op, b, 1e-3, rtol=1e-12)
    assert solution.x.dtype == torch.float64
    assert solution.converged
    residual = b.double().numpy() - op.todense() @ solution.x.numpy() - 1e-3 * solution.x.numpy()
    assert np.linalg.norm(residual) <= 2e-12 * np.linalg.norm(b.double())


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_products_that_a_half_precision_vector_cannot_hold_are_refused(half, library):
    op, _, flat, _ = half
    vector = flat if library == "torch" else flat.numpy()
    for overflowing in (1e6 * op, linalg.inv(op, 1e-2), (1e6 * op).damped(1.0), 1e6 * op.T):
        with pytest.raises(FloatingPointError, match="within the range of float16, got .* pass the input as float32"):
            overflowing @ vector
    for size in (1e-5, 1e-7):
        lost = size * vector / abs(vector).max()
        lost = lost.half() if library == "torch" else lost.astype(np.float16)
        with pytest.raises(FloatingPointError, match="whose smallest normal number is 6.1e-05, got a vector"):
            op @ lost
    np.testing.assert_array_equal(op @ (0 * vector), 0)
    wanted = op.todense().astype(float) @ (1e-3 * flat.double().numpy())
    product = op @ (1e-3 * vector)
    assert product.dtype == vector.dtype
    np.testing.assert_allclose(np.asarray(product, float), wanted, rtol=0, atol=2e-3 * abs(wanted).max())


def test_vectors_beyond_the_compute_precision_are_refused(model, X, y):
    op = fo.FisherMCLinearOperator(model, CE, data=(X, y))
    D = op.shape[0]
    for size in (1e39, 1e-60):
        v = np.zeros((D, 2))
        v[:, 0], v[0, 1] = 1, size
        for use in (
            lambda v=v: op @ v,
            lambda v=v: op.scores @ v,
            lambda v=v: op.rmatmat(v),
            lambda v=v: op.damped(1.0) @ v,
            lambda v=v: (2 * op + op) @ v,
            lambda v=v: op.rdot(v.T),
            lambda v=v: op @ (1j * v),
            lambda v=v: linalg.solve(op, v, 1.0),
            lambda v=v: linalg.inv(op, 1.0) @ v,
            lambda v=v: op @ torch.from_numpy(v),
        ):
            with pytest.raises(FloatingPointError, match="within the range of float32.*Scale the vectors"):
                use()
    assert not np.isfinite(op @ np.full(D, np.inf)).any()  # what was not finite before is not refused


def test_a_composite_or_solution_that_overflows_is_refused(model, X, y):
    op = fo.FisherMCLinearOperator(model, CE, data=(X, y))
    v = np.ones(op.shape[0], np.float32)
    with pytest.raises(FloatingPointError, match="must be finite, got NaN or infinity"):
        (1e38 * (1e38 * op)) @ v
    with pytest.raises(FloatingPointError, match="must be finite, got NaN or infinity"):
        (op + aslinearoperator(np.full(op.shape, np.nan, np.float32))) @ v
    with pytest.raises((FloatingPointError, RuntimeError, ValueError), match="range of float32|positive definite"):
        linalg.solve(op, 1e30 * v, 1e-20)


def test_eigenvalues_beyond_the_compute_precision_are_refused():
    # Entries within the range of float32, whose largest eigenvalue is not.
    X = torch.ones(1, 39) * 2.0**62
    op = fo.FisherLinearOperator(nn.Linear(39, 1), nn.MSELoss(), data=(X, torch.zeros(1, 1)))
    assert np.isfinite(op.todense()).all()
    for call in (
        lambda: linalg.eigsh(op, 1, method="dense", return_eigenvectors=False),
        lambda: linalg.eigvalsh(op, method="dense"),
    ):
        with pytest.raises(FloatingPointError, match="must be finite, got NaN or infinity"):
            call()


# ---- Composites ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "int64", "uint64", "float32", "float64"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_foreign_operand_has_the_precision_of_its_partner(model, X, y, dtype, precision):
    op = fo.FisherMCLinearOperator(model, CE, data=(X, y), dtype=precision)
    F, rng = op.todense().astype(float), np.random.default_rng(0)
    M = rng.integers(0, 2, op.shape).astype(dtype)
    v = rng.standard_normal(op.shape[0]).astype(precision)
    A, M = aslinearoperator(M), M.astype(float)
    wider = np.result_type(precision, dtype if dtype.startswith("float") else precision)
    for composite, dense in (
        (op + A, F + M),
        (op - A, F - M),
        (op @ A, F @ M),
        (op.rdot(A), M @ F),
        ((op + A).T, F + M.T),
    ):
        assert composite.dtype == wider
        error = np.linalg.norm(composite @ v - dense @ v)
        assert error <= 100 * np.finfo(precision).eps * np.linalg.norm(dense) * np.linalg.norm(v)


def test_an_integer_operator_alone_is_computed_in_float64():
    M = aslinearoperator(np.diag(np.arange(1, 6, dtype=np.int8)))
    assert linalg.eigsh(M, 2).eigenvalues.dtype == np.float64


def test_toarray(model, X, y):
    op = fo.FisherMCLinearOperator(model, CE, data=(X, y))
    np.testing.assert_array_equal(op.toarray(), op.todense())
    np.testing.assert_array_equal((2 * op).toarray(), (2 * op).todense())
    np.testing.assert_array_equal(op.scores.toarray(), op.scores.todense())


@pytest.mark.parametrize("damping", [-1e-3, float("nan"), float("inf"), torch.tensor(-1.0)])
def test_damping_that_makes_no_sense_is_refused_everywhere(model, X, y, damping):
    op = fo.FisherMCLinearOperator(model, CE, data=(X, y))
    b = np.ones(op.shape[0])
    for call in (
        lambda: op.damped(damping),
        lambda: (2 * op).damped(damping),
        lambda: linalg.solve(op, b, damping),
        lambda: linalg.inv(op, damping),
        lambda: linalg.natural_gradient(op, b, damping),
        lambda: linalg.slogdet(op, damping),
        lambda: linalg.effective_dimension(op, damping),
    ):
        with pytest.raises(
            ValueError, match="`damping` must be at least 0 and finite in float.*, got .* Pass a positive"
        ):
            call()


# ---- torch.compile ------------------------------------------------------------------------------------

COMPILED = {
    "product": lambda op, v: (op @ (2 * v)) + 1,
    "composite from the left": lambda op, v: ((2 * v) @ (2 * op).damped(0.1)) + 1,
    "scores": lambda op, v: op.scores @ v,
    "solve": lambda op, v: linalg.solve(op, 2 * v, 0.1).x + 1,
    "trace": lambda op, v: op.trace() * v,
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_product_in_a_compiled_function_is_an_opaque_call(model, X, y, name):
    op, plain = (fo.FisherMCLinearOperator(model, CE, data=(X, y)) for _ in range(2))
    v = torch.randn(op.shape[0])
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph.code)
        return graph

    found = torch.compile(COMPILED[name], backend=backend)(op, v)  # nothing is cached yet
    torch.testing.assert_close(found, COMPILED[name](plain, v))
    # Nothing of the product itself was traced.
    assert not any(word in code for code in graphs for word in ("matmul", "linear", "tanh", "addmm"))


def test_products_do_not_import_the_compiler():
    code = (
        "import sys, torch, fisherops as fo; "
        "op = fo.FisherMCLinearOperator(torch.nn.Linear(2, 2), torch.nn.MSELoss(), data=(torch.ones(3, 2), torch.ones(3, 2))); "
        "op @ torch.ones(6); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


# ---- natural_gradient ---------------------------------------------------------------------------------


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.unused, self.b = nn.Linear(4, 5), nn.Parameter(torch.ones(2)), nn.Linear(5, 3)

    def forward(self, X):
        return self.b(self.a(X).tanh())


@pytest.mark.parametrize("kind", [list, tuple, "mapping"])
def test_natural_gradient_of_what_autograd_returns(X, y, kind):
    model = Unused()
    params = list(model.parameters())
    op = fo.FisherMCLinearOperator(model, CE, data=(X, y), dtype="float64")
    gradients = torch.autograd.grad(CE(model(X), y), params, allow_unused=True)
    names = [name for name, _ in model.named_parameters()]
    assert gradients[names.index("unused")] is None
    given = dict(zip(reversed(names), reversed(gradients), strict=True)) if kind == "mapping" else kind(gradients)
    found = linalg.natural_gradient(op, given, damping=0.1, rtol=1e-10)
    assert type(found) is (dict if kind == "mapping" else kind)
    found = [found[name] for name in names] if kind == "mapping" else found
    assert [s.shape for s in found] == [p.shape for p in params]
    flat = torch.cat(
        [torch.zeros(p.numel()) if g is None else g.reshape(-1) for g, p in zip(gradients, params, strict=True)]
    )
    expected = np.linalg.solve(op.todense() + 0.1 * np.eye(op.shape[0]), flat.double().numpy())
    np.testing.assert_allclose(torch.cat([s.reshape(-1) for s in found]).numpy(), expected, atol=1e-9)
    assert (found[names.index("unused")] == 0).all()
    with torch.no_grad():
        for p, step in zip(params, found, strict=True):
            p.sub_(step)


def test_natural_gradient_of_the_wrong_structure(model, X, y):
    op = fo.FisherMCLinearOperator(model, CE, data=(X, y))
    gradients = [torch.ones_like(p) for p in model.parameters()]
    with pytest.raises(
        ValueError, match="must have one gradient for each of the operator's 4 parameters, got 3. Pass None"
    ):
        linalg.natural_gradient(op, gradients[:3], damping=1.0)
    with pytest.raises(ValueError, match=r"`grad\['0.weight'\]` must have the parameter's shape \(5, 4\), got \(5,\)"):
        linalg.natural_gradient(op, [gradients[1], *gradients[1:]], damping=1.0)
    with pytest.raises(TypeError, match="`op` must be a Fisher operator if `grad` is a list"):
        linalg.natural_gradient(aslinearoperator(op.todense()), gradients, damping=1.0)
    twice = linalg.natural_gradient(2 * op, gradients, damping=1.0)
    for step, other in zip(twice, linalg.natural_gradient(op, gradients, damping=0.5), strict=True):
        torch.testing.assert_close(2 * step, other)
    numbers = [1.0] * op.shape[0]
    expected = linalg.natural_gradient(op, np.ones(op.shape[0], np.float32), damping=1.0)
    np.testing.assert_allclose(linalg.natural_gradient(op, numbers, damping=1.0), expected, rtol=1e-5)


# ---- Data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [TensorDataset, lambda X, y: Subset(TensorDataset(X, y), range(5))])
@pytest.mark.parametrize("vector", [True, False])
def test_a_dataset_of_single_examples_is_refused(model, X, y, dataset, vector):
    targets = nn.functional.one_hot(y, 3).float() if vector else y
    with pytest.raises(
        TypeError, match=r"`data` must yield batches, got the Dataset .*DataLoader\(dataset, batch_size"
    ):
        fo.FisherMCLinearOperator(model, CE, data=dataset(X, targets))


class Series:
    """What makes a pandas Series differ from an array: no array API, labels in ``[]``, ``__array__``."""

    def __init__(self, values):
        self.values = np.asarray(values)
        self.shape = self.values.shape

    def __array__(self, dtype=None, copy=None):
        return self.values if dtype is None else self.values.astype(dtype)

    def __len__(self):
        return len(self.values)

    def __iter__(self):
        return iter(self.values)

    def __getitem__(self, label):
        raise KeyError(label)


TARGETS = {
    "list": lambda y: y.tolist(),
    "list of NumPy integers": lambda y: list(y.numpy()),
    "series": lambda y: Series(y),
    "int32": lambda y: y.int(),
    "torch.uint8": lambda y: y.to(torch.uint8),
    "torch.uint16": lambda y: y.to(torch.uint16),
} | {
    f"NumPy {name}": lambda y, name=name: y.numpy().astype(name)
    for name in ("uint8", "uint16", "uint32", "uint64", ">i4")
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_targets_of_other_kinds(model, X, y, name, kind):
    targets, expected = TARGETS[name], kind(model, CE, data=[(X[:8], y[:8]), (X[8:], y[8:])]).todense()
    np.testing.assert_array_equal(kind(model, CE, data=(X, targets(y)), batch_size=8).todense(), expected)
    batches = [(X[:8], targets(y[:8])), (X[8:], targets(y[8:]))]
    np.testing.assert_array_equal(kind(model, CE, data=batches).todense(), expected)


def test_real_targets_as_lists_and_frames(X):
    model, y = nn.Linear(4, 2), torch.randn(12, 2)
    expected = fo.EmpiricalFisherLinearOperator(model, nn.MSELoss(), data=(X, y)).todense()
    for data in ((X, y.tolist()), (X.numpy(), Series(y)), (Series(X), Series(y)), [(X, y.tolist())]):
        found = fo.EmpiricalFisherLinearOperator(model, nn.MSELoss(), data=data).todense()
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(
        ValueError, match="a list of numbers must be rectangular, got parts of different lengths.*Pad them"
    ):
        fo.EmpiricalFisherLinearOperator(model, nn.MSELoss(), data=[(X[:2], [[1.0, 2.0], [3.0]])])


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "int32", "int64"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_unsigned_tokens(dtype, library, y):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3))
    tokens = torch.randint(7, (12, 3))
    expected = fo.FisherMCLinearOperator(model, CE, data=(tokens, y)).todense()
    given = tokens.numpy().astype(dtype) if library == "numpy" else tokens.to(getattr(torch, dtype))
    np.testing.assert_array_equal(fo.FisherMCLinearOperator(model, CE, data=(given, y)).todense(), expected)
    np.testing.assert_array_equal(fo.FisherMCLinearOperator(model, CE, data=[(given, y)]).todense(), expected)


def test_uint8_images_stay_images_and_the_error_of_models_for_floats_names_the_cure(y):
    images = np.random.default_rng(0).integers(0, 256, (12, 4), dtype=np.uint8)

    class Scaled(nn.Linear):
        def forward(self, X):
            assert X.dtype == torch.uint8
            return super().forward(X / 255)

    scaled, plain = Scaled(4, 3), nn.Linear(4, 3)
    plain.load_state_dict(scaled.state_dict())
    expected = fo.FisherMCLinearOperator(plain, CE, data=(torch.from_numpy(images) / 255, y)).todense()
    np.testing.assert_array_equal(fo.FisherMCLinearOperator(scaled, CE, data=(images, y)).todense(), expected)
    with pytest.raises(RuntimeError, match="same dtype") as info:
        fo.FisherMCLinearOperator(plain, CE, data=(images, y))
    assert "X has dtype uint8: convert images by `X.float() / 255`, and tokens by `X.long()`" in "".join(
        info.value.__notes__
    )


@pytest.mark.parametrize("kind", KINDS[:2])
def test_data_without_targets(model, X, y, kind):
    expected = kind(model, CE, data=[(X[:8], y[:8]), (X[8:], y[8:])]).todense()
    for data, options in (((X, None), {"batch_size": 8}), ([(X[:8], None), (X[8:], None)], {})):
        np.testing.assert_array_equal(kind(model, CE, data=data, **options).todense(), expected)
    named = [({"x": X}, None)]
    functional = lambda X: model(X["x"])
    params = list(model.parameters())
    np.testing.assert_allclose(kind(functional, CE, params, data=named).todense(), expected, atol=1e-6)
    np.testing.assert_allclose(
        kind(functional, CE, params, data=named, batch_size_fn=lambda X: 12).todense(), expected, atol=1e-6
    )


LOSSES_WITHOUT_TARGETS = {
    "MSELoss": nn.MSELoss(),
    "BCE": nn.BCEWithLogitsLoss(reduction="sum"),
    "weighted BCE": nn.BCEWithLogitsLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
    "Poisson": nn.PoissonNLLLoss(),
    "L1": nn.L1Loss(),
    "Huber": nn.HuberLoss(),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "distribution": None,
    "heads": {"a": nn.MSELoss(), "b": nn.CrossEntropyLoss()},
}


@pytest.mark.parametrize("name", LOSSES_WITHOUT_TARGETS)
def test_no_loss_needs_targets_that_it_does_not_use(model, X, name):
    loss, params = LOSSES_WITHOUT_TARGETS[name], list(model.parameters())
    call, y = model, torch.ones(12, 3)
    if name == "distribution":
        call = lambda X: torch.distributions.Normal(model(X), 2.0)
    elif name == "heads":
        call = lambda X: {"a": model(X), "b": model(X)}
        y = {"a": y, "b": torch.ones(12).long()}
    elif name == "smoothed":
        y = torch.ones(12).long()
    for kind in KINDS[:2]:
        expected = kind(call, loss, params, data=(X, y)).todense()
        np.testing.assert_array_equal(kind(call, loss, params, data=(X, None)).todense(), expected)


def test_targets_that_are_needed(model, X):
    weights = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(
        ValueError, match="batch 0: the targets y must be given for a loss with class weights, got None"
    ):
        fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(weights), data=(X, None))
    with pytest.raises(ValueError, match="must be given for a loss with pos_weight, got None"):
        fo.FisherLinearOperator(model, nn.BCEWithLogitsLoss(pos_weight=weights), data=(X, None))
    with pytest.raises(ValueError, match="targets y must be given for EmpiricalFisherLinearOperator, got None"):
        fo.EmpiricalFisherLinearOperator(model, CE, data=(X, None))
    with pytest.raises(ValueError, match="the inputs X must have a batch axis, got object in batch 0.*`batch_size_fn`"):
        fo.FisherMCLinearOperator(lambda _: model(X), CE, list(model.parameters()), data=[(object(), None)])
    with pytest.raises(TypeError, match=r"got list of length 1.*For data without targets pass"):
        fo.FisherMCLinearOperator(model, CE, data=DataLoader(TensorDataset(X), 4))


@pytest.mark.parametrize("third", [torch.zeros(12, dtype=torch.long), torch.rand(12), torch.arange(12) // 2])
@pytest.mark.parametrize("size", [1, 3, 12])
@pytest.mark.parametrize("sampler", ["counter", "stream"])
def test_a_third_element_that_is_no_index_is_refused(model, X, y, third, size, sampler):
    loader = DataLoader(TensorDataset(X, y, third), size)
    meaning = "third element of a batch .* is the index of each example in the data set. If yours means something else"
    with pytest.raises(ValueError, match=meaning):
        fo.FisherMCLinearOperator(model, CE, data=loader, sampler=sampler)
    with pytest.raises(ValueError, match=meaning):
        fo.EmpiricalFisherLinearOperator(model, CE, data=loader)
    with pytest.raises(TypeError, match="third element of a batch"):
        fo.EmpiricalFisherLinearOperator(model, CE, data=[(X, y, ["a"] * 12)])


class Restarting:
    """A loader as NVIDIA's DALI has them: its own iterator, which begins anew in ``iter``."""

    def __init__(self, batches):
        self.batches, self.position = batches, 0

    def __iter__(self):
        self.position = 0
        return self

    def __next__(self):
        if self.position == len(self.batches):
            raise StopIteration
        self.position += 1
        return self.batches[self.position - 1]


class Once(Restarting):
    def __iter__(self):
        return self


def test_a_loader_that_restarts_although_it_is_its_own_iterator(model, X, y):
    batches = [(X[:5], y[:5]), (X[5:], y[5:])]
    expected = fo.FisherMCLinearOperator(model, CE, data=batches).todense()
    op = fo.FisherMCLinearOperator(model, CE, data=Restarting(batches), cache="none")
    np.testing.assert_allclose(op.todense(), expected, atol=1e-6)
    with pytest.raises(RuntimeError, match="read 2 batches, this one only 0.*Let its `__iter__` start again"):
        fo.FisherMCLinearOperator(model, CE, data=Once(batches))


def test_batches_that_are_divided_whole_have_no_batch_size(X, y):
    batches = [(X[:6], y[:6]), (X[6:], y[6:]), (X[:2], y[:2])]
    with pytest.raises(
        ValueError, match="`batch_size` must be None for a list of batches, which are divided whole, got 4"
    ):
        fo.distributed.shard(batches, batch_size=4)


# ---- Order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("cache", ["auto", "none"])
@pytest.mark.parametrize("generator", [None, 3])
def test_a_shuffled_loader_gives_the_exact_and_the_empirical_fisher(model, X, y, kind, cache, generator):
    generator = generator if generator is None else torch.Generator().manual_seed(generator)
    loader = DataLoader(TensorDataset(X, y), 5, shuffle=True, generator=generator)
    op = kind(model, CE, data=loader, cache=cache)
    expected = kind(model, CE, data=(X, y)).todense()
    if kind is fo.EmpiricalFisherLinearOperator:
        np.testing.assert_allclose(expected, empirical(model, X, y), atol=1e-6)
    V = torch.randn(op.shape[0], 3)
    for _ in range(3):
        np.testing.assert_allclose(op @ V, expected @ V.numpy(), atol=1e-5)
    np.testing.assert_allclose(op.diagonal(), expected.diagonal(), atol=1e-6)


class Passes:
    """Data that are given by a function of the number of the pass."""

    def __init__(self, at):
        self.at, self.passes = at, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.at(self.passes))


CHANGED = {
    "a value": lambda X, y: (X + torch.eye(12, 4) * 1e-6, y),
    "a label": lambda X, y: (X, (y + (torch.arange(12) == 3)) % 3),
    "labels exchanged": lambda X, y: (X, y.roll(1)),
    "one column exchanged": lambda X, y: (torch.cat([X[:, :3], X[:, 3:].roll(1, 0)], 1), y),
    "an example twice": lambda X, y: (torch.cat([X[:1], X[:-1]]), torch.cat([y[:1], y[:-1]])),
}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_shuffled_data_that_also_change_are_found(model, X, y, change, kind):
    y = torch.arange(12) % 3  # so that exchanging labels changes something
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))

    def at(number):
        a, b = (X, y) if number == 1 else CHANGED[change](X[order], y[order])
        return list(zip(a.split(5), b.split(5), strict=True))

    with pytest.raises(
        RuntimeError, match=r"`data` must be the same in every pass.*read other examples than the first"
    ):
        kind(model, CE, data=Passes(at))


@pytest.mark.parametrize("change", ["sizes", "a later pass"])
def test_orders_that_change(model, X, y, change):
    """Batches keep their sizes; their order may change in any pass."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))

    def at(number):
        shuffled = number > (1 if change == "sizes" else 2)
        sizes = [5, 5, 2] if change != "sizes" or not shuffled else [2, 5, 5]
        a, b = (X[order], y[order]) if shuffled else (X, y)
        return list(zip(a.split(sizes), b.split(sizes), strict=True))

    def product():
        return fo.FisherLinearOperator(model, CE, data=Passes(at), cache="none") @ np.ones(43)

    if change == "sizes":
        with pytest.raises(RuntimeError, match=r"batch 0 does not have the shapes"):
            product()
    else:
        expected = fo.FisherLinearOperator(model, CE, data=(X, y)) @ np.ones(43)
        np.testing.assert_allclose(product(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sampler", ["counter", "stream"])
def test_draws_need_an_order_or_an_index(model, X, y, sampler):
    with pytest.raises(RuntimeError, match="shuffle=False") as info:
        fo.FisherMCLinearOperator(model, CE, data=DataLoader(TensorDataset(X, y), 5, shuffle=True), sampler=sampler)
    assert ("let the loader yield (X, y, index)" in str(info.value)) == (sampler == "counter")


# ---- Inputs that move themselves ----------------------------------------------------------------------


class Last(nn.Module):
    def __init__(self, tokens=False):
        super().__init__()
        self.embedding = nn.Embedding(7, 4) if tokens else nn.Identity()
        self.gru, self.head = nn.GRU(4, 3), nn.Linear(3, 2)

    def forward(self, X):
        X = X[0] if type(X) is tuple else X
        X = nn.utils.rnn.PackedSequence(self.embedding(X.data), *X[1:])
        return self.head(self.gru(X)[1][0])


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [None, "float64"])
def test_packed_sequences_in_another_precision(tokens, nested, dtype):
    model = Last(tokens)
    sequences = [torch.randint(7, (n,)) if tokens else torch.randn(n, 4) for n in (5, 3, 2, 4)]
    y = torch.tensor([0, 1, 1, 0])
    rows, double = [], copy.deepcopy(model).double()
    for s, target in zip(sequences, y, strict=True):
        one = nn.utils.rnn.pack_sequence([s if tokens else s.double()])
        loss = nn.functional.cross_entropy(double(one), target[None])
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(double.parameters()))]))
    G = torch.stack(rows).numpy()
    X = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    loss = nn.CrossEntropyLoss(reduction="sum")
    op = fo.EmpiricalFisherLinearOperator(
        model, loss, data=[((X, 1) if nested else X, y)], dtype=dtype, cache="linearization"
    )
    tolerance = 1000 * np.finfo(op.dtype).eps * np.linalg.norm(G.T @ G)
    np.testing.assert_allclose(op.todense(), G.T @ G, rtol=0, atol=tolerance)
    assert X.data.dtype == sequences[0].dtype


@dataclass
class Graph:
    """A graph batch whose ``to`` takes a device alone, and moves its tensors in different ways."""

    nodes: torch.Tensor
    edges: torch.Tensor
    extra: dict

    def to(self, device, *, non_blocking=False):
        if not isinstance(device, torch.device):
            raise TypeError(f"no device: {device!r}")
        extra = {key: t.to(device=device, non_blocking=non_blocking) for key, t in self.extra.items()}
        return Graph(self.nodes.to(device), self.edges.cpu(), extra)


def test_graph_batches_in_another_precision(X, y):
    class Net(nn.Linear):
        def forward(self, X):
            assert X.edges.dtype == torch.int64
            return super().forward(X.nodes[X.edges] * X.extra["weight"])

    model, weight, edges = Net(4, 3), torch.rand(12, 1), torch.randperm(12)
    plain = nn.Linear(4, 3).double()
    plain.load_state_dict(model.double().state_dict())
    model.float()
    op = fo.EmpiricalFisherLinearOperator(model, CE, data=[(Graph(X, edges, {"weight": weight}), y)], dtype="float64")
    expected = empirical(plain, X.double()[edges] * weight.double(), y)
    np.testing.assert_allclose(
        op.todense(), expected, rtol=0, atol=1000 * np.finfo(float).eps * np.linalg.norm(expected)
    )
    assert X.dtype == weight.dtype == torch.float32


# ---- Models -------------------------------------------------------------------------------------------


class TwoArguments(nn.Linear):
    def forward(self, X, mask):
        return super().forward(X * mask)


def test_the_error_of_a_model_of_two_arguments_names_the_cure(X, y):
    model = TwoArguments(4, 3)
    for data in ([(X, y)], [((X, X), y)], [([X, X], y)]):
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'mask'") as info:
            fo.FisherMCLinearOperator(model, CE, data=data)
        assert "model_func=lambda X: model(*X)" in "".join(info.value.__notes__)
        assert len(info.value.__notes__) == 2  # and the batch
    op = fo.FisherMCLinearOperator(lambda X: model(*X), CE, list(model.parameters()), data=[((X, X), y)])
    assert np.isfinite(op @ np.ones(15)).all()


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_the_error_of_a_model_of_keywords_names_the_cure(X, y, kind):
    class Encoding(kind):
        pass

    class Keywords(nn.Linear):
        def forward(self, input_ids=None, attention_mask=None):
            return {"logits": super().forward(input_ids.view(len(input_ids), -1) * attention_mask)}

    model, data = Keywords(4, 3), (Encoding(input_ids=X, attention_mask=X), y)
    with pytest.raises(AttributeError) as info:
        fo.FisherMCLinearOperator(model, CE, data=data)
    assert "model(**X).logits) with params=list(model.parameters())" in "".join(info.value.__notes__)
    call = lambda X: model(**X)["logits"]
    op = fo.FisherMCLinearOperator(call, CE, list(model.parameters()), data=data, batch_size=5)
    assert np.isfinite(op @ np.ones(15)).all()


class OwnError(Exception):
    """An exception that cannot be made of a text alone."""

    def __init__(self, code, where):
        super().__init__(code, where)
        self.code = code


class OwnValueError(OwnError, ValueError):
    pass


@pytest.mark.parametrize("error", [OwnError(3, "here"), OwnValueError(3, "here"), ValueError("plain"), KeyError("key")])
def test_exceptions_of_models_and_likelihoods_keep_their_type_text_and_traceback(model, X, y, error):
    def broken(X):
        raise error

    text = str(error)
    with pytest.raises(type(error)) as info:
        fo.FisherMCLinearOperator(broken, CE, list(model.parameters()), data=(X, y))
    assert info.value is error
    assert str(error) == text
    assert info.traceback[-1].name == "broken"
    error.__traceback__ = None

    class Broken(fo.likelihoods.Likelihood):
        def terms(self, output, y):
            raise error

        def sample(self, f, samples, draws):
            raise error

        log_prob = sample

    with pytest.raises(type(error)) as info:
        fo.FisherMCLinearOperator(model, Broken(), data=(X, y))
    assert info.value is error
    assert str(error) == text
    assert info.traceback[-1].name == "terms"
    assert "Raised for batch 0." in error.__notes__


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_by_position_that_are_data(model, X, y, kind):
    for wrong in (X, X.numpy(), Series(X)):
        with pytest.raises(
            TypeError, match=r"`params` must be a list of parameters .*got one .* pass the data by name, `data="
        ):
            kind(model, CE, wrong, y)
    for wrong in (DataLoader(TensorDataset(X, y)), TensorDataset(X, y)):
        with pytest.raises(TypeError, match="`params` must be a list of parameters .*, got the data .*`data=...`"):
            kind(model, CE, wrong)
    with pytest.raises(TypeError, match=r"`params\[0\]` must be a torch tensor, got a tuple.*by name, `data=...`"):
        kind(model, CE, [(X, y)])


class NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, X):
        ctx.save_for_backward(X)
        return X @ weight.T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g.T @ ctx.saved_tensors[0], None


@pytest.mark.parametrize("cache", ["scores", "factors"])
def test_an_error_about_the_cache_advises_only_what_works(X, y, cache):
    class Model(nn.Linear):
        def forward(self, X):
            return NoDerivative.apply(self.weight, X)

    model = Model(4, 3, bias=False)
    with pytest.warns(fo.PlanWarning, match="one by one"):  # first order is enough
        F = fo.EmpiricalFisherLinearOperator(model, CE, data=(X, y), cache=cache).todense()
    with pytest.raises(NotImplementedError) as info:
        fo.EmpiricalFisherLinearOperator(model, CE, data=(X, y), cache="linearization").todense()
    assert "cache=" not in str(info.value).partition("Tried")[0]
    assert np.isfinite(F).all()


def test_operators_with_opaque_methods_can_be_pickled(model, X, y):
    op = fo.FisherMCLinearOperator(model, CE, data=(X, y))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(op)).todense(), op.todense())
