"""The empirical Fisher of losses that are any function of one example's output and target."""

from functools import partial

import numpy as np
import oracle
import pytest
import torch
from tolerances import assert_same
from torch import nn
from torch.nn import functional

import fisherops as fo

N = 7


def ranking(f, y):
    """A hinge loss of the best other class, as the mean over the batch."""
    right = f.gather(1, y.unsqueeze(1))
    others = f.masked_fill(nn.functional.one_hot(y, f.shape[1]).bool(), -1e9).amax(1, keepdim=True)
    return (others - right + 3).clamp(min=0).square().mean()


def ctc(f, y):
    """Outputs (batch, time, classes), targets a mapping of labels and lengths."""
    log_p, T = f.log_softmax(-1).transpose(0, 1), torch.full((len(f),), f.shape[1])
    return functional.ctc_loss(log_p, y["labels"], T, y["lengths"], reduction="sum")


class Focal(nn.Module):
    def forward(self, f, y):
        log_p = f.log_softmax(1).gather(1, y.unsqueeze(1))
        return -((1 - log_p.exp()).square() * log_p).sum()


class Polynomial(nn.CrossEntropyLoss):
    def forward(self, f, y):
        return super().forward(f, y) + (1 - f.softmax(1).gather(1, y.unsqueeze(1))).mean()


def labels(g):
    return torch.randint(3, (N,), generator=g)


def distributions(g):
    return torch.rand(N, 3, generator=g).double().softmax(1)


def sequences(g):
    return {"labels": torch.randint(1, 3, (N, 2), generator=g), "lengths": torch.randint(1, 3, (N,), generator=g)}


log_softmax, images = nn.LogSoftmax(1), nn.Unflatten(1, (4, 3))
CASES = {
    # name: (outputs, end of the model, loss, targets, whether it is a mean)
    "function": (3, nn.Identity(), ranking, labels, True),
    "lambda of a sum": (3, nn.Identity(), lambda f, y: functional.cross_entropy(f, y, reduction="sum"), labels, False),
    "cross_entropy": (3, nn.Identity(), functional.cross_entropy, labels, True),
    "partial": (3, log_softmax, partial(functional.kl_div, reduction="batchmean"), distributions, True),
    "KLDivLoss": (3, log_softmax, nn.KLDivLoss(reduction="batchmean"), distributions, True),
    "KLDivLoss of elements": (3, log_softmax, nn.KLDivLoss(reduction="mean"), distributions, True),
    "KLDivLoss of a sum": (3, log_softmax, nn.KLDivLoss(reduction="sum"), distributions, False),
    "module": (3, nn.Identity(), Focal(), labels, False),
    "subclass": (3, nn.Identity(), Polynomial(), labels, True),
    "CTC": (12, images, ctc, sequences, False),
    "MultiMarginLoss": (3, nn.Identity(), nn.MultiMarginLoss(), labels, True),
    "CosineEmbeddingLoss": (3, nn.Identity(), lambda f, y: functional.cosine_embedding_loss(f, y.roll(1, 1), torch.ones(len(f))), distributions, True),
}  # fmt: skip


def problem(name):
    size, end, loss, targets, mean = CASES[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, size), end).double()
    g = torch.Generator().manual_seed(0)
    return model, loss, torch.randn(N, 2, generator=g).double(), targets(g), mean


def pick(y, n):
    return {key: value[n] for key, value in y.items()} if isinstance(y, dict) else y[n]


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_the_second_moment_of_the_gradients_of_examples(name):
    model, loss, X, y, mean = problem(name)
    rows = [
        oracle.gradient(loss(model(X[n : n + 1]), pick(y, slice(n, n + 1))), list(model.parameters())) for n in range(N)
    ]
    G = torch.stack(rows).numpy()
    expected = G.T @ G / (N if mean else 1)
    assert np.abs(expected).max() > 0
    whole = fo.EmpiricalFisherLinearOperator(model, loss, data=(X, y))
    assert_same(whole.todense(), expected, torch.float64)
    assert_same(whole @ np.eye(len(expected)), expected, torch.float64)
    assert whole.reductions == ("mean" if mean else "sum",)
    data = [(X[i], pick(y, i)) for i in torch.arange(N).split([1, 4, 2])]
    for options in ({}, {"check_deterministic": False}, {"cache": "none"}, {"rows": "datum"}):
        split = fo.EmpiricalFisherLinearOperator(model, loss, data=data, **options)
        assert_same(split.todense(), expected, torch.float64)
    for operator in (fo.FisherMCLinearOperator, fo.FisherLinearOperator):
        with pytest.raises(NotImplementedError, match="`loss_func`"):
            operator(model, loss, data=(X, y))


def test_a_head_may_have_any_loss():
    model, loss, X, y, _ = problem("function")
    params = list(model.parameters())
    both = fo.EmpiricalFisherLinearOperator(
        lambda X: (model(X), model(X)), (loss, nn.CrossEntropyLoss()), params, [(X, (y, y))]
    )
    parts = [fo.EmpiricalFisherLinearOperator(model, each, data=(X, y)) for each in (loss, nn.CrossEntropyLoss())]
    assert_same(both.todense(), sum(part.todense() for part in parts), torch.float64)


WEIGHTS = torch.tensor([0.5, 2.0, 1.3]).double()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda f, y: (f - f.mean(0)).square().mean(), "must be the .* of the losses of single examples, got .* Use a loss"),
        (lambda f, y: functional.cross_entropy(f @ f.T, torch.arange(len(f))), "must be the .* of the losses of single examples"),
        (lambda f, y: functional.cross_entropy(f, y, weight=WEIGHTS), "must be the mean of .*or reduction='sum'"),
        (lambda f, y: functional.cross_entropy(f, y).square().sqrt() * len(f) ** 0.5, "must be the .* of the losses"),
        (lambda f, y: functional.cross_entropy(f, y, reduction="none"), r"must return one number for a batch, got shape \(7,\)"),
        (lambda f, y: functional.cross_entropy(f, y).item(), "must return one number for a batch, got float"),
        (lambda f, y: functional.cross_entropy(f.detach(), y), "must depend on the outputs, got a constant"),
        (nn.KLDivLoss(reduction="none"), "reduction='none'"),
    ],
)  # fmt: skip
def test_losses_that_are_refused(loss, message):
    model, _, X, y, _ = problem("function")
    y = y if not isinstance(loss, nn.KLDivLoss) else torch.rand(N, 3).double()
    with pytest.raises(ValueError, match=message):
        fo.EmpiricalFisherLinearOperator(model, loss, data=(X, y)).trace()


@pytest.mark.parametrize("operator", [fo.FisherMCLinearOperator, fo.FisherLinearOperator])
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (functional.cross_entropy, r"must be a loss module .*, got the function cross_entropy. Pass `nn.CrossEntropyLoss\(\)`"),
        (functional.mse_loss, r"got the function mse_loss. Pass `nn.MSELoss\(\)`"),
        (partial(functional.binary_cross_entropy_with_logits, reduction="sum"), r"Pass `nn.BCEWithLogitsLoss\(\)` with the same"),
        (ranking, "`loss_func` is ranking, which is not supported.*The empirical Fisher also accepts any function"),
        (nn.KLDivLoss(), "`loss_func` is KLDivLoss, which stands for no likelihood: its targets are distributions"),
        (nn.CTCLoss(), "`loss_func` is CTCLoss, which stands for no likelihood: it sums over alignments"),
    ],
)  # fmt: skip
def test_the_other_operators_need_a_likelihood(loss, message, operator):
    model, _, X, y, _ = problem("function")
    with pytest.raises(NotImplementedError, match=message):
        operator(model, loss, data=(X, y))
