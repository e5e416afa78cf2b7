"""The top eigenvalues of a Fisher whose data are divided among processes: run it by torchrun."""

import torch
import torch.distributed as dist

import fisherops as fo
from fisherops import linalg

dist.init_process_group("gloo")  # "cpu:gloo,cuda:nccl" for GPUs
group = dist.group.WORLD

torch.manual_seed(0)  # the same model and data on every rank
model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 5))
X, y = torch.randn(1000, 20), torch.randint(5, (1000,))

data = fo.distributed.shard((X, y), group, batch_size=100)  # this rank's part, with indices
op = fo.FisherMCLinearOperator(model, torch.nn.CrossEntropyLoss(), data=data, process_group=group)
values = linalg.eigsh(op, k=3, return_eigenvectors=False).eigenvalues  # on all ranks, with the same result
trace = op.trace()

if dist.get_rank() == 0:
    print("eigenvalues", *(f"{value:.6f}" for value in values), f"of a trace of {trace:.6f}")
dist.destroy_process_group()
