"""Convolutions held by their inputs and gradients: the same matrix as loops over examples, in a fraction of the memory."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_same
from torch import nn
from torch.nn import functional

import fisherops as fo

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
N = 4


@dataclass
class Case:
    """A convolution of images, with scores for each example, for each output, or for each term."""

    model: nn.Module
    X: torch.Tensor
    rows: str
    kind: str

    def operator(self, **options):
        parameters = list(self.model.parameters())
        if self.rows == "term":  # several terms for each example
            y = torch.randint(3, (N, *self.model(self.X).shape[2:]), generator=torch.Generator().manual_seed(1))
            data, loss = [(self.X[:3], y[:3]), (self.X[3:], y[3:])], nn.CrossEntropyLoss(reduction="sum")
        else:
            y = torch.zeros(N, 3, dtype=self.X.dtype)
            data, loss = [(self.X[:3], y[:3]), (self.X[3:], y[3:])], nn.MSELoss(reduction="sum")
        if self.kind == "exact":
            return fo.FisherLinearOperator(self.model, loss, parameters, data, **options), loss, y
        return fo.EmpiricalFisherLinearOperator(self.model, loss, parameters, data, rows=self.rows, **options), loss, y

    def scores(self, loss, y):
        """Rows of G by one gradient after the other; those of the exact Fisher of MSELoss are √2 J."""
        model, X = copy.deepcopy(self.model).double(), self.X.double()
        y = y.double() if y.is_floating_point() else y
        rows = []
        for n in range(N):
            f = model(X[n : n + 1])
            if self.kind == "exact":
                terms = 2**0.5 * f[0]
            elif self.rows == "term":
                terms = functional.cross_entropy(f, y[n : n + 1], reduction="none").flatten()
            else:
                terms = loss(f, y[n : n + 1])[None]
            for term in terms:
                gradients = torch.autograd.grad(term, list(model.parameters()), retain_graph=True)
                rows.append(torch.cat([g.flatten() for g in gradients]))
        return torch.stack(rows).numpy()


class Features(nn.Module):
    """A few numbers for each image that depend on all positions."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, X):
        h = self.layer(X).flatten(1)
        return torch.stack(
            [h.tanh().sum(1), h.square().mean(1), (h * torch.linspace(0, 1, h.shape[1])).cos().sum(1)], 1
        )


class Pixels(nn.Module):
    """Class scores at each position."""

    def __init__(self, layer, channels):
        super().__init__()
        self.layer, self.mix = layer, nn.Parameter(torch.randn(3, channels))

    def forward(self, X):
        return torch.einsum("nc...,kc->nk...", self.layer(X).tanh(), self.mix)


@st.composite
def convolutions(draw):
    """Draw a convolution and images."""
    d, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    transposed = draw(st.booleans())

    def each(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * d))

    kernel, stride, dilation, padding = each(1, 3), each(1, 2), each(1, 2), each(0, 1)
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    size = [draw(st.integers(1, 3)) + t * (k - 1) for k, t in zip(kernel, dilation, strict=True)]
    if transposed:
        size = each(3, 4)
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, t) - 1)) for s, t in zip(stride, dilation, strict=True)
        )
    elif stride == (1,) * d and draw(st.booleans()):
        padding = draw(st.sampled_from(["same", "valid"]))
    if not transposed:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "circular", "replicate"]))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = (TRANSPOSED if transposed else PLAIN)[d - 1](inputs, outputs, kernel, padding=padding, **options)
    kind, rows = draw(st.sampled_from([("exact", "datum"), ("empirical", "datum"), ("empirical", "term")]))
    model = Pixels(layer, outputs) if rows == "term" else Features(layer)
    return Case(model.to(dtype), torch.randn(N, inputs, *size, dtype=dtype), rows, kind)


@pytest.fixture(scope="module", params=["kernels", "unfolded", "small blocks"])
def held_as_factors(request):
    """Hold every convolution as factors, multiplied by PyTorch's kernels or unfolded, also in blocks of odd sizes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("build", "convolutions"):
            patch.setattr(f"fisherops.scores.{module}.rows_are_better", lambda *_: False)
        patch.setattr("fisherops.scores.convolutions._SHORT", 0)
        if request.param != "kernels":
            patch.setattr("fisherops.scores.convolutions._has_kernels", lambda x: False)
        if request.param == "small blocks":
            for name, value in {"_OUTPUTS": 40, "_UNFOLDED": 50, "_TERMS": 3, "_PIECE": 2}.items():
                patch.setattr(f"fisherops.scores.convolutions.{name}", value)
        yield request.param


def weights(op):
    """The blocks of the plan that hold convolutions."""
    return [entry for entry in op.plan.entries if "factors" in entry.form]


@given(convolutions(), st.integers(1, 3))
def test_convolutions_are_those_of_loops(held_as_factors, case, K):
    op, loss, y = case.operator(cache="factors")
    G = case.scores(loss, y)
    rng = np.random.default_rng(0)
    V, W = (rng.standard_normal((size, K)).astype(op.dtype) for size in G.shape[::-1])
    F, scores = G.T @ G, op.scores
    assert_same(op @ V, F @ V, op.dtype)
    assert len(weights(op)) == 2
    assert_same(scores @ V, G @ V, op.dtype)
    assert_same(scores.T @ W, G.T @ W, op.dtype)
    assert_same(op.diagonal(), np.diag(F), op.dtype)
    assert_same(op.trace(), np.trace(F), op.dtype)
    assert_same(scores.gram(), G @ G.T, op.dtype)
    assert_same(scores.todense(), G, op.dtype)
    assert_same(op.todense(), F, op.dtype)
    for entry in op.plan.entries:
        assert entry.nbytes > 0
