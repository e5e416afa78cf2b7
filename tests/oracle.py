"""The Fisher by its definition: plain loops over the gradients of single loss terms.

Nothing of the library is imported here. Everything is written for being obviously right, not fast.
"""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def flatten(loss, f):
    """Outputs as (terms, C)."""
    return (
        f.movedim(1, -1).reshape(-1, f.shape[1])
        if isinstance(loss, nn.CrossEntropyLoss)
        else f.reshape(-1, f.shape[-1])
    )


def negative_log_likelihood(loss, f, y):
    """−log q(y | f) of one term f (C,), up to a constant."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return functional.cross_entropy(f[None], y[None])
    if isinstance(loss, nn.MSELoss):
        return ((f - y) ** 2).sum()
    return functional.binary_cross_entropy_with_logits(f, y, reduction="sum")


def draw_targets(loss, f, samples, generator):
    """Draw targets (samples, terms[, C]) for a batch's outputs (terms, C), in the order of the stream sampler."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.multinomial(f.softmax(1), samples, replacement=True, generator=generator).T
    if isinstance(loss, nn.MSELoss):
        # half-precision numbers are drawn as float32: torch 2.11 has another stream for those
        dtype = torch.promote_types(f.dtype, torch.float32)
        noise = torch.randn((samples, *f.shape), generator=generator, dtype=dtype)
        return f + 0.5**0.5 * noise.to(f.dtype)
    return torch.bernoulli(f.sigmoid().repeat(samples, 1, 1), generator=generator)


def weights(loss, y):
    """Observation weights of the terms of a batch, or None if all are 1."""
    if not isinstance(loss, nn.CrossEntropyLoss) or y.is_floating_point():
        return None
    y = y.reshape(-1)
    w = torch.ones(len(y), dtype=torch.float64)
    if loss.weight is not None:
        w = loss.weight.double()[y.clamp(min=0)].clone()
    w[y == loss.ignore_index] = 0
    return w


def gradient(scalar, params):
    parts = torch.autograd.grad(scalar, params, retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(parts, params, strict=True)]
    )


def score_rows(model, loss, params, data, seed=2147483647, samples=1):
    """List (weight, sample, gradient) of all terms, and the divisor of a mean."""
    generator = torch.Generator().manual_seed(seed)
    rows, divisor = [], 0.0
    for X, y in data:
        raw = model(X)
        f = flatten(loss, raw)
        w = weights(loss, y)
        drawn = draw_targets(loss, f.detach(), samples, generator)
        if isinstance(loss, nn.CrossEntropyLoss):
            divisor += len(f) if w is None else float(w.sum())
        else:
            divisor += raw.numel()
        for t in range(len(f)):
            for m in range(samples):
                nll = negative_log_likelihood(loss, f[t], drawn[m, t])
                rows.append((1.0 if w is None else float(w[t]), gradient(nll, params).double().numpy()))
    return rows, divisor


def monte_carlo_fisher(model, loss, params, data, seed=2147483647, samples=1):
    """F in float64, (D, D)."""
    rows, divisor = score_rows(model, loss, params, data, seed, samples)
    F = sum(w * np.outer(g, g) for w, g in rows) / samples
    return F / divisor if loss.reduction == "mean" else F


def exact_fisher(model, loss, params, data):
    """The expectation of the Monte-Carlo Fisher: Jᵀ B J with B the Hessian of −log q, which does not depend on y."""
    F, divisor = 0.0, 0.0
    for X, y in data:
        raw = model(X)
        f = flatten(loss, raw)
        w = weights(loss, y)
        if isinstance(loss, nn.CrossEntropyLoss):
            divisor += len(f) if w is None else float(w.sum())
        else:
            divisor += raw.numel()
        for t in range(len(f)):
            J = torch.stack([gradient(f[t, c], params) for c in range(f.shape[1])]).double()
            y_any = torch.tensor(0) if isinstance(loss, nn.CrossEntropyLoss) else torch.zeros(f.shape[1], dtype=f.dtype)
            B = torch.autograd.functional.hessian(
                lambda g, y=y_any: negative_log_likelihood(loss, g, y), f[t].detach()
            ).double()
            F = F + (1.0 if w is None else float(w[t])) * (J.T @ B @ J).numpy()
    return F / divisor if loss.reduction == "mean" else F


def gauss_newton(model, loss, params, data):
    """Jᵀ H J with H the Hessian in the outputs of torch's own loss over the whole data set in one batch."""
    raw = model(torch.cat([X for X, _ in data]))
    H = torch.autograd.functional.hessian(lambda f: loss(f, torch.cat([y for _, y in data])), raw.detach())
    n = raw.numel()
    J = torch.stack([gradient(entry, params) for entry in raw.reshape(-1)]).double()
    return (J.T @ H.reshape(n, n).double() @ J).numpy()


def empirical_fisher(model, loss, params, data, rows="term"):
    """Σ g gᵀ by the gradients of torch's own loss for single terms (or sums of them over single data)."""
    summed = copy.deepcopy(loss)
    summed.reduction = "sum"
    F, divisor = 0.0, 0.0
    for X, y in data:
        for i in range(len(X)):
            f, target = model(X[i : i + 1]), y[i : i + 1]
            terms = flatten(loss, f)
            targets = target.reshape(-1) if target.ndim == f.ndim - 1 else flatten(loss, target)
            total = 0.0
            for t in range(len(terms)):
                row = gradient(summed(terms[t : t + 1], targets[t : t + 1]), params).double().numpy()
                F = F + np.outer(row, row) if rows == "term" else F
                total = total + row
                divisor += mean_divisor(loss, targets[t : t + 1], terms[t])
            F = F + np.outer(total, total) if rows == "datum" else F
    return F / divisor if loss.reduction == "mean" else F


def mean_divisor(loss, y, f):
    if not isinstance(loss, nn.CrossEntropyLoss):
        return f.numel()
    if y.is_floating_point():
        return 1.0
    counts = float(y[0] != loss.ignore_index)
    return counts * (1.0 if loss.weight is None else float(loss.weight[y[0]])) if counts else 0.0
