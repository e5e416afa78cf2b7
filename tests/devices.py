"""The devices that tests run on: the host, the simulated accelerator, and a CUDA device if there is one."""

import pytest
import simulated
import torch

simulated.register()

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
SIMULATED = torch.device("sim", 0)

on_every_device = pytest.mark.parametrize("device", ["cpu", "sim", CUDA], indirect=True)
on_accelerators = pytest.mark.parametrize("device", ["sim", CUDA], indirect=True)


def device_named(name):
    return torch.empty(0, device=name).device
