"""Weights of examples: those of copies of examples, of torch's own losses, and of the rows of the score matrix."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Gamma, Normal
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import fisherops as fo
from fisherops.likelihoods import DiagonalFactor, Likelihood, Terms

W = torch.tensor([1.0, 2, 0, 3, 1, 1, 2], dtype=torch.float64)
COPIES = torch.arange(7).repeat_interleave(W.long())


def model(C=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C)).double()


def inputs():
    return torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Sequences(nn.Module):
    """Outputs (N, C, T), the loss terms of which have axes of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(1, 4).double()

    def forward(self, X):
        return self.linear(X.unsqueeze(-1)).movedim(-1, 1)


class Gammas(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = model(2)

    def forward(self, X):
        return Gamma(*nn.functional.softplus(self.linear(X)).add(0.5).unbind(1))


LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2])
REAL = torch.linspace(-1, 1, 21, dtype=torch.float64).view(7, 3)
CASES = {
    "cross-entropy": (model, nn.CrossEntropyLoss, {}, LABELS),
    "class weights": (model, nn.CrossEntropyLoss, {"weight": torch.tensor([1.0, 2, 3]).double()}, LABELS),
    "smoothing": (model, nn.CrossEntropyLoss, {"label_smoothing": 0.1, "ignore_index": 1}, LABELS),
    "soft": (model, nn.CrossEntropyLoss, {}, REAL.softmax(1)),
    "sequences": (Sequences, nn.CrossEntropyLoss, {"ignore_index": 1}, LABELS.unsqueeze(1).expand(7, 3).clone()),
    "MSE": (model, nn.MSELoss, {}, REAL),
    "L1": (model, nn.L1Loss, {}, REAL),
    "Huber": (model, nn.HuberLoss, {}, REAL),
    "BCE": (model, nn.BCEWithLogitsLoss, {"pos_weight": torch.tensor(2.0).double()}, REAL.sigmoid()),
    "Poisson": (model, nn.PoissonNLLLoss, {}, REAL.exp().round()),
}
OF_ALL = ("Huber", "BCE")  # torch's means of these divide by the number of elements, whatever their weights


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_a_weight_counts_copies(case, reduction):
    make, loss, options, y = CASES[case]
    net, X, loss = make(), inputs(), loss(reduction=reduction, **options)
    F = fo.FisherLinearOperator(net, loss, data=(X, y), batch_size=3, sample_weight=W).todense()
    copies = fo.FisherLinearOperator(net, loss, data=(X[COPIES], y[COPIES])).todense()
    if reduction == "mean" and case in OF_ALL:
        copies *= len(COPIES) / len(X)
    np.testing.assert_allclose(F, copies, rtol=1e-12, atol=1e-14)


TORCH = {
    "cross-entropy": lambda f, y: (W * functional.cross_entropy(f, y, reduction="none")).sum() / W.sum(),
    "MSE": lambda f, y: functional.mse_loss(f, y, weight=W.unsqueeze(1).expand_as(f).contiguous()),
    "L1": lambda f, y: functional.l1_loss(f, y, weight=W.unsqueeze(1).expand_as(f).contiguous()),
    "Huber": lambda f, y: functional.huber_loss(f, y, weight=W.unsqueeze(1).expand_as(f).contiguous()),
    "BCE": lambda f, y: functional.binary_cross_entropy_with_logits(
        f, y, weight=W.unsqueeze(1), pos_weight=torch.tensor(2.0).double()
    ),
}


@pytest.mark.parametrize("case", TORCH)
def test_the_mean_is_that_of_torchs_own_weights(case):
    make, loss, options, y = CASES[case]
    net, X = make(), inputs()
    op = fo.FisherMCLinearOperator(net, loss(**options), data=[(X[:4], y[:4]), (X[4:], y[4:])], sample_weight=W)
    gradients = torch.autograd.grad(TORCH[case](net(X), y), list(net.parameters()))
    np.testing.assert_allclose(op.gradient(), torch.cat([g.flatten() for g in gradients]), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rows", ["term", "datum"])
@pytest.mark.parametrize("cache", ["auto", "scores", "factors", "linearization", "none"])
@pytest.mark.parametrize("kind", ["mc", "exact", "empirical"])
def test_rows_of_the_score_matrix(kind, cache, rows):
    """Draws do not depend on weights: rows are multiplied by √w, and gradients of the empirical Fisher by w."""
    if kind == "exact" and rows == "datum":
        return
    kinds = {
        "mc": fo.FisherMCLinearOperator,
        "exact": fo.FisherLinearOperator,
        "empirical": fo.EmpiricalFisherLinearOperator,
    }
    options = {"rows": rows, "cache": cache} if kind != "exact" else {"cache": cache}
    net, X, y = Sequences(), inputs(), CASES["sequences"][3]
    loss = nn.CrossEntropyLoss(reduction="sum")
    batches = [(X[part], y[part], part) for part in torch.tensor([6, 0, 2, 5, 1, 3, 4]).split(3)]
    G = kinds[kind](net, loss, data=batches, **options).scores.todense()
    weighted = kinds[kind](net, loss, data=batches, sample_weight=W.numpy(), **options)
    factor = W[torch.tensor([6, 0, 2, 5, 1, 3, 4])].repeat_interleave(len(G) // 7).numpy()
    factor = factor if kind == "empirical" else np.sqrt(factor)
    np.testing.assert_allclose(weighted.scores.todense(), factor[:, None] * G, rtol=1e-9, atol=1e-12)
    if kind == "mc":
        again = weighted.resample(5)
        G = kinds[kind](net, loss, data=batches, seed=5, **options).scores.todense()
        np.testing.assert_allclose(again.scores.todense(), factor[:, None] * G, rtol=1e-9, atol=1e-12)


def test_distributions_and_heads():
    X = inputs()
    F = fo.FisherLinearOperator(Gammas(), None, data=(X, None), sample_weight=W).todense()
    np.testing.assert_allclose(F, fo.FisherLinearOperator(Gammas(), None, data=(X[COPIES], None)).todense(), rtol=1e-12)

    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = model(), model()

        def forward(self, X):
            return {"label": self.left(X), "value": self.right(X)}

    net, losses = TwoHeads(), {"label": nn.CrossEntropyLoss(ignore_index=0), "value": nn.MSELoss()}
    y = {"label": LABELS, "value": REAL}
    F = fo.FisherLinearOperator(net, losses, data=(X, y), sample_weight=W).todense()
    y = {name: t[COPIES] for name, t in y.items()}
    copies = fo.FisherLinearOperator(net, losses, data=(X[COPIES], y)).todense()
    np.testing.assert_allclose(F, copies, rtol=1e-12, atol=1e-15)


def test_one_distribution_a_term():
    """A likelihood that knows nothing of weights."""

    class Terms(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 1).double()

        def forward(self, X):
            return Normal(self.linear(X.unsqueeze(-1)).squeeze(-1), 1.0)  # (N, 3): three terms for each example

    net, X = Terms(), inputs()
    F = fo.FisherMCLinearOperator(net, None, data=(X, None), sample_weight=W, mc_samples=20_000).todense()
    exact = fo.FisherLinearOperator(net, None, data=(X[COPIES], None)).todense()
    # A term's score is ε J with ε ~ N(0, 1), and var ε² = 2.
    J = torch.stack([X.flatten(), torch.ones(21)], 1)
    squares = (J.square().T @ (W.repeat_interleave(3).square().unsqueeze(1) * J.square())).sqrt().numpy()
    assert (abs(F - exact) < 5 * squares * np.sqrt(2 / 20_000)).all()


def test_weights_are_copied():
    net, X, own = model(), inputs(), W.clone()
    op = fo.FisherLinearOperator(net, nn.CrossEntropyLoss(), data=(X, LABELS), sample_weight=own, cache="none")
    F = op.todense()
    own[0] = 100
    np.testing.assert_array_equal(op.todense(), F)


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        (W[:6], "got 6 weights and an example with the index 6"),
        (torch.cat([W, W]), "got 14 weights for 7 examples"),
        (W.unsqueeze(1), r"real numbers of shape \(N,\), one for each example, got shape \(7, 1\)"),
        (W * 1j, "must be real numbers"),
        (-W, "must be finite and at least 0, got -1.0 for example 0"),
        (W / 0, "must be finite and at least 0, got inf for example 0"),
        (["a"] * 7, "must be real numbers"),
        (torch.zeros(7), "every loss term of the data is ignored or has weight 0"),
    ],
)
def test_weights_that_do_not_fit(weights, text):
    with pytest.raises(ValueError, match=text):
        fo.FisherMCLinearOperator(model(), nn.CrossEntropyLoss(), data=(inputs(), LABELS), sample_weight=weights)


def test_terms_that_do_not_belong_to_examples():
    def f(params, X):
        return X[:5] @ params["W"]

    data = [(inputs(), LABELS[:5])]
    loss, params = nn.CrossEntropyLoss(), {"W": torch.ones(3, 3, dtype=torch.float64)}
    with pytest.raises(ValueError, match="equally many loss terms for each example, got 5 terms for 7 examples"):
        fo.FisherLinearOperator(f, loss, params, data, sample_weight=W, batch_size_fn=len)


def test_more_indices_than_weights():
    """Indices may be those of a larger data set."""
    X, index = inputs(), torch.tensor([4, 1])
    data = [(X[index], LABELS[index], index)]
    F = fo.FisherLinearOperator(model(), nn.CrossEntropyLoss(), data=data, sample_weight=W).todense()
    only = [(X[index], LABELS[index])]
    expected = fo.FisherLinearOperator(model(), nn.CrossEntropyLoss(), data=only, sample_weight=W[index]).todense()
    np.testing.assert_allclose(F, expected, rtol=1e-12)


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_a_loader_that_shuffles_must_name_the_examples(cache):
    """The exact Fisher does not depend on the order; weights by the position in a pass would."""
    X, index = inputs(), torch.arange(7)
    ordered = DataLoader(TensorDataset(X, LABELS), 3)
    shuffled = DataLoader(TensorDataset(X, LABELS), 3, shuffle=True)
    own = DataLoader(TensorDataset(X, LABELS), batch_sampler=[[6, 0, 2], [1, 3, 5, 4]])
    named = DataLoader(TensorDataset(X, LABELS, index), 3, shuffle=True)
    loss = nn.CrossEntropyLoss()
    F = fo.FisherLinearOperator(model(), loss, data=(X, LABELS), sample_weight=W).todense()
    for loader in (ordered, named):
        op = fo.FisherLinearOperator(model(), loss, data=loader, sample_weight=W, cache=cache)
        np.testing.assert_allclose(op.todense(), F, rtol=1e-10, atol=1e-14)
    for loader in (shuffled, own):
        with pytest.raises(ValueError, match=r"Let it yield \(X, y, index\)"):
            fo.FisherLinearOperator(model(), loss, data=loader, sample_weight=W, cache=cache).trace()
    G = fo.FisherLinearOperator(model(), loss, data=(X, LABELS)).scores
    with pytest.raises(ValueError, match=r"Let it yield \(X, y, index\)"):
        _ = G.on(shuffled, sample_weight=W).plan


def test_data_in_another_order_are_noticed():
    X = inputs()

    class Turning:
        turn = 0

        def __iter__(self):
            self.turn += 1
            batches = list(zip(X.split(4), LABELS.split(4), strict=True))
            return iter(batches if self.turn < 3 else [(batch[0].flip(0), batch[1].flip(0)) for batch in batches])

    op = fo.FisherLinearOperator(model(), nn.CrossEntropyLoss(), data=Turning(), sample_weight=W, cache="none")
    with pytest.raises(RuntimeError, match="`data` must be the same in every pass"):
        op @ np.ones(op.shape[0])


def test_all_weights_zero():
    loss = nn.CrossEntropyLoss(reduction="sum")
    op = fo.FisherMCLinearOperator(model(), loss, data=(inputs(), LABELS), sample_weight=np.zeros(7))
    assert op.trace() == 0
    for method in ("auto", "dual", "dense", "primal"):
        pairs = fo.linalg.eigsh(op, 2, method=method)
        np.testing.assert_array_equal(pairs.eigenvalues, 0)
        np.testing.assert_allclose(pairs.eigenvectors.T @ pairs.eigenvectors, np.eye(2), atol=1e-12)


@pytest.mark.parametrize("weights", [torch.arange(1.0, 4), torch.tensor(2.0), torch.ones(3, 2)])
def test_weights_of_terms_in_a_wrong_shape(weights):
    """(T,) times (T, 1) would broadcast to (T, T), which is a shape that is accepted if T = C."""

    class Own(Likelihood):
        def terms(self, output, y):
            return Terms(weights, len(y), y)

        def sample(self, f, samples, draws):
            return f + draws.normal(f, samples)

        def log_prob(self, f, y):
            return -(f - y).square().sum(-1) / 2

        def exact(self, f):
            return DiagonalFactor(torch.ones_like(f))

    data = inputs()[:3], inputs()[:3]
    for options in ({}, {"sample_weight": np.ones(3)}):
        with pytest.raises(ValueError, match=r"the weights of `terms` must have shape \(3, 1\) or \(3, 3\)"):
            fo.FisherLinearOperator(model(), Own("sum"), data=data, **options).trace()
