"""KFAC, EKFAC and Nyström's method beside curvlinops and skerch, in the same process."""

import statistics
import time

import torch
from torch import nn

import fisherops as fo
from fisherops import approximate

from .networks import make

try:
    import curvlinops as peer
except ImportError:
    peer = None

try:
    import skerch
    from skerch.algorithms import seigh
except ImportError:
    skerch = None


def seconds(function):
    start = time.process_time()
    function()
    return time.process_time() - start


def ratio(ours, theirs, pairs):
    """Median over interleaved pairs of our seconds over the peer's, the first pair left out."""
    pairs = [seconds(ours) / seconds(theirs) for _ in range(pairs + 1)]
    return statistics.median(pairs[1:])


class Kfac:
    """Factors, whole EKFAC, and products; "cached" with the rows of G already there."""

    params = (["mlp", "cnn", "transformer", "resnet18", "resnet"], ["cached", "whole"])
    param_names = ("network", "start")
    timeout = 900
    pairs, N = 5, None

    def setup(self, network, start):
        self.net, self.batch = make(network, self.N or (32 if network == "resnet18" else None))
        self.rows = "datum" if network == "transformer" else "term"
        self.op = self.make()
        if start == "cached":
            self.op @ torch.zeros(self.op.shape[0])
        self.start = start
        layers = [m for m in self.net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        self.params_of_peer = [p for m in layers for p in m.parameters(recurse=False)]

    def make(self):
        return fo.FisherMCLinearOperator(
            self.net, nn.CrossEntropyLoss(), data=[self.batch], rows=self.rows, check_deterministic=False
        )

    def ours(self, build):
        return build(self.op if self.start == "cached" else self.make())

    def theirs(self, corrected=False):
        if peer is None:
            raise NotImplementedError
        make = peer.EKFACLinearOperator if corrected else peer.KFACLinearOperator
        K = make(
            self.net, nn.CrossEntropyLoss(), self.params_of_peer, [self.batch], check_deterministic=False,
            separate_weight_and_bias=False,
        )  # fmt: skip
        K.compute_kronecker_factors()
        if corrected:
            K.compute_eigenvalue_correction()
        return K

    def time_kfac(self, network, start):
        self.ours(approximate.kfac)

    def time_ekfac(self, network, start):
        self.ours(approximate.ekfac)

    def track_kfac_beside_curvlinops(self, network, start):
        return ratio(lambda: self.ours(approximate.kfac), self.theirs, self.pairs)

    def track_ekfac_beside_curvlinops(self, network, start):
        if network == "transformer":
            raise NotImplementedError  # the peer takes outputs of two axes only
        return ratio(lambda: self.ours(approximate.ekfac), lambda: self.theirs(corrected=True), self.pairs)

    def track_product_beside_curvlinops(self, network, start):
        K, theirs = self.ours(approximate.kfac), self.theirs()
        v, w = torch.randn(K.shape[0]), torch.randn(theirs.shape[0])
        return ratio(lambda: K @ v, lambda: theirs @ w, self.pairs)

    def track_inverse_product_beside_curvlinops(self, network, start):
        K = self.ours(approximate.kfac).inv(1e-3)
        theirs = peer.KFACInverseLinearOperator(self.theirs(), damping=1e-3, use_exact_damping=True)
        v, w = torch.randn(K.shape[0]), torch.randn(theirs.shape[0])
        return ratio(lambda: K @ v, lambda: theirs @ w, self.pairs)


class Nystrom:
    """An error of 1 % in the Frobenius norm; skerch gets the rank that this takes."""

    params = (["mlp", "cnn"],)
    param_names = ("network",)
    timeout = 900
    pairs, N = 3, None

    def setup(self, network):
        net, batch = make(network, self.N)
        self.op = fo.FisherMCLinearOperator(net, nn.CrossEntropyLoss(), data=[batch])
        self.op @ torch.zeros(self.op.shape[0])

    def time_nystrom(self, network):
        approximate.nystrom(self.op, tol=0.01)

    def track_rank(self, network):
        return len(approximate.nystrom(self.op, tol=0.01).values)

    def track_nystrom_beside_skerch(self, network):
        if skerch is None:
            raise NotImplementedError
        rank = self.track_rank(network)
        operator = Plain(self.op)
        return ratio(
            lambda: approximate.nystrom(self.op, tol=0.01),
            lambda: seigh(operator, self.op.device, self.op.torch_dtype, rank, recovery_type="nystrom"),
            self.pairs,
        )


class Plain:
    """What skerch asks of an operator."""

    def __init__(self, op):
        self._op, self.shape = op, op.shape

    def __matmul__(self, x):
        return self._op @ x

    def __rmatmul__(self, x):
        return x @ self._op
