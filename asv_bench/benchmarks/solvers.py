"""`fisherops.linalg` beside SciPy's solvers on the peer's operator, everything from construction counted."""

import statistics
import time

import numpy as np
import torch
from scipy.sparse.linalg import cg, eigsh
from torch import nn

import fisherops as fo
from fisherops._matmul import times_transposed

from .networks import make
from .products import peer, ratio, seconds


class _Suite:
    timeout = 900
    params = (["mlp"],)
    param_names = ("network",)
    N = 1024
    pairs = 3
    # Below what single precision gives in a product, ARPACK in the peer's float64 would not end.
    tolerance = 1e-5

    def setup(self, network):
        net, batch = make(network, self.N)
        self.arguments = net, nn.CrossEntropyLoss(), list(net.parameters()), [batch]
        self.D = sum(p.numel() for p in net.parameters())

    def operator(self):
        return fo.FisherMCLinearOperator(*self.arguments, check_deterministic=False)  # as the peer's

    def peers(self):
        if peer is None:
            raise NotImplementedError
        return peer.FisherMCLinearOperator(*self.arguments, check_deterministic=False).to_scipy()


class Influence(_Suite):
    """Exact influence of all training examples on a hundred others, everything counted."""

    queries = 100
    N = 10_000
    pairs = 1

    def setup(self, network):
        super().setup(network)
        self.factors = factors_of(*self.arguments[::3])

    def influence(self):
        op, (X, y) = self.operator(), self.arguments[3][0]
        train = op.scores.on((X, y), kind="empirical")
        test = op.scores.on((X[: self.queries], y[: self.queries]), kind="empirical")
        return fo.linalg.inv_quad(op, test, train, damping=1e-2)

    def time_inv_quad(self, network):
        self.influence()

    def track_gram_matrices(self, network):
        """Seconds over those of the matrix products of one Gram matrix of the training set."""
        return ratio(self.influence, lambda: [times_transposed(x, x) for x in self.factors], self.pairs)

    track_gram_matrices.unit = "Gram matrices"


class InfluenceOfSequences:
    """Exact influence of 2,000 sequences of 64 tokens on a hundred others, one row each, everything counted."""

    timeout = 3600
    queries = 100
    pairs = 1
    N = 2000
    params = (["transformer"],)
    param_names = ("network",)

    def setup(self, network):
        net, (X, y) = make(network, self.N + self.queries)
        batches = list(zip(X.split(100), y.split(100), strict=True))
        count = max(1, self.N // 100)
        self.train, self.test = batches[:count], batches[count:] or batches[:1]
        self.arguments = net, nn.CrossEntropyLoss(), list(net.parameters())

    def influence(self):
        op = fo.FisherMCLinearOperator(*self.arguments, self.train, rows="datum", check_deterministic=False)
        train, test = (op.scores.on(data, kind="empirical", rows="datum") for data in (self.train, self.test))
        return fo.linalg.inv_quad(op, test, train, damping=1e-2)

    def gradient(self):
        net, loss, params = self.arguments
        for X, y in self.train:
            torch.autograd.grad(loss(net(X), y), params)

    def track_gradients(self, network):
        """Seconds over those of the gradient of the loss of the whole training set."""
        return ratio(self.influence, self.gradient, self.pairs)

    track_gradients.unit = "gradients"


class TopTen(_Suite):
    """The top ten eigenpairs."""

    def ours(self):
        return fo.linalg.eigsh(self.operator(), 10)

    def theirs(self):
        return eigsh(self.peers(), 10, tol=self.tolerance)

    def time_eigsh(self, network):
        self.ours()

    def track_speedup(self, network):
        if peer is None:
            raise NotImplementedError
        return ratio_in_turns(self.theirs, self.ours, self.pairs)

    track_speedup.unit = "times"

    def track_residual_over_theirs(self, network):
        """Largest ‖F v − λ v‖ of ours over theirs, each by its own operator."""
        op = self.peers()
        values, vectors = self.theirs()
        theirs = np.linalg.norm(op @ vectors - vectors * values, axis=0).max()
        return float(self.ours().residuals.max() / theirs)


class DampedSolve(_Suite):
    """(F + 1e-3 I) x = b to a relative residual of 1e-5."""

    damping, rtol = 1e-3, 1e-5

    def setup(self, network):
        super().setup(network)
        self.b = np.random.default_rng(0).standard_normal(self.D).astype(np.float32)

    def ours(self):
        solution = fo.linalg.solve(self.operator(), self.b, self.damping, rtol=self.rtol)
        assert solution.converged
        return solution

    def theirs(self):
        op = self.peers()
        from scipy.sparse.linalg import LinearOperator

        damped = LinearOperator(op.shape, matvec=lambda x: op @ x + self.damping * x, dtype=np.float32)
        return cg(damped, self.b, rtol=self.rtol)

    def time_solve(self, network):
        self.ours()

    def track_speedup(self, network):
        if peer is None:
            raise NotImplementedError
        return ratio_in_turns(self.theirs, self.ours, self.pairs)

    track_speedup.unit = "times"


class Gram(_Suite):
    """The Gram matrix beside its matrix products."""

    def setup(self, network):
        super().setup(network)
        self.scores = self.operator().scores
        self.factors = factors_of(*self.arguments[::3])
        self.biases = torch.randn(self.N, sum(x.shape[1] for x in self.factors[1::2]))

    def time_gram(self, network):
        self.scores.gram_tensor()

    def track_fraction_of_limit(self, network):
        matrices = [*self.factors, self.biases]
        return ratio(lambda: [times_transposed(x, x) for x in matrices], self.scores.gram_tensor, 5 * self.pairs)

    track_fraction_of_limit.unit = "of the limit's speed"


def factors_of(net, batches):
    """Return random matrices of the sizes of the inputs and of the gradients at the outputs of dense layers."""
    N, layers = len(batches[0][0]), [layer for layer in net if isinstance(layer, nn.Linear)]
    return [torch.randn(N, n) for layer in layers for n in (layer.in_features, layer.out_features)]


def ratio_in_turns(theirs, ours, pairs):
    """Median of the ratios of one call each, in turns after a first of both; seconds for the peer."""
    theirs()
    return statistics.median(seconds_once(theirs) / seconds(ours) for _ in range(pairs))


def seconds_once(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
