"""Largest eigenvalues of a Fisher over several processes."""

import torch
import torch.distributed as dist

import fisherops as fo
from fisherops import linalg

dist.init_process_group("gloo")  # "cpu:gloo,cuda:nccl" for GPUs
group = dist.group.WORLD

torch.manual_seed(0)  # the same model and data on every rank
model = torch.nn.Sequential(
    torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 5)
)
loss = torch.nn.CrossEntropyLoss()
X, y = torch.randn(1000, 20), torch.randint(5, (1000,))

# The shard of this rank, with indices.
data = fo.distributed.shard((X, y), group, batch_size=100)
op = fo.FisherMCLinearOperator(
    model, loss, data=data, process_group=group
)

# All ranks make the same calls and get the same results.
found = linalg.eigsh(op, k=3, return_eigenvectors=False)
trace = op.trace()

if dist.get_rank() == 0:
    values = " ".join(f"{value:.6f}" for value in found.eigenvalues)
    print(f"eigenvalues {values} of a trace of {trace:.6f}")
dist.destroy_process_group()
