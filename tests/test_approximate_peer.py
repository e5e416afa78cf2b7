"""KFAC and EKFAC are those of curvlinops-for-pytorch 3.0.1 for the same seed."""

import numpy as np
import pytest
import torch
from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator
from models import ClassesSecond
from tolerances import assert_same
from torch import nn

import fisherops as fo

LOSSES = {"mse": nn.MSELoss, "ce": nn.CrossEntropyLoss, "bce": nn.BCEWithLogitsLoss}
OPERATORS = {
    "mc": (fo.FisherMCLinearOperator, {"sampler": "stream"}),
    "type-2": (fo.FisherLinearOperator, {}),
    "empirical": (fo.EmpiricalFisherLinearOperator, {}),
}


def mlp(C=3):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C))


def cnn(C=3):
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 2, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, C),
    )


def tokens(C=3):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C))


INPUTS = {"mlp": (mlp, (4,)), "cnn": (cnn, (2, 4, 4)), "tokens": (tokens, (6, 4))}


# More examples than rows of the factors: null spaces have no basis of their own.
def case(network, loss, reduction, dtype, sizes=(16, 13)):
    torch.manual_seed(1)
    make, shape = INPUTS[network]
    model = make().to(dtype)
    data = []
    for n in sizes:
        X = torch.randn(n, *shape, dtype=dtype)
        outputs = (n, *shape[:-1], 3) if network == "tokens" else (n, 3)
        y = torch.randint(3, outputs[:-1]) if loss == "ce" else torch.rand(outputs, dtype=dtype).round()
        data.append((X, y))
    if network == "tokens" and loss == "ce":
        model = ClassesSecond(model)
    return model, LOSSES[loss](reduction=reduction), data


def dense(operator, dtype):
    return (operator @ torch.eye(operator.shape[1], dtype=dtype)).numpy(force=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("separate_bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("kind", sorted(OPERATORS))
@pytest.mark.parametrize(("network", "sharing"), [("mlp", "expand"), ("cnn", "expand"), ("cnn", "reduce")])
def test_kfac_and_ekfac_are_the_peers(network, sharing, kind, loss, reduction, separate_bias, dtype):
    model, loss_func, data = case(network, loss, reduction, dtype)
    params = list(model.parameters())
    make, options = OPERATORS[kind]
    op = make(model, loss_func, params, data, **options)
    peer = {
        "model_func": model,
        "loss_func": loss_func,
        "params": params,
        "data": data,
        "fisher_type": kind,
        "kfac_approx": sharing,
        "separate_weight_and_bias": separate_bias,
        "check_deterministic": False,
    }
    K = fo.approximate.kfac(op, sharing, separate_bias=separate_bias)
    assert_same(K.todense(), dense(KFACLinearOperator(**peer), dtype), dtype)
    E = fo.approximate.ekfac(op, sharing, separate_bias=separate_bias)
    theirs = dense(EKFACLinearOperator(**peer), dtype)
    # Eigenvectors are determined to rounding divided by gaps.
    assert_same(E.todense(), theirs, dtype, operations=10**5 if dtype == torch.float64 else 10**3)
    assert_same(E.trace(), np.trace(theirs), dtype)


@pytest.mark.parametrize("kind", ["mc", "empirical"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kfac_of_token_losses_is_the_peers(sharing, loss, kind):
    """It backpropagates the sum over the terms of an example, which is the score of rows="datum"."""
    model, loss_func, data = case("tokens", loss, "mean", torch.float64)
    make, options = OPERATORS[kind]
    op = make(model, loss_func, data=data, rows="datum", **options)
    theirs = KFACLinearOperator(
        model, loss_func, list(model.parameters()), data, fisher_type=kind, kfac_approx=sharing,
        separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    assert_same(fo.approximate.kfac(op, sharing).todense(), dense(theirs, torch.float64), torch.float64)


@pytest.mark.parametrize("split", ["exact", "factored"])
def test_inverses_are_the_peers(split):
    model, loss_func, data = case("cnn", "ce", "mean", torch.float64)
    op = fo.FisherLinearOperator(model, loss_func, data=data)
    theirs = KFACLinearOperator(
        model, loss_func, list(model.parameters()), data, fisher_type="type-2",
        separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    inverse = KFACInverseLinearOperator(
        theirs, damping=1e-3, use_exact_damping=split == "exact", use_heuristic_damping=split == "factored"
    )
    ours = fo.approximate.kfac(op).inv(1e-3, split=split)
    assert_same(ours.todense(), dense(inverse, torch.float64), torch.float64, operations=10**5)
