"""What the processes of the tests in test_distributed.py do, each with its part of the data."""

import contextlib
import io
import os
import pickle
import signal
import time
import types
from unittest import mock

import numpy as np
import scipy.sparse.linalg as sla
import simulated
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import fisherops as fo
from fisherops import linalg
from fisherops._sizes import HOST, SIZES
from fisherops.parallel.group import Group, PendingSum
from fisherops.score_matrix import ScoreMatrix
from fisherops.scores.projection import Signs

DEVICE = simulated.register()  # before the first backward pass, which asks how many devices there are

N, D_IN, C = 37, 5, 3


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D_IN, 6), nn.Tanh(), nn.Linear(6, C)).to(dtype)


def everything(dtype=torch.float64, n=N):
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(n, D_IN, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(C, (n,), generator=generator)
    y[3] = -100
    return X, y


def loss():
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double(), ignore_index=-100)


OPERATORS = {
    "mc": fo.FisherMCLinearOperator,
    "exact": fo.FisherLinearOperator,
    "empirical": fo.EmpiricalFisherLinearOperator,
}


def parts(group, split):
    """Return a rank's data in one of the ways in which they can be divided."""
    X, y = everything()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    dataset = TensorDataset(X, y)
    if split in ("contiguous", "strided"):
        return fo.distributed.shard((X, y), group, order=split, batch_size=4)
    if split == "arrays":
        return fo.distributed.shard((X.numpy(), y.numpy()), group)
    if split == "batches":
        return fo.distributed.shard(list(zip(X.split(5), y.split(5), strict=True)), group, order="strided")
    if split == "dataset":
        return fo.distributed.shard(dataset, group, batch_size=6)
    if split == "loader":
        return fo.distributed.shard(DataLoader(dataset, batch_size=6, shuffle=True), group, order="strided")
    if split == "own":  # the parts one after the other, without indices
        cuts = [0, 10, 11, 30, N] if size == 4 else [0, 30, N]
        own = slice(cuts[rank], cuts[rank + 1])
        return list(zip(X[own].split(4), y[own].split(4), strict=True))
    if split == "nothing":  # all on one rank
        return [(X, y)] if rank == size - 1 else []
    if split in ("sampler", "shuffled sampler"):
        sampler = DistributedSampler(dataset, size, rank, shuffle=split != "sampler", seed=3)
        return DataLoader(dataset, batch_size=4, sampler=sampler)
    raise ValueError(split)


def operator(group, kind="mc", split="contiguous", **options):
    if kind == "mc":
        options = {"mc_samples": 2, "seed": 5, **options}
    return OPERATORS[kind](network(), loss(), data=parts(group, split), process_group=group, **options)


# ---- Jobs --------------------------------------------------------------------------------------------


def dense(group, kind, split, options):
    op = operator(group, kind, split, **options)
    D = op.shape[0]
    return op.todense(), op @ np.eye(D), op.diagonal(), op.trace(), op @ np.linspace(-1, 1, 3 * D).reshape(D, 3)


def gradient(group, kind, split):
    return operator(group, kind, split).gradient()


def same_bits(group, cache):
    op = fo.FisherMCLinearOperator(
        network(torch.float32), nn.CrossEntropyLoss(),
        data=fo.distributed.shard(everything(torch.float32, 500), group, batch_size=64), process_group=group, cache=cache,
    )  # fmt: skip
    V = torch.randn(op.shape[0], 3, generator=torch.Generator().manual_seed(2))
    return (op @ V).numpy().tobytes(), (op @ V[:, 0]).numpy()


def blocks(group, where):
    """Multiply with many vectors, in blocks, and list what is done with each; count the passes over the data."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    options = {"cached": {}, "not cached": {"cache": "none"}}.get(
        where, {"max_memory": 0 if rank == size - 1 else None}
    )
    events = []

    class Counting(list):
        def __iter__(self):
            events.append("read")
            return super().__iter__()

    def noted(name, function):
        def wrapper(*args):
            events.append(name)
            return function(*args)

        return wrapper

    data = Counting(parts(group, "contiguous"))
    op = fo.FisherMCLinearOperator(network(), loss(), data=data, process_group=group, mc_samples=2, seed=5, **options)
    V = np.random.default_rng(0).standard_normal((op.shape[0], 20))
    whole = op @ V
    events.clear()
    with (
        mock.patch.dict(SIZES, {torch.device("cpu"): HOST._replace(columns=1)}),  # 8 columns at a time
        mock.patch.object(ScoreMatrix, "product", noted("product", ScoreMatrix.product)),
        mock.patch.object(Group, "begin_sum", noted("begin", Group.begin_sum)),
        mock.patch.object(PendingSum, "value", noted("wait", PendingSum.value)),
    ):
        return whole, op @ V, events


def on_a_device(group, what):
    """Products on the simulated accelerator, whose collectives are gloo's on the memory of the device."""

    class OfDevice:
        def __init__(self, host):
            self._host = host

        def allreduce(self, tensors, op):
            return self._host.allreduce([simulated.on_host(t) for t in tensors], op)

        def allgather(self, outs, tensors):
            outs = [[simulated.on_host(t) for t in own] for own in outs]
            return self._host.allgather(outs, [simulated.on_host(t) for t in tensors])

    def group_of(self, t):
        return self._cpu if t.device.type == "cpu" else OfDevice(self._cpu)

    model, data = simulated.moved(network(), DEVICE), parts(group, "contiguous")
    with mock.patch.object(Group, "_group", group_of):
        op = fo.FisherMCLinearOperator(model, loss(), data=data, process_group=group, mc_samples=2, seed=5)
        V = np.random.default_rng(0).standard_normal((op.shape[0], 3))
        x = torch.from_numpy(V).to(DEVICE)
        op @ x
        fo._torch.settle()
        if what == "other vectors":
            with simulated.lag(10**9):
                op @ (x + dist.get_rank(group))  # not known yet
            return op @ V
        with simulated.watched() as log:
            op @ x
            y = op @ x
        return log.waits, y.cpu().numpy() - operator(group) @ V


def rows(group, cache, split):
    op = operator(group, split=split, cache=cache)
    G = op.scores
    v, w = np.arange(G.shape[1]) / 10.0, np.arange(G.shape[0]) / 10.0
    dense = G @ np.eye(G.shape[1])
    return G.shape, dense, G @ v - dense @ v, G.T @ w - dense.T @ w, G.gram() - dense @ dense.T


def projecting(G, k, seed):
    """Return the matrix (D, k) that rows are projected by."""
    return Signs(G.parameters, k, seed).flat(slice(0, k)).numpy().T / np.sqrt(k)


def other_data(group, cache, other_cache, split):
    op = operator(group, cache=cache)
    G, (X, y) = op.scores, everything()
    own = fo.distributed.shard((X[:9], y[:9]), group, order="strided", batch_size=2)
    if split == "nothing":
        own = [(X[:9], y[:9])] if dist.get_rank(group) == 0 else []
    Q = G.on(own, kind="empirical", cache=other_cache, sample_weight=np.arange(9.0) if split == "weights" else None)
    dense, rows = Q.todense(), G.todense()
    part = op.submatrix(["2.bias", "0.weight"])
    differences = [
        Q.gram(G) - dense @ rows.T,
        G.gram(Q) - rows @ dense.T,
        Q.gram() - dense @ dense.T,
        Q.row_norms() - np.linalg.norm(dense, axis=1),
        Q.project(9, 2).value - dense @ projecting(Q, 9, 2),
        Q.rows(2, 7) - dense[2:7],
        Q.T @ np.ones(len(dense)) - dense.sum(0),
        part.todense() - op.todense()[np.ix_(INDEX, INDEX)],
        part.scores.gram() - rows[:, INDEX] @ rows[:, INDEX].T,
        part.damped(np.ones(len(INDEX))) @ np.ones(len(INDEX)) - op.todense()[np.ix_(INDEX, INDEX)].sum(1) - 1,
    ]
    return dense, Q.datum, differences


def damped_inverses(group, method):
    op = operator(group)
    X, y = everything()
    Q = op.scores.on(fo.distributed.shard((X[:9], y[:9]), group, order="strided", batch_size=2), kind="empirical")
    rows, A = Q.rows(), op.todense() + 1e-2 * np.eye(op.shape[0])
    expected = rows @ np.linalg.solve(A, rows.T)
    whole = linalg.inv_quad(op, Q, damping=1e-2, method=method, rtol=1e-10)
    diagonal = linalg.inv_quad(op, Q, damping=1e-2, method=method, rtol=1e-10, diagonal=True)
    draws = linalg.sample(op, 4, damping=1e-2, method=method, rng=7)
    return whole.value - expected, diagonal.value - expected.diagonal(), draws.value


def stored(group, cache, folder):
    G = operator(group, cache=cache).scores
    G.save(f"{folder}/G.pt")
    S = fo.load_scores(f"{folder}/G.pt")
    return G.todense(), S.todense(), S.datum, G.datum, os.listdir(folder)


def progress(group):
    """Return what passes over the operator's data, and over other data, show."""
    shown = []
    for other in (False, True):
        with contextlib.redirect_stderr(io.StringIO()) as stream:
            op = operator(group, progressbar=True)
            if other:
                stream.truncate(0)
                _ = op.scores.on(fo.distributed.shard(everything(), group, batch_size=2), progressbar=True).plan
            else:
                op @ np.ones(op.shape[0])
        shown.append("batch" in stream.getvalue())
    return shown


# Of the parameters "2.bias" and "0.weight" in the flat vector.
INDEX = np.r_[6 * D_IN + 6 + C * 6 : 6 * D_IN + 6 + C * 6 + C, 0 : 6 * D_IN]


def no_other_data(group):
    Q = operator(group).scores.on([])
    return Q.shape, Q.gram().shape


def scipy_solvers(group):
    op = operator(group)
    v0 = np.ones(op.shape[0])
    values = sla.eigsh(op, k=4, v0=v0)[0]
    x, info = sla.cg(op.damped(1e-2), v0, rtol=1e-10)
    singular = sla.svds(op.scores, k=3, v0=np.ones(min(op.scores.shape)), return_singular_vectors=False)
    return values, x, info, singular


def algebra(group, method):
    op = operator(group)
    b = np.linspace(-1, 1, op.shape[0])
    pairs = linalg.eigsh(op, 4, method=method)
    solution = linalg.solve(op, b, 1e-2, method=method, rtol=1e-10)
    inverse = linalg.inv(op, 1e-2, method=method, rtol=1e-10) @ b
    log = linalg.slogdet(op, 1e-2, method="dual" if method == "primal" else method)
    dimension = linalg.effective_dimension(op, 1e-2, method="dual" if method == "primal" else method)
    return pairs.eigenvalues, pairs.residuals, pairs.method, solution.x, inverse, log.logabsdet, dimension.value


def bounds(group, method):
    loss, data = nn.CrossEntropyLoss(reduction="sum"), parts(group, "strided")
    op = fo.FisherLinearOperator(network(), loss, data=data, process_group=group)
    return linalg.crlb(op.damped(1e-2) if method == "damped" else op, "0.bias", method="auto")


def other_methods(group, cache):
    op = operator(group, cache=cache)
    v = np.ones(op.shape[0])
    first = op.standard_error(v), op.trace()
    again = op.resample(9)
    return *first, again.trace(), linalg.trace(op).value, linalg.frobenius_norm(op).value


def mesh(group):
    """Take a mesh for the group, and copies of an operator that are not to be pickled."""
    op = operator(group, split="contiguous")
    other = fo.FisherMCLinearOperator(
        network(), loss(), data=parts(group, "contiguous"), mc_samples=2, seed=5,
        process_group=init_device_mesh("cpu", (dist.get_world_size(group),)),
    )  # fmt: skip
    try:
        pickle.dumps(op)
    except TypeError as error:
        return abs(op.todense() - other.todense()).max(), str(error)


def follows(group):
    """Change the parameters in place on all ranks."""
    model = network()
    op = fo.FisherMCLinearOperator(model, loss(), data=parts(group, "contiguous"), process_group=group)
    before = op.trace()
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    return before, op.trace()


def disagree(group, what):
    """Be of another opinion on the last rank."""
    rank, last = dist.get_rank(group), dist.get_rank(group) == dist.get_world_size(group) - 1
    if what == "seed":
        operator(group, seed=7 if last else 8)
    if what == "parameters":
        model = network()
        if last:
            model[0].bias.data[0] += 1e-3
        fo.FisherMCLinearOperator(model, loss(), data=parts(group, "contiguous"), process_group=group)
    if what == "shapes":
        model = network()
        params = list(model.parameters())[: 3 if last else 4]
        fo.FisherMCLinearOperator(model, loss(), params, parts(group, "contiguous"), process_group=group)
    if what == "num_data":
        operator(group, num_data=N if last else N + 1)
    if what == "total":
        operator(group, num_data=N + 1)
    if what == "indices":
        X, y = everything()
        data = [(X[:5], y[:5], torch.arange(5) + (5 * rank if not last else 4))]
        fo.FisherMCLinearOperator(network(), loss(), data=data, process_group=group)
    if what == "some without indices":
        X, y = everything()
        data = [(X[:5], y[:5])] if last else [(X[:5], y[:5], torch.arange(5) + 5 * rank)]
        fo.FisherMCLinearOperator(network(), loss(), data=data, process_group=group)
    if what == "sampler":
        X, y = everything()
        sampler = DistributedSampler(TensorDataset(X, y), dist.get_world_size(group) + 1, rank)
        data = DataLoader(TensorDataset(X, y), batch_size=4, sampler=sampler)
        fo.FisherMCLinearOperator(network(), loss(), data=data, process_group=group)
    op = operator(group)
    if what == "vectors":
        op @ (np.ones(op.shape[0]) * (2 if last else 1))
    if what == "permuted vectors":
        v = np.arange(op.shape[0]) + 1.0
        op @ (v[::-1].copy() if last else v)
    if what == "permuted columns":  # two columns that are the same numbers in another order
        V = np.arange(2.0 * op.shape[0]).reshape(-1, 2)
        op @ (np.roll(V, 1, axis=0) if last else V)
    if what == "columns":
        op @ np.ones((op.shape[0], 2 if last else 3))
    if what == "operators":
        other = operator(group, seed=1)
        (op if last else other) @ np.ones(op.shape[0])
    if what == "calls":
        op.trace() if last else op @ np.ones(op.shape[0])
    if what == "changed parameters":
        model = network()
        op = fo.FisherMCLinearOperator(model, loss(), data=parts(group, "contiguous"), process_group=group)
        op.trace()
        if last:
            with torch.no_grad():
                model[0].weight.mul_(0.5)
        op.trace()


def repeat(group, what):
    """Change the parameters on all ranks, and what the next pass must repeat on the last one alone."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    model, criterion = network(), loss()
    op = fo.FisherMCLinearOperator(model, criterion, data=parts(group, "contiguous"), process_group=group)
    op.trace()
    with torch.no_grad():
        model[0].weight.mul_(0.5)
        if last and what == "divisor":
            criterion.weight.mul_(2)
    if last and what == "check":
        model[1].train(not model[1].training)
    return op.trace()


def fail(group, how):
    """Fail on the last rank, in one way or another, while the others wait for it."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    model, fault = network(), types.SimpleNamespace(there=False)
    model.register_forward_hook(lambda *_: 1 / 0 if fault.there else None)
    op = fo.FisherMCLinearOperator(
        model, loss(), data=parts(group, "contiguous"), process_group=group, cache="none", check_deterministic=False
    )
    v = np.ones(op.shape[0])
    op @ v
    started = time.monotonic()
    try:
        if last and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if last and how == "sleep":
            time.sleep(12)
            return "slept"
        if last and how == "error":
            fault.there = True
        op @ v
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "nothing"


def recover(group):
    """Fail together, and go on with another operator."""
    with contextlib.suppress(fo.distributed.RankError):
        disagree(group, "seed")
    return operator(group).trace()


def interrupted(group, path, stop):
    """Run a solver with a checkpoint, up to some products, or to its end."""
    op = operator(group)

    def callback(products, *_):
        if stop and products >= stop:
            raise KeyboardInterrupt

    try:
        pairs = linalg.eigsh(op, 3, method="primal", ncv=8, checkpoint=path, callback=callback)
    except KeyboardInterrupt:
        return None
    return pairs.eigenvalues, pairs.products


def solved(group, path, stop):
    op = operator(group)

    def callback(iterations, _):
        if stop and iterations >= stop:
            raise KeyboardInterrupt

    try:
        solution = linalg.solve(
            op, np.ones(op.shape[0]), 1e-4, method="primal", rtol=1e-9, checkpoint=path, callback=callback
        )
    except KeyboardInterrupt:
        return None
    return solution.x, solution.iterations


def fail_first(group):
    op = operator(group)
    if dist.get_rank(group) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        op @ np.ones(op.shape[0])
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing"


def refused(group):
    X, y = everything()
    dataset = TensorDataset(X, y)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(dataset)

    sampler = torch.utils.data.WeightedRandomSampler([1.0] * N, N)
    cases = [
        (Stream(), {"batch_size": 4}, "IterableDataset has no places"),
        (DataLoader(Stream(), batch_size=4), {}, "IterableDataset has no places"),
        (DataLoader(dataset, batch_size=4, drop_last=True), {}, "leaves out data"),
        (DataLoader(dataset, batch_size=4, sampler=sampler), {}, "samples in a way of its own"),
        (DataLoader(dataset, batch_size=4), {"batch_size": 4}, "that of the DataLoader"),
        (dataset, {}, "pass `batch_size`"),
        (iter([(X, y)]), {}, "must be a pair of arrays"),
        ((X, y), {"order": "random"}, "`order` must be 'contiguous' or 'strided'"),
        ((X, y[:-1]), {}, "one row for each example"),
        ((X, y), {"batch_size": 0}, "`batch_size` must be at least 1"),
    ]
    found = []
    for data, options, pattern in cases:
        try:
            fo.distributed.shard(data, group, **options)
        except Exception as error:
            found.append((type(error).__name__, str(error), pattern))
        else:
            found.append(("nothing", "", pattern))
    return found


# ---- Parameters that are sharded themselves ----------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.mix, self.head = nn.Linear(8, 24), nn.Linear(8, C)

    def forward(self, X):
        h = self.norm(self.tokens(X))
        q, k, v = self.mix(h).chunk(3, -1)
        return self.head(h + nn.functional.scaled_dot_product_attention(q, k, v)).movedim(-1, 1)


def sharded_case(kind):
    """Return a model, its parts that are sharded by themselves, and all data."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if kind == "dense":
        model = nn.Sequential(nn.Linear(D_IN, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, C)).double()
        X, y = everything(n=36)
        return model, [model[0], model[3]], (X, y)
    if kind == "convolution":
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, C)
        ).double()
        X = torch.randn(24, 2, 6, 6, generator=generator, dtype=torch.float64)
        return model, [model[0], model[4]], (X, torch.randint(C, (24,), generator=generator))
    model = Attention().double()
    X = torch.randint(11, (16, 5), generator=generator)
    return model, [model.mix], (X, torch.randint(C, (16, 5), generator=generator))


def sharded_operator(group, kind, batch_size=4, **options):
    model, pieces, data = sharded_case(kind)
    mesh = init_device_mesh("cpu", (dist.get_world_size(group),))
    for piece in [*pieces, model]:
        fully_shard(piece, mesh=mesh)
    own = fo.distributed.shard(data, group, batch_size=batch_size)
    loss = nn.CrossEntropyLoss()
    return model, fo.FisherMCLinearOperator(model, loss, data=own, **{"process_group": group, **options})


def own_places(group, model):
    """Return where a rank's part of the flat vector lies in that of a whole model."""
    pieces = [p.to_local().numel() for p in model.parameters()]
    by_rank = [None] * dist.get_world_size(group)
    dist.all_gather_object(by_rank, pieces, group=group)
    places, first = [], 0
    for k, p in enumerate(model.parameters()):
        start = first + sum(sizes[k] for sizes in by_rank[: dist.get_rank(group)])
        places += range(start, start + pieces[k])
        first += p.numel()
    return places


def sharded_products(group, kind, rows):
    model, op = sharded_operator(group, kind, rows=rows, mc_samples=2)
    places = own_places(group, model)
    V = torch.linspace(-1, 1, 3 * op.shape[0], dtype=torch.float64).view(3, -1).T
    x = op.sharded(V[places])
    before = [p.grad for p in model.parameters()]
    products = (op @ x).to_local(), (op @ op.sharded(V[places, 0])).to_local(), op.diagonal().to_local()
    solved = [
        linalg.solve(op, op.sharded(V[places, 0]), 0.1, method=method, rtol=1e-10).x.to_local()
        for method in ("primal", "dual")
    ]
    G = op.scores
    there = (G.T @ (G @ x)).to_local()
    numbers = op.trace(), linalg.slogdet(op, 0.1).logabsdet
    spectrum = linalg.eigsh(op, 3, method="dual", return_eigenvectors=False).eigenvalues
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    return places, [t.numpy() for t in (*products, *solved, there)], numbers, spectrum, before, op.trace(), str(op.plan)


def sharded_gradient(group):
    model, op = sharded_operator(group, "dense")
    X, y = sharded_case("dense")[2]
    nn.functional.cross_entropy(model(X), y).backward()
    step = linalg.natural_gradient(op, {name: p.grad for name, p in model.named_parameters()}, 1e-2, rtol=1e-10)
    return {name: t.full_tensor().numpy() for name, t in step.items()}, {
        name: p.grad.full_tensor().numpy() for name, p in model.named_parameters()
    }


def sharded_other_data(group, kind):
    model, op = sharded_operator(group, kind, rows="datum")
    G, data = op.scores, sharded_case(kind)[2]
    Q = G.on(fo.distributed.shard(tuple(part[:8] for part in data), group, batch_size=2), kind="empirical")
    w = np.linspace(-1, 1, len(Q.datum))
    product = (Q.T @ w).to_local().numpy(), own_places(group, model)
    return Q.datum, Q.gram(G), Q.gram(), Q.row_norms(), product, w, Q.project(9, 2)


def sharded_refusals(group):
    def attempt(function):
        try:
            function()
        except Exception as error:
            return type(error).__name__, str(error)
        return "nothing", ""

    model, op = sharded_operator(group, "dense")
    rank = dist.get_rank(group)
    mesh = init_device_mesh("cpu", (dist.get_world_size(group),))
    X, y = everything(n=36)
    tensor_parallel = nn.Linear(D_IN, C).double()
    tensor_parallel.weight = nn.Parameter(distribute_tensor(tensor_parallel.weight.detach(), mesh, [Shard(0)]))
    partly = nn.Sequential(nn.Linear(D_IN, 4), nn.Linear(4, C)).double()
    fully_shard(partly[0], mesh=mesh)
    data = fo.distributed.shard((X, y), group, batch_size=4)
    uneven = data[: len(data) - rank]
    make = fo.FisherMCLinearOperator
    ce, ce_sum = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
    return [
        attempt(lambda: op @ np.ones(op.shape[0])),
        attempt(lambda: op.sharded(torch.ones(3))),
        attempt(op.todense),
        attempt(op.gradient),
        attempt(lambda: sharded_operator(group, "dense", mc_samples=2)[1].standard_error(op.diagonal())),
        attempt(lambda: linalg.eigsh(op, 2)),
        attempt(lambda: linalg.crlb(fo.FisherLinearOperator(model, ce_sum, data=data, process_group=group))),
        attempt(lambda: make(model, ce, data=data, process_group=group, cache="scores")),
        attempt(lambda: op.scores.on(data, cache="none")),
        attempt(lambda: make(model, ce, data=data, process_group=group, dtype="float32")),
        attempt(lambda: make(model, ce, data=data)),
        attempt(lambda: make(tensor_parallel, ce, data=data, process_group=group)),
        attempt(lambda: make(partly, ce, data=data, process_group=group)),
        attempt(lambda: make(model, ce, data=uneven, process_group=group)),
    ]


def sharded_composites(group):
    """Multiply by composites of an operator with sharded parameters, and by itself with a process group or without."""
    model, op = sharded_operator(group, "dense", process_group=group if dist.get_world_size(group) > 1 else None)
    places = own_places(group, model)
    x = op.sharded(torch.linspace(-1, 1, op.shape[0], dtype=torch.float64)[places])
    damped = op.damped(0.1)
    same = damped.sharded(x.to_local())
    operators = op, 2 * op, damped, op - 0.5 * op, op @ op, op**2, (op + op).damped(0.1)
    products = [(A @ same).to_local().numpy() for A in operators]
    own = x.to_local().unsqueeze(0)
    return places, products, op.processes.inner(own, own).numpy()


def documented(group, code):
    """Run the example of the how-to page."""
    names = {}
    exec(compile(code, "the page", "exec"), names)
    model, op = sharded_operator(group, "dense")
    data = fo.distributed.shard(sharded_case("dense")[2], group, batch_size=4)
    v = names["top_direction"](model, nn.CrossEntropyLoss(), data, group, steps=200)
    inverse = linalg.inv(op, 1e-2, method="dual", rtol=1e-9) @ (op.damped(1e-2) @ v)
    density = linalg.spectral_density(op, method="dual")
    return (v * (op @ v)).sum().full_tensor().item(), (inverse - v).norm().full_tensor().item(), density.counts.sum()


# ---- What a review found -----------------------------------------------------------------------------


def subgroups(group):
    """Make operators on groups of which some ranks are in more than others."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    first = dist.new_group([0])
    pair = dist.new_group([0, 1])
    overlapping = dist.new_group([1, size - 1])
    traces = []
    for own, members in ((first, [0]), (pair, [0, 1]), (overlapping, [1, size - 1]), (group, range(size))):
        if rank in members:
            op = fo.FisherMCLinearOperator(
                network(), loss(), data=fo.distributed.shard(everything(), own, batch_size=8), process_group=own
            )
            traces.append(op.trace())
    return traces


def differ(group, what):
    """Have something else on the last rank that is no parameter of the operator."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    options, criterion = {}, loss()
    model = nn.Sequential(nn.Linear(D_IN, 6), nn.BatchNorm1d(6), nn.Linear(6, C)).double().eval()
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p)
    if what == "buffers" and last:
        model[1].running_mean.add_(1)
    if what == "frozen":
        options["params"] = list(model[2].parameters())
        if last:
            with torch.no_grad():
                model[0].weight.mul_(2)
    if what == "class weights" and last:
        criterion.weight[0] = 3
    if what == "ignore_index" and last:
        criterion = nn.CrossEntropyLoss(weight=criterion.weight, ignore_index=-1)
    if what == "check_deterministic":
        options["check_deterministic"] = last
    fo.FisherMCLinearOperator(model, criterion, data=parts(group, "contiguous"), process_group=group, **options)


def resampled(group, how):
    rank = dist.get_rank(group)
    options = {"cache": "linearization", "max_memory": 10**9 if rank == 0 else 3000} if how == "memory" else {}
    data = parts(group, "nothing" if how == "nothing" else "contiguous")
    if how == "memory":
        options["cache"] = "auto" if rank else "linearization"
    op = fo.FisherMCLinearOperator(network(), loss(), data=data, process_group=group, mc_samples=2, seed=5, **options)
    v = np.ones(op.shape[0])
    op @ v
    return (
        op.resample(9) @ v,
        (op.damped(1e-2) @ v).shape,
        linalg.inv(op, 1e-2).processes.size,
        op.scores.T.processes.size,
    )


def odd_samplers(group, kind):
    X, y = everything()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    dataset = TensorDataset(X, y)

    class Chunks(DistributedSampler):
        def __iter__(self):
            start, stop = (0, 33) if self.rank == 0 else (30, 37)
            return iter(range(start, stop))

    if kind == "subclass":
        data = DataLoader(dataset, batch_size=4, sampler=Chunks(dataset, size, rank))
    if kind == "batch sampler":
        sampler = torch.utils.data.BatchSampler(
            DistributedSampler(dataset, size, rank, shuffle=False), 4, drop_last=False
        )
        data = DataLoader(dataset, batch_sampler=sampler)
    if kind == "no batches":
        data = DataLoader(dataset, batch_size=None, sampler=DistributedSampler(dataset, size, rank, shuffle=False))
    op = fo.FisherMCLinearOperator(network(), loss(), data=data, process_group=group, mc_samples=2, seed=5)
    return op.todense()


def again(group):
    """Fail on one group, and go on with another of the same ranks."""
    other = dist.new_group(list(range(dist.get_world_size(group))))
    healthy = operator(other)
    with contextlib.suppress(fo.distributed.RankError):
        disagree(group, "seed")
    return healthy.trace(), operator(group).trace(), operator(other).trace()


def failing_callback(group):
    op = operator(group)

    def callback(*_):
        if dist.get_rank(group) == 0:
            raise ZeroDivisionError("in the callback")

    linalg.solve(op, np.ones(op.shape[0]), 1e-3, method="primal", callback=callback)


def stop_first(group):
    """Stop the rank that holds the store, which keeps its connections."""
    op = operator(group)
    if dist.get_rank(group) == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        op @ np.ones(op.shape[0])
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing"


def solve_with_checkpoint(solver, path, pipe):
    """Solve until this process is killed; one process, and no job of a group."""
    from test_linalg import slow_operator

    torch.set_num_threads(1)
    op, b = slow_operator(), np.random.default_rng(0).standard_normal(200)
    pipe.send("started")
    if solver == "eigsh":
        linalg.eigsh(op, 12, method="primal", ncv=26, checkpoint=path)
    else:
        linalg.solve(op, b, 1e-7, method="primal", rtol=1e-13, checkpoint=path)


def approximations(group, name, kind, split, options):
    op = OPERATORS[kind](network(), loss(), data=parts(group, split), process_group=group, **options)
    K = getattr(fo.approximate, name)(op)
    error = fo.approximate.error(op, K)
    return K.todense(), error.value, K.plan


# ---- Natural-gradient steps ------------------------------------------------------------------------


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classes, self.value = nn.Linear(D_IN, 4), nn.Linear(4, C), nn.Linear(4, 1)
        self.double()

    def forward(self, X):
        h = self.body(X).tanh()
        return {"class": self.classes(h), "value": self.value(h)}


# Sizes of three batches, and how many examples of each the first of two ranks has.
BATCHES, OF_FIRST = (12, 12, 9), (5, 12, 0)


def natural_case(name):
    """Return a model, its loss, and batches; the targets of the first rank's part of the first are all ignored."""
    X, y = everything()
    y[:5] = -100
    if name == "heads":
        losses = {"class": nn.CrossEntropyLoss(ignore_index=-100), "value": nn.HuberLoss()}
        targets = [{"class": own, "value": x[:, :1]} for x, own in zip(X.split(12), y.split(12), strict=True)]
        return TwoHeads(), losses, list(zip(X.split(12), targets, strict=True))
    own = loss() if name == "mean" else nn.CrossEntropyLoss(reduction="sum", ignore_index=-100)
    return network(), own, list(zip(X.split(12), y.split(12), strict=True))


def natural_gradient(group, cases):
    """Make three steps for each case, a name and options, and return the losses, the parameters and their bits."""
    results = []
    for name, options in cases:
        model, own_loss, batches = natural_case(name)
        optimizer = fo.optim.NaturalGradient(model, own_loss, process_group=group, **options)
        losses = []
        for batch, size, first in zip(batches, BATCHES, OF_FIRST, strict=False):
            rank = None if group is None else dist.get_rank(group)
            own = {None: slice(size), 0: slice(first), 1: slice(first, size)}[rank]
            X, y = batch
            y = {key: part[own] for key, part in y.items()} if isinstance(y, dict) else y[own]
            losses.append(float(optimizer.step((X[own], y))))
        flat = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
        results.append((losses, flat, flat.tobytes(), optimizer.param_groups[0]["damping"]))
    return results


def natural_gradient_faults(group, fault):
    """Let rank 1 do something wrong in the second step; return the error, and whether a third one works."""
    rank = dist.get_rank(group)
    model, own_loss, batches = natural_case("mean")
    optimizer = fo.optim.NaturalGradient(model, own_loss, lr=0.1, damping=0.1, process_group=group)
    halves = [(X[6 * rank :][:6], y[6 * rank :][:6]) for X, y in batches[1:]] * 3
    optimizer.step(halves[0])
    before = [p.clone() for p in model.parameters()]

    def broken():
        raise OSError("the disk is full")

    if rank == 1:
        X, y = halves[1]
        halves[1] = {"data": (X * torch.nan, y), "closure": broken, "interrupt": halves[1]}.get(fault, halves[1])
    if rank == 1 and fault == "rate":
        optimizer.param_groups[0]["lr"] = 0.2
    if rank == 1 and fault == "interrupt":
        hook = model.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        optimizer.step(halves[1])
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
    else:
        text = "no error"
    untouched = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    if rank == 1 and fault == "interrupt":
        hook.remove()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step(halves[2])
    return text, untouched, torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().tobytes()
