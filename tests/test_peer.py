"""With ``sampler="stream"`` the matrix is that of curvlinops-for-pytorch 3.0.1 for the same seed."""

from collections import UserDict

import numpy as np
import pytest
import torch
from curvlinops import EFLinearOperator
from curvlinops import FisherMCLinearOperator as Peer
from models import LOSSES, make_case
from tolerances import assert_same

import fisherops as fo


def both(case, model=None, data=None, **options):
    model, data = model or case.model, data or case.data
    ours = fo.FisherMCLinearOperator(model, case.loss, case.params, data, sampler="stream", **options)
    peer = Peer(model, case.loss, case.params, data, check_deterministic=False, **options)
    eye = torch.eye(case.D, dtype=case.dtype)
    theirs = (peer @ eye).numpy(force=True)
    if isinstance(case.loss, torch.nn.MSELoss) and case.dtype == torch.float64:
        # The peer rounds the standard deviation √½ to float32 even for a float64 model.
        theirs *= 0.5 / float(np.float32(np.sqrt(0.5))) ** 2
    return (ours @ eye).numpy(), theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("sizes", [(5,), (4, 3, 1)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("architecture", ["dense", "convolutional", "image", "recurrent"])
def test_same_seed_same_matrix(architecture, loss, reduction, sizes, samples, dtype):
    case = make_case(architecture, loss, reduction, sizes, dtype, seed=3)
    for seed in (2147483647, 7):
        ours, peer = both(case, seed=seed, mc_samples=samples)
        assert np.abs(peer).max() > 0
        assert_same(ours, peer, dtype)


class FromMapping(torch.nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, X):
        return self.body(X["x"])


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_same_matrix_for_mapping_inputs(loss, kind):
    case = make_case("dense", loss)
    data = [(kind(x=X), y) for X, y in case.data]
    ours, peer = both(case, FromMapping(case.model), data, batch_size_fn=lambda X: len(X["x"]))
    assert_same(ours, peer, case.dtype)


def test_other_default_arguments_are_the_peers():
    case = make_case("dense", "ce")
    peer = Peer(case.model, case.loss, case.params, case.data)
    ours = fo.FisherMCLinearOperator(case.model, case.loss, case.params, case.data, sampler="stream")
    v = torch.ones(case.D, dtype=case.dtype)
    assert_same((ours @ v).numpy(), (peer @ v).numpy(force=True), case.dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["plain", "class weights", "weight", "pos_weight"])
def test_the_empirical_fisher_is_the_peers(name, reduction):
    weights = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    case = make_case("dense", "ce" if name in ("plain", "class weights") else "bce", sizes=(7,))
    option = {} if name == "plain" else {"pos_weight" if name == "pos_weight" else "weight": weights}
    loss = type(case.loss)(**option, reduction=reduction)
    ours = fo.EmpiricalFisherLinearOperator(case.model, loss, data=case.data)
    theirs = (EFLinearOperator(case.model, loss, case.params, case.data) @ torch.eye(case.D).double()).numpy(force=True)
    if name == "class weights" and reduction == "mean":
        # The peer multiplies the gradients of the mean by the number of terms N, and the result by 1/N; with c = Σ w
        # for the divisor of the loss, its matrix is N/c² Σ w² s sᵀ in place of 1/c Σ w² s sᵀ.
        theirs *= float(weights[case.data[0][1]].sum()) / 7
    assert_same(ours.todense(), theirs, torch.float64)
