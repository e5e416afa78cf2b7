"""Warm products and solver steps on a CUDA device: `asv run -b gpu`; skipped where there is none."""

import torch
from torch import nn

import fisherops as fo

from . import networks

DEVICE = "cuda"


class Products:
    """Vectors of the device with warm products of the networks of docs/explanation/gpu.md."""

    params = (["mlp", "cnn", "resnet", "transformer"], [1, 32])
    param_names = ("network", "vectors")
    timeout = 300
    N = None

    def setup(self, network, vectors):
        self.module = torch.get_device_module(DEVICE)
        if not self.module.is_available():
            raise NotImplementedError("needs a CUDA device")
        net, (X, y) = networks.make(network, self.N)
        rows = "datum" if network == "transformer" else "term"
        data = [(X.to(DEVICE), y.to(DEVICE))]
        self.op = fo.FisherMCLinearOperator(net.eval().to(DEVICE), nn.CrossEntropyLoss(), data=data, rows=rows)
        self.x = torch.randn(self.op.shape[0], vectors, device=DEVICE)
        self.op @ self.x
        self.module.synchronize()

    def time_product(self, network, vectors):
        self.op @ self.x
        self.module.synchronize()

    def time_ten_products(self, network, vectors):
        """Ten products, which are launched without waiting for each other."""
        for _ in range(10):
            self.op @ self.x
        self.module.synchronize()

    def time_ten_steps_of_solve(self, network, vectors):
        fo.linalg.solve(self.op, self.x, 1e-3, method="primal", rtol=1e-12, maxiter=10)

    def peakmem_product(self, network, vectors):
        self.op @ self.x
