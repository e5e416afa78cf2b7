"""Costs of a language model's Fisher beside its gradient: python asv_bench/language.py [--lora RANK].

GPT-2 of Transformers with 124 million random parameters, sequences of 1,024 tokens, one row for each sequence and draw,
batches of one sequence. Times are processor times, so that other work on the machine counts little.
"""

import argparse
import resource
import time

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import fisherops as fo
from fisherops import linalg


class Adapter(nn.Module):
    """A frozen layer with a trainable product of two narrow matrices beside it (LoRA)."""

    def __init__(self, layer, rank):
        super().__init__()
        inputs, outputs = layer.weight.shape
        self.layer = layer
        self.A, self.B = nn.Parameter(0.02 * torch.randn(inputs, rank)), nn.Parameter(0.02 * torch.randn(rank, outputs))

    def forward(self, X):
        return self.layer(X) + (X @ self.A) @ self.B


def make(rank):
    """Return GPT-2, with adapters on the attention's inputs and all else frozen if a rank is given."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()
    if rank:
        model.requires_grad_(False)
        for block in model.transformer.h:
            block.attn.c_attn = Adapter(block.attn.c_attn, rank)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora", metavar="RANK", type=int, default=0, help="adapters of this rank, all else frozen")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = make(options.lora)
    params = [p for p in model.parameters() if p.requires_grad]
    shape = options.sequences, options.length
    tokens, labels = (torch.randint(model.config.vocab_size, shape) for _ in range(2))
    batches = list(zip(tokens.split(1), labels.split(1), strict=True))
    loss = nn.CrossEntropyLoss()

    def logits(X):
        return model(X).logits.movedim(-1, 1)

    def gradient():
        for X, y in batches:
            torch.autograd.grad(loss(logits(X), y), params)

    op = fo.FisherMCLinearOperator(logits, loss, params, batches, rows="datum", check_deterministic=False)
    v = torch.randn(op.shape[1])
    work = {
        "gradient": gradient,
        "first product": lambda: op @ v,
        "product": lambda: op @ v,
        "trace": op.trace,
        "Gram matrix": lambda: op.scores.gram(),
        "solve": lambda: linalg.solve(op, v, damping=1e-3 * op.trace() / op.shape[1]),
    }
    for name, function in work.items():
        start = time.process_time()
        function()
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{name}: {seconds:.3g} s, peak of the process {peak:.1f} GiB", flush=True)
    print(f"{op.shape[1]} parameters; {op.plan}")


if __name__ == "__main__":
    main()
