"""Models with several outputs, each with a loss of its own."""

import numpy as np
import pytest
import torch
import torch.distributions as td
from tolerances import assert_same
from torch import nn

import fisherops as fo
from fisherops import likelihoods

OPERATORS = [fo.FisherMCLinearOperator, fo.FisherLinearOperator, fo.EmpiricalFisherLinearOperator]


class TwoHeads(nn.Module):
    """A class and a sequence of positions for each datum, from a common trunk."""

    def __init__(self, form):
        super().__init__()
        self.trunk, self.tag, self.place = nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(3, 10)
        self.form = form

    def forward(self, X):
        h = self.trunk(X).tanh()
        tag, place = self.tag(h), self.place(h).view(-1, 5, 2)
        return {"tag": tag, "place": place, "hidden": h} if self.form is dict else (tag, place)


@pytest.fixture(params=[dict, tuple])
def form(request):
    return request.param


@pytest.fixture
def problem(form):
    torch.manual_seed(0)
    model = TwoHeads(form).double()
    X = torch.randn(6, 2).double()
    losses = {
        "tag": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5, 1.0]).double()),
        "place": nn.MSELoss(reduction="sum"),
    }
    y = {"tag": torch.randint(4, (6,)), "place": torch.randn(6, 5, 2).double()}
    return (model, losses, X, y) if form is dict else (model, tuple(losses.values()), X, tuple(y.values()))


def single(model, key, form):
    return lambda X: model(X)[key if form is dict else ["tag", "place"].index(key)]


def of(y, key, form):
    return y[key] if form is dict else y[["tag", "place"].index(key)]


@pytest.mark.parametrize("operator", OPERATORS[1:])
def test_the_fisher_is_the_sum_over_heads(problem, form, operator):
    model, losses, X, y = problem
    params = list(model.parameters())
    op = operator(model, losses, data=(X, y))
    parts = [
        operator(single(model, key, form), of(losses, key, form), params, (X, of(y, key, form)))
        for key in ("tag", "place")
    ]
    expected = sum(part.todense() for part in parts)
    assert_same(op.todense(), expected, torch.float64)
    assert_same(op @ np.eye(len(expected)), expected, torch.float64)
    assert_same(op.diagonal(), np.diag(expected), torch.float64)


def test_the_draws_of_the_first_head_are_those_of_it_alone(problem, form):
    """Other heads have other draws: equal ones would make rows by datum biased, see below."""
    model, losses, X, y = problem
    params = list(model.parameters())
    op = fo.FisherMCLinearOperator(model, losses, data=(X, y), mc_samples=2).todense()
    first = fo.FisherMCLinearOperator(
        single(model, "tag", form), of(losses, "tag", form), params, (X, of(y, "tag", form)), mc_samples=2
    ).todense()
    rest = op - first
    assert np.linalg.eigvalsh(rest).min() >= -1e-12 * np.abs(rest).max()
    assert np.abs(rest[9:25, 9:25]).max() <= 1e-12  # nothing of the first head's own parameters is left


@pytest.mark.parametrize("rows", ["term", "datum"])
@pytest.mark.parametrize("samples", [1, 30])
def test_monte_carlo_is_unbiased(problem, rows, samples):
    """Also for heads of one distribution, whose draws would be equal if they were not numbered."""
    model, losses, X, y = problem
    # Each copy of the data has draws of its own, so 50 seeds give as many as 400 did without copies.
    X, copies, seeds = X.repeat(8, 1), lambda t: t.repeat(8, *[1] * (t.ndim - 1)), 50
    y = {key: copies(t) for key, t in y.items()} if isinstance(y, dict) else tuple(map(copies, y))
    v = np.random.default_rng(0).standard_normal(sum(p.numel() for p in model.parameters()))
    exact = fo.FisherLinearOperator(model, losses, data=(X, y))
    op = fo.FisherMCLinearOperator(model, losses, data=(X, y), rows=rows, mc_samples=samples)
    forms = [v @ (op.resample(seed) @ v) for seed in range(seeds)]
    assert abs(np.mean(forms) - v @ (exact @ v)) <= 5 * np.std(forms, ddof=1) / np.sqrt(seeds)

    def twice(X):
        return model(X)["place"] if isinstance(losses, dict) else model(X)[1]

    same = fo.FisherMCLinearOperator(
        lambda X: (twice(X), twice(X)), (nn.MSELoss(), nn.MSELoss()), list(model.parameters()),
        [(X, (torch.zeros(48, 5, 2), torch.zeros(48, 5, 2)))], rows=rows, mc_samples=samples,
    )  # fmt: skip
    expected = (
        2 * fo.FisherLinearOperator(twice, nn.MSELoss(), list(model.parameters()), (X, torch.zeros(48, 5, 2))).trace()
    )
    traces = [same.resample(seed).trace() for seed in range(seeds)]
    assert abs(np.mean(traces) - expected) <= 5 * np.std(traces, ddof=1) / np.sqrt(seeds)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("rows", ["term", "datum"])
def test_the_split_of_the_data_does_not_matter(problem, form, operator, rows):
    model, losses, X, y = problem
    options = {} if operator is fo.FisherLinearOperator else {"rows": rows}
    whole = operator(model, losses, data=(X, y), **options).todense()
    split = operator(model, losses, data=(X, y), batch_size=4, check_deterministic=False, **options)
    assert_same(split.todense(), whole, torch.float64)
    assert_same(split @ np.eye(len(whole)), whole, torch.float64)
    order = torch.randperm(6)
    pick = (lambda y, i: {k: v[i] for k, v in y.items()}) if form is dict else (lambda y, i: tuple(v[i] for v in y))
    shuffled = [(X[i], pick(y, i), i) for i in order.split(4)]
    assert_same(operator(model, losses, data=shuffled, **options).todense(), whole, torch.float64)


def test_summed_rows_are_one_for_each_datum(problem):
    model, losses, X, y = problem
    op = fo.EmpiricalFisherLinearOperator(model, losses, data=(X, y), rows="datum")
    assert np.linalg.matrix_rank(op.todense()) == 6
    losses = losses if isinstance(losses, dict) else dict(enumerate(losses))
    rows = []
    for n in range(6):
        outputs, total = model(X[n : n + 1]), 0
        for i, (key, loss) in enumerate(losses.items()):
            target = y[key][n : n + 1]
            if i == 0:  # the gradient of the summed loss, over the root of the mean's divisor
                summed = nn.CrossEntropyLoss(loss.weight, reduction="sum")(outputs[key], target)
                total = total + summed / loss.weight[y[key]].sum().sqrt()
            else:
                total = total + loss(outputs[key], target)
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(model.parameters()))]))
    G = torch.stack(rows).numpy()
    assert_same(op.todense(), G.T @ G, torch.float64)


def test_a_head_may_be_a_distribution_or_a_likelihood_of_ones_own():
    torch.manual_seed(0)
    body = nn.Linear(2, 3).double()

    def model(X):
        z = body(X)
        return {"count": td.Poisson(z[:, 0].exp()), "value": z[:, 1:]}

    class Own(likelihoods.Likelihood):
        def sample(self, f, samples, draws):
            return f + draws.normal(f, samples)

        def log_prob(self, f, y):
            return -(y - f).square().sum(-1) / 2

    X = torch.randn(5, 2).double()
    y = {"count": torch.arange(5), "value": torch.randn(5, 2).double()}
    op = fo.FisherMCLinearOperator(
        model, {"count": None, "value": Own("sum")}, list(body.parameters()), (X, y), mc_samples=5000
    )
    with torch.no_grad():
        rate = body(X)[:, 0].exp()
    inputs = torch.cat([X, torch.ones(5, 1)], 1)
    expected = float((rate * inputs.square().sum(1)).sum() + 2 * inputs.square().sum())
    assert abs(op.trace() - expected) <= 0.05 * expected


def test_what_does_not_fit():
    model = nn.Linear(2, 3)
    X, y = torch.randn(4, 2), torch.zeros(4).long()
    pair = lambda X: (model(X), model(X))
    params = list(model.parameters())
    ce = nn.CrossEntropyLoss()
    build = lambda function, losses, y: fo.FisherMCLinearOperator(function, losses, params, [(X, y)])
    with pytest.raises(
        TypeError, match="with a tuple or list of losses the outputs must be a tuple or list too, got T"
    ):
        build(model, (ce, ce), (y, y))
    with pytest.raises(TypeError, match="batch 0: with a tuple or list of losses the targets y must be .*, got Tensor"):
        build(pair, (ce, ce), y)
    with pytest.raises(ValueError, match="there are 1 losses and 2 outputs: give one loss for each"):
        build(pair, (ce,), (y, y))
    named = lambda X: {"a": model(X), "b": model(X)}
    with pytest.raises(ValueError, match=r"there is a loss for 'c', but the outputs have \['a', 'b'\] only"):
        build(named, {"c": ce}, {"c": y})
    with pytest.raises(ValueError, match="batch 0: head 'b': class index 7 is not in"):
        build(named, {"a": ce, "b": ce}, {"a": y, "b": y + 7})
    with pytest.raises(NotImplementedError, match="the loss of head 0 is a tuple: heads cannot be nested"):
        build(pair, ((ce, ce), ce), (y, y))
    with pytest.raises(ValueError, match="`loss_func` is empty"):
        build(pair, (), (y, y))
    with pytest.raises(TypeError, match="must return one tensor for this loss, got dict.*pass a mapping or tuple"):
        build(named, ce, y)
    with pytest.raises(NotImplementedError, match="`loss_func` is CosineEmbeddingLoss, which is not supported"):
        build(pair, (ce, nn.CosineEmbeddingLoss()), (y, y))


def test_many_heads_have_numbers_of_their_own():
    model = nn.Linear(1, 2)
    losses = (nn.BCEWithLogitsLoss(),) * 257
    outputs = lambda X: (model(X),) * 257
    data = [(torch.ones(2, 1), (torch.zeros(2, 2),) * 257)]
    with pytest.raises(ValueError, match="numbers for 256 heads of 16777216 samples each, got head 256"):
        fo.FisherMCLinearOperator(outputs, losses, list(model.parameters()), data).trace()
    fo.FisherMCLinearOperator(outputs, losses, list(model.parameters()), data, sampler="stream").trace()


def test_targets_of_unequal_length():
    model = nn.Linear(2, 3)
    data = [(torch.ones(6, 2), {"a": torch.zeros(6).long(), "extra": torch.zeros(3)})]
    with pytest.raises(
        ValueError, match=r"targets of batch 0 must have one row for each example, got shapes \[\(6,\), \(3,\)"
    ):
        fo.FisherMCLinearOperator(
            lambda X: {"a": model(X)}, {"a": nn.CrossEntropyLoss()}, list(model.parameters()), data
        )
