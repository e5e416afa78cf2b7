"""What is private to torch: each name works with this version, and one that is missing means "unknown"."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import fisherops as fo
from fisherops import _torch


class Node:
    """A node of a graph in a torch that has renamed everything but what autograd documents."""

    next_functions = ()

    def name(self):
        return "Unknown"


def outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, model(torch.randn(5, 3))


def test_versions_and_addresses():
    t = torch.zeros(3)
    before = _torch.version_of(t), _torch.address_of(t)
    t.add_(1)
    assert _torch.version_of(t) == before[0] + 1
    assert _torch.address_of(t) == before[1]
    with torch.inference_mode():
        assert _torch.version_of(torch.zeros(3)) is None
    assert _torch.address_of(torch.zeros(3).to_sparse()) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_the_memory_of_a_tensor_is_seen_and_not_referred_to(dtype):
    t = torch.zeros(5, 7, dtype=dtype)
    view = _torch.memory_of(t.T, 64)
    assert len(view) == 35
    t[4, 6] = 1
    assert view[-1] != 0
    torch.utils.swap_tensors(t, torch.ones(2, dtype=dtype))  # raises if anything refers to t
    assert _torch.memory_of(torch.zeros(0), 64) is None
    assert _torch.memory_of(torch.zeros(3).to_sparse(), 64) is None
    assert len(_torch.memory_of(torch.zeros(1000), 64)) <= 64


def test_norms_of_many_tensors(monkeypatch):
    tensors = torch.randn(10).split([3, 0, 7])
    expected = [float(t.norm()) for t in tensors]
    np.testing.assert_allclose(torch.stack(_torch.norms(tensors)), expected, rtol=1e-6)
    monkeypatch.delattr(torch, "_foreach_norm")
    np.testing.assert_allclose(torch.stack(_torch.norms(tensors)), expected, rtol=1e-6)


def test_steps_of_optimizers_are_noted():
    noted = []
    _torch.on_optimizer_step(noted.append)
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = torch.optim.SGD([p], lr=0.1, fused=True)
    optimizer.step()
    assert noted == [optimizer]


def test_random_numbers_are_fixed_inside_and_untouched_outside():
    def draw():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with _torch.fixed_randomness(torch.device("cpu"), 1):
        first = draw()
    with _torch.fixed_randomness(torch.device("cpu"), 1):
        assert draw() == first
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_graphs_are_read():
    model, f = outputs()
    nodes = _torch.graph_nodes(f)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {node.name() for node in nodes} >= {"AddmmBackward0", "TanhBackward0"}
    assert _torch.signature(nodes, names) == _torch.signature(_torch.graph_nodes(model(torch.ones(5, 3))), names)
    assert _torch.signature(nodes, names) != _torch.signature(_torch.graph_nodes(model(torch.ones(4, 3))), names)
    assert _torch.saved_bytes(nodes) >= 5 * 4 * 4  # the hidden activations
    assert not _torch.has_fused_attention(nodes)
    assert not _torch.custom_functions(nodes)


def test_graphs_of_another_torch_are_unknown():
    node = Node()
    assert _torch.signature([node], {}) == _torch.signature([Node()], {})
    assert list(_torch.saved_tensors([node])) == []
    assert _torch.saved_bytes([node]) == 0
    assert _torch.custom_functions([node]) == frozenset()


def test_tensors_of_another_torch_are_unknown():
    class Bare:
        layout = torch.strided

    assert _torch.version_of(Bare()) is None
    assert _torch.address_of(Bare()) is None
    assert _torch.memory_of(Bare(), 64) is None


def test_products_without_the_names_of_graphs(monkeypatch):
    """No name of a node or of what it saves is needed for a right product."""
    model, _ = outputs()
    X, y = torch.randn(6, 3), torch.arange(6) % 2
    expected = fo.FisherLinearOperator(model, nn.CrossEntropyLoss(), data=(X, y)).todense()
    monkeypatch.setattr(_torch, "_saved_names", lambda node: ())
    for cache in ("auto", "scores", "none"):
        op = fo.FisherLinearOperator(model, nn.CrossEntropyLoss(), data=(X, y), cache=cache)
        np.testing.assert_allclose(op @ np.eye(26, dtype=np.float32), expected, atol=1e-6)


def test_operations_are_named():
    assert _torch.name_of(torch.Tensor.__matmul__) == "matmul"
    assert _torch.name_of(torch.Tensor.add_) == "add_"
    assert _torch.name_of(torch.ops.aten._softmax.default) == "softmax"
    assert _torch.name_of(torch.ops.aten.addmm.default) == "addmm"


def test_compiled_models_are_seen_by_their_python_code():
    compiled = torch.compile(lambda x: x * 2, backend="eager")
    with _torch.eager():
        assert compiled(torch.ones(2)).tolist() == [2, 2]
