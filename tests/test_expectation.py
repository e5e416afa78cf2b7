"""Averaged over seeds, the Monte-Carlo Fisher is the exact Fisher."""

import numpy as np
import oracle
import pytest
import torch
from models import LOSSES, make_case
from scipy.stats import t
from torch import nn

import fisherops as fo

SEEDS = 100
FALSE_ALARM = 1e-6
"""Probability that one test below fails for a correct operator (over fresh seeds; the seeds are fixed)."""


def z_scores(model, loss, params, data, samples=16, planted=lambda F: F):
    """Standard errors between the mean over seeds and the exact Fisher, for random quadratic forms vᵀFv.

    A form averages D² entries, so its mean over 100 seeds × 16 draws × all terms is normal to good accuracy.
    """
    D = sum(p.numel() for p in params)
    V = np.random.default_rng(0).standard_normal((D, 20))
    exact = oracle.exact_fisher(model, loss, params, data)
    expected = np.einsum("dk,de,ek->k", V, exact, V)
    forms = []
    for seed in range(SEEDS):
        op = fo.FisherMCLinearOperator(
            model, loss, params, data, seed=seed, mc_samples=samples, check_deterministic=False
        )
        forms.append(np.einsum("dk,dk->k", V, planted(op @ V)))
    forms = np.array(forms)
    return (forms.mean(0) - expected) / (forms.std(0, ddof=1) / np.sqrt(SEEDS))


def threshold(scores):
    # Bonferroni over the forms
    return t.isf(FALSE_ALARM / len(scores) / 2, SEEDS - 1)


def assert_unbiased(scores):
    assert np.abs(scores).max() <= threshold(scores)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_expectation_is_the_exact_fisher(loss, reduction):
    case = make_case("dense", loss, reduction, sizes=(5, 4))
    assert_unbiased(z_scores(case.model, case.loss, case.params, case.data))


@pytest.mark.parametrize("options", [{"weight": torch.tensor([0.2, 1.0, 3.0]).double()}, {"ignore_index": 1}], ids=str)
def test_the_expectation_with_weighted_terms(options):
    case = make_case("dense", "ce", sizes=(5, 4))
    loss = nn.CrossEntropyLoss(**options)
    assert_unbiased(z_scores(case.model, loss, case.params, case.data))


def test_the_expectation_for_sequences():
    case = make_case("recurrent", "ce", sizes=(2, 1))
    assert_unbiased(z_scores(case.model, case.loss, case.params, case.data))


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_test_finds_a_wrong_scale(loss):
    """With enough draws the test above rejects an operator that is too large by a tenth."""
    case = make_case("dense", loss, sizes=(5, 4))
    scores = z_scores(case.model, case.loss, case.params, case.data, samples=160, planted=lambda Fv: 1.1 * Fv)
    assert np.abs(scores).max() > threshold(scores)
