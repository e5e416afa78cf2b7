"""Every evaluation of a model sees the same random numbers, and products leave the user's alone."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tolerances import assert_same
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import fisherops as fo

FORMS = ["auto", "scores", "linearization", "none"]


def _attention(h, on):
    return functional.scaled_dot_product_attention(h[:, None, :, None], h[:, None, :, None], h[:, None, :, None],
                                                   dropout_p=0.5 if on else 0.0)[:, 0, :, 0]  # fmt: skip


NOISES = {
    "dropout": lambda h, on: functional.dropout(h, 0.5, training=on),
    "alpha_dropout": lambda h, on: functional.alpha_dropout(h, 0.5, training=on),
    "rrelu": lambda h, on: functional.rrelu(h, training=on),
    "gumbel_softmax": lambda h, on: functional.gumbel_softmax(h) if on else h,
    "attention": _attention,
    "randn_like": lambda h, on: h + torch.randn_like(h) if on else h,
    "rand": lambda h, on: h * torch.rand(4, dtype=h.dtype) if on else h,
    "bernoulli": lambda h, on: h * torch.bernoulli(torch.full_like(h, 0.5)) if on else h,
    "randperm": lambda h, on: h[:, torch.randperm(4)] if on else h,
    "NumPy": lambda h, on: h * torch.from_numpy(np.random.rand(4)) if on else h,
}


class Noisy(nn.Module):
    """Adds noise between its layers in training mode, by no layer of its own."""

    def __init__(self, noise):
        super().__init__()
        self.noise, self.first, self.head = noise, nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, X):
        return self.head(self.noise(torch.tanh(self.first(X)), self.training))


def make_noisy(name):
    torch.manual_seed(0)
    return Noisy(NOISES[name]).double()


def make_data():
    g = torch.Generator().manual_seed(5)
    return [(torch.randn(n, 3, dtype=torch.float64, generator=g), torch.randint(3, (n,), generator=g)) for n in (4, 3)]


def make_operator(model, form="auto", **options):
    return fo.FisherLinearOperator(model, nn.CrossEntropyLoss(), data=make_data(), cache=form, **options)


@pytest.mark.parametrize("name", NOISES)
def test_noise_of_functions_is_found(name):
    with pytest.raises(RuntimeError, match=r"not deterministic: two evaluations of batch [01] differ.*model\.eval\(\)"):
        make_operator(make_noisy(name).train())


@pytest.mark.parametrize("form", ["auto", "none"])
@pytest.mark.parametrize("name", NOISES)
def test_noise_that_is_switched_on_later_is_found(name, form):
    model = make_noisy(name).eval()
    op = make_operator(model, form)
    op @ np.ones(op.shape[0])
    model.train()
    for use in (lambda: op @ np.ones(op.shape[0]), op.trace):
        with pytest.raises(RuntimeError, match=r"not deterministic"):
            use()
    model.eval()
    assert_same(op @ np.eye(op.shape[0]), make_operator(model).todense(), torch.float64)


@pytest.mark.parametrize("form", ["scores", "linearization"])
def test_noise_of_a_part_that_is_switched_on_later_is_found(form):
    model = nn.Sequential(nn.Linear(3, 3), make_noisy("dropout")).double().eval()
    op = make_operator(model, form)
    op @ np.ones(op.shape[0])
    model[1].training = True
    with pytest.raises(RuntimeError, match=r"not deterministic"):
        op @ np.ones(op.shape[0])


@pytest.mark.parametrize(
    "name",
    list(NOISES),
)
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.filterwarnings("ignore::fisherops.PlanWarning")
def test_without_the_check_noise_is_one_fixed_symmetric_matrix(name, later):
    """Whatever is kept, and whenever the noise was switched on; with other numbers for each of the batch's entries."""
    matrices = []
    for form in FORMS[0], FORMS[2], FORMS[3]:
        model = make_noisy(name).train(not later)
        op = make_operator(model, form, check_deterministic=False)
        eye = np.eye(op.shape[0])
        if later:
            op @ eye
            model.train()
        F = op @ eye
        np.testing.assert_array_equal(op @ eye, F)
        assert_same(F, F.T, torch.float64)
        assert np.linalg.eigvalsh(F).min() >= -1e-12 * np.abs(F).max()
        matrices.append(F)
    for F in matrices[1:]:
        assert_same(F, matrices[0], torch.float64)


class _Meanwhile(TorchDispatchMode):
    """Lets another thread draw a random number before every operation of torch inside."""

    def __init__(self, pool):
        super().__init__()
        self.drawn, self._pool = [], pool

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.drawn.append(float(self._pool.submit(torch.rand, ()).result()))
        return func(*args, **(kwargs or {}))


_CACHED = {
    "op @ v": lambda op, v: op @ v,
    "op.scores @ v": lambda op, v: op.scores @ v,
    "diagonal": lambda op, v: op.diagonal(),
    "op.scores.gram": lambda op, v: op.scores.gram(),
}


@pytest.mark.parametrize(
    ("use", "form"),
    [(use, form) for form in ("auto", "linearization") for use in _CACHED if form == "auto" or "v" in use],
)
def test_cached_products_leave_the_random_numbers_of_other_threads_alone(use, form):
    op = make_operator(make_noisy("dropout").eval(), form)
    v = torch.ones(op.shape[0], dtype=torch.float64)
    _CACHED[use](op, v)
    assert all(entry.form != "none" for entry in op.plan.entries)
    torch.manual_seed(7)
    with ThreadPoolExecutor(1) as pool, _Meanwhile(pool) as meanwhile:
        _CACHED[use](op, v)
    drawn = [*meanwhile.drawn, float(torch.rand(()))]
    torch.manual_seed(7)
    assert len(drawn) > 5
    assert drawn == [float(torch.rand(())) for _ in drawn]


def test_products_leave_the_random_state_as_it_was():
    model = make_noisy("dropout").eval()
    for form in FORMS:
        torch.manual_seed(7)
        state = torch.get_rng_state()
        op = make_operator(model, form)
        op @ np.ones(op.shape[0])
        op @ np.ones(op.shape[0])
        assert torch.equal(torch.get_rng_state(), state)
