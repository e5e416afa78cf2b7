"""The array door: what it costs to take a vector to torch and the result back, beside no computation at all."""

import numpy as np
import torch

from fisherops._linop import TorchLinearOperator


class Nothing(TorchLinearOperator):
    """An operator whose product is ready before it is asked for."""

    def __init__(self, D):
        super().__init__((D, D), torch.float32, torch.device("cpu"))
        self._result = torch.ones(1, D)

    def _mul(self, V):
        return self._result


def vector(library, D):
    x = np.ones(D, np.float32)
    if library == "numpy, float64":
        return x.astype(np.float64)
    if library == "numpy, reversed":
        return x[::-1]
    if library == "torch":
        return torch.from_numpy(x)
    if library == "array-api-strict":
        try:
            import array_api_strict
        except ImportError:
            raise NotImplementedError from None  # asv's way to skip
        return array_api_strict.asarray(x)
    if library == "jax":
        try:
            import jax.numpy
        except ImportError:
            raise NotImplementedError from None
        return jax.numpy.asarray(x)
    return x


class Door:
    """Seconds for `op @ x` with nothing to compute. Those with a dtype or layout that does not fit copy D numbers."""

    params = (
        ["numpy", "torch", "array-api-strict", "jax", "numpy, float64", "numpy, reversed"],
        [1_000, 1_000_000],
    )
    param_names = ("library", "D")

    def setup(self, library, D):
        self.op = Nothing(D)
        self.x = vector(library, D)

    def time_product(self, library, D):
        self.op @ self.x
