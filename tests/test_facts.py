"""What was learned from a batch is used again for batches with the same graph, and for those only."""

import numpy as np
import oracle
import pytest
import torch
from long_form import Counts, counted, spoil_facts
from models import ARCHITECTURES, LOSSES, make_case
from tolerances import assert_same
from torch import nn
from torch.nn import functional

import fisherops as fo
from fisherops.problem.separation import keeps_examples_apart

# Number of examples, positions, classes, features and hidden units: no axis is known by its length.
SIZE = 4

SUM = nn.CrossEntropyLoss(reduction="sum")
OPERATORS = {
    "mc": lambda *args, **options: fo.FisherMCLinearOperator(*args, sampler="stream", **options),
    "exact": fo.FisherLinearOperator,
    "empirical": fo.EmpiricalFisherLinearOperator,
}


def random(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- The truth: loops over gradients --------------------------------------------------------------


def gradient(scalar, params):
    parts = torch.autograd.grad(scalar, params, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(parts, params, strict=True)])


def score_rows(kind, model, data, rows):
    """Return G with F = GᵀG, for logits with the classes second: the model is evaluated on whole batches."""
    result, params = [], list(model.parameters())
    generator = torch.Generator().manual_seed(2147483647)
    for X, y in data:
        terms = model(X).movedim(1, -1).reshape(len(X), -1, SIZE)  # (N, T, C)
        if kind == "mc":
            y = oracle.draw_targets(SUM, terms.detach().reshape(-1, SIZE), 1, generator)
        y = y.reshape(terms.shape[:2])
        for n in range(len(X)):
            if kind == "exact":  # independent terms with mean zero: the same for sums over terms
                for z in terms[n]:
                    p = z.detach().softmax(0)
                    S = p.sqrt().diag() - p.outer(p.sqrt())
                    result += [gradient((s * z).sum(), params) for s in S.T]
                continue
            pairs = zip(terms[n], y[n], strict=True)
            own = [gradient(functional.cross_entropy(z, label), params) for z, label in pairs]
            result += own if rows == "term" else [torch.stack(own).sum(0)]
    return torch.stack(result).numpy()


# ---- Models in which no axis is known by its length -----------------------------------------------


class Body(nn.Module):
    """Two layers with the classes second; subclasses say where positions lie, by data X (N, T, features)."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def inner(self, X):
        return torch.tanh(self.first(X))

    def forward(self, X):
        return self.logits(X).movedim(-1, 1)


class BatchFirst(Body):
    def logits(self, X):
        return self.head(self.inner(X))


class PositionsFirst(Body):
    def logits(self, X):
        return self.head(self.inner(X.transpose(0, 1))).transpose(0, 1)


class PositionsFirstByMovedim(Body):
    def logits(self, X):
        return self.head(self.inner(X.movedim(0, 1))).movedim(1, 0)


class TwoOrders(Body):
    def logits(self, X):
        return self.head(self.inner(X.transpose(0, 1)).transpose(0, 1))


class ThreeOrders(Body):
    """Positions first in one layer, features first in the next, batch first in the last."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(random(SIZE, SIZE, seed=11))

    def logits(self, X):
        h = self.inner(X.transpose(0, 1))
        h = torch.einsum("oi,itn->otn", self.weight, h.permute(2, 0, 1))
        return self.head(torch.tanh(h).permute(2, 1, 0))


class ClassesSecond(nn.Module):
    """Convolutions over positions, whose channels are second."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv1d(SIZE, SIZE, 3, padding=1), nn.Conv1d(SIZE, SIZE, 1)

    def forward(self, X):
        return self.head(torch.tanh(self.first(X.transpose(1, 2))))


class FeaturesFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = (nn.Parameter(random(SIZE, SIZE, seed=seed)) for seed in (12, 13))
        self.bias = nn.Parameter(random(SIZE, 1, 1, seed=14))

    def forward(self, X):
        h = torch.tanh(torch.einsum("oi,int->ont", self.first, X.permute(2, 0, 1)) + self.bias)
        return torch.einsum("oi,int->ont", self.head, h).transpose(0, 1)


class ByAttribute(Body):
    """Has positions first if an attribute is set."""

    swaps = False

    def logits(self, X):
        X = X.transpose(0, 1) if self.swaps else X
        h = self.inner(X)
        return self.head(h.transpose(0, 1) if self.swaps else h)


class ByBranch(Body):
    """Has positions first in batches with a positive mean."""

    def logits(self, X):
        if X.mean() < 0:
            return self.head(self.inner(X))
        return self.head(self.inner(X.transpose(0, 1)).transpose(0, 1))


class ByIndex(Body):
    """Swaps examples and positions by index tensors, in batches with a positive mean."""

    def logits(self, X):
        i, j = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        i, j = (i, j) if X.mean() < 0 else (j, i)
        return self.head(self.inner(X)[i, j])[i, j]


class Sorted(Body):
    """Sorts examples by their data between the two layers, as packing does."""

    def logits(self, X):
        order = X[:, 0, 0].argsort()
        return self.head(self.inner(X)[order])[order.argsort()]


class Gathered(Body):
    def logits(self, X):
        order = X[:, 0, 0].argsort()
        index = order[:, None, None].expand(X.shape)
        return self.head(self.inner(X).gather(0, index)).gather(0, index.argsort(0))


class Dispatched(Body):
    """Sorts examples by a product with a matrix that depends on the data, as mixtures of experts do."""

    def logits(self, X):
        P = functional.one_hot(X[:, 0, 0].argsort(), SIZE).to(X.dtype)
        return torch.einsum("mn,mtc->ntc", P, self.head(torch.einsum("mn,ntc->mtc", P, self.inner(X))))


class Gated(Body):
    """Couples examples by a mean that passes a gate in batches with a positive mean only."""

    def logits(self, X):
        h = self.inner(X)
        return self.head(h + torch.relu(X.mean().sign()) * h.mean(0))


class Masked(Body):
    """Takes the values of another example where a mask says so."""

    def logits(self, X):
        h = self.inner(X)
        return self.head(torch.where(X.mean() < 0, h, h.roll(1, 0)))


class Shifted(Body):
    """Moves examples by a padding that depends on the data and leaves the shapes as they are."""

    def logits(self, X):
        k = int(X.mean() > 0)
        return self.head(functional.pad(self.inner(X), (0, 0, 0, 0, k, -k)))


class Dead(Body):
    """Has positions first in a layer to which no gradient flows back in batches with a negative mean."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(SIZE, SIZE)

    def logits(self, X):
        other = self.other(X.transpose(0, 1)).transpose(0, 1)
        return self.head(self.inner(X)) + torch.relu(X.mean().sign()) * other


class Calls(Body):
    """Has layers in two orders, which are called in either order by the data."""

    def late(self, X):
        return self.head(X.transpose(0, 1)).transpose(0, 1)

    def logits(self, X):
        if X.mean() < 0:
            h = self.inner(X)
            return h + self.late(X)
        late = self.late(X)
        return self.inner(X) + late


class Unused(Calls):
    """Calls a layer once more in some batches, for an output that is not used."""

    def logits(self, X):
        if X.mean() > 0:
            self.first(X[:1])
        h = self.inner(X)
        return h + self.late(X)


FIXED = [BatchFirst, PositionsFirst, PositionsFirstByMovedim, TwoOrders, ThreeOrders, ClassesSecond, FeaturesFirst, ByAttribute]  # fmt: skip
ROUTED = [ByIndex, Sorted, Gathered, Dispatched, Gated, Masked]
OTHER = [ByBranch, Shifted, Dead, Calls, Unused]


def make(cls):
    torch.manual_seed(0)
    return cls().double().eval()


def make_batches(n=SIZE):
    """Return batches of which the first is sorted and has a negative mean, and the others are not and have not."""
    result = []
    for seed, sign in ((1, -1), (2, 1), (3, 1)):
        X = random(n, SIZE, SIZE, seed=seed)
        X = sign * (X - X.mean()) + 0.1 * sign
        order = X[:, 0, 0].argsort(descending=sign > 0)
        result.append((X[order], torch.randint(SIZE, (n, SIZE), generator=torch.Generator().manual_seed(seed))))
    return result


def check(op, G, has_ordered_rows):
    F = G.T @ G
    assert_same(op.todense(), F, torch.float64)
    assert_same(op @ np.eye(len(F)), F, torch.float64)
    assert_same(op.diagonal(), F.diagonal(), torch.float64)
    own = op.scores @ np.eye(len(F))
    assert_same(own if has_ordered_rows else own.T @ own, G if has_ordered_rows else F, torch.float64)


CHOICES = {
    "mc": [("term", "scores"), ("datum", "factors"), ("datum", "none")],
    "exact": [("term", "auto"), ("term", "factors"), ("term", "none")],
    "empirical": [(rows, cache) for rows in ("term", "datum") for cache in ("auto", "scores", "factors", "none")],
}


@pytest.mark.filterwarnings("ignore::fisherops.PlanWarning")
@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("cls", [*FIXED, *ROUTED, *OTHER], ids=lambda cls: cls.__name__)
def test_every_row_is_that_of_its_example(cls, kind):
    model, data = make(cls), make_batches()[:2]
    truth = {rows: score_rows(kind, model, data, rows) for rows in dict(CHOICES[kind])}
    for rows, cache in CHOICES[kind]:
        options = {} if kind == "exact" else {"rows": rows}
        op = OPERATORS[kind](model, SUM, data=data, cache=cache, **options)
        check(op, truth[rows], has_ordered_rows=kind != "exact")


@pytest.mark.parametrize("cls", FIXED, ids=lambda cls: cls.__name__)
def test_facts_are_used_where_shapes_say_where_examples_are(cls):
    assert known_builds(make(cls), make_batches()) == (3, 2)


@pytest.mark.filterwarnings("ignore::fisherops.PlanWarning")
@pytest.mark.parametrize("cls", ROUTED, ids=lambda cls: cls.__name__)
def test_facts_are_not_used_where_values_say_where_examples_are(cls):
    assert known_builds(make(cls), make_batches()) == (3, 0)


@pytest.mark.parametrize("cls", [Calls, Unused], ids=lambda cls: cls.__name__)
def test_facts_are_those_of_a_graph_and_not_of_the_order_of_calls(cls):
    assert known_builds(make(cls), make_batches()) == (3, 2)


def test_facts_of_a_branch_are_not_those_of_another():
    first, second, third = make_batches()
    assert known_builds(make(ByBranch), [first, second]) == (2, 0)
    assert known_builds(make(ByBranch), [first, second, third, first]) == (4, 2)


def test_an_attribute_that_moves_examples_is_seen():
    model, data = make(ByAttribute), make_batches()
    op = fo.EmpiricalFisherLinearOperator(model, SUM, data=data, cache="none")
    truth = {}
    for swaps in (False, True, False):
        model.swaps = swaps
        truth[swaps] = score_rows("empirical", model, data, "term")
        check(op, truth[swaps], has_ordered_rows=True)
    assert_same(truth[True], truth[False], torch.float64)


def known_builds(model, data, loss=SUM, passes=1):
    """Return how many builds there were, and how many used known facts."""
    counts = Counts()
    op = fo.EmpiricalFisherLinearOperator(model, loss, data=data, cache="scores", check_deterministic=False)
    with counted(counts):
        for _ in range(passes):
            op.refresh()
            op @ np.ones(op.shape[0])
    return counts.builds, counts.known_builds


# ---- The hit rate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_batch_of_shapes_that_were_seen_uses_facts(architecture, loss):
    case = make_case(architecture, loss, sizes=(4, 4, 3, 4, 3, 5))
    assert known_builds(case.model, case.data, case.loss) == (6, 3)
    assert known_builds(case.model, case.data[:1], case.loss) == (1, 0), "an operator has facts of its own"
    # Facts are forgotten with the structure of the model only.
    assert known_builds(case.model, case.data, case.loss, passes=2) == (12, 9)


def test_facts_are_by_the_number_of_examples():
    """A batch of another size has another graph; one with another number of vectors has not."""
    data = [batch for n in (4, 3, 4, 1, 3, 1, 2) for batch in make_batches(n)[:1]]
    assert known_builds(make(PositionsFirst), data) == (7, 3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_modes_are_agreed_on_once_for_each_shape(architecture):
    case = make_case(architecture, "mse", sizes=(4, 4, 3, 4))
    for cache in ("linearization", "none"):
        op = fo.FisherLinearOperator(case.model, case.loss, data=case.data, cache=cache, check_deterministic=False)
        counts = Counts()
        with counted(counts):
            op @ np.ones(op.shape[0])
        assert (counts.modes, counts.known_modes) == (4, 2)


def test_a_comparison_with_nothing_known_finds_wrong_facts():
    """The option `--probe-every-batch` must be able to fail."""
    op = fo.EmpiricalFisherLinearOperator(make(TwoOrders), SUM, data=make_batches(), cache="factors")
    with counted(Counts(), compares=True):
        op @ np.ones(op.shape[0])
        spoil_facts(op)
        op.refresh()
        with pytest.raises(AssertionError, match="rows differ: linear of first.weight"):
            op @ np.ones(op.shape[0])


# ---- Operations that keep examples apart ----------------------------------------------------------

N = 4
WEIGHT = random(N, N, seed=21)

# Functions of u (4, 4, 4), the examples along the first axis: (T, C) with the terms of each example together.
APART = {
    "view": lambda u: u.reshape(16, 4),
    "transposes": lambda u: torch.tanh(u.transpose(0, 1)).permute(2, 1, 0).transpose(0, 1).reshape(16, 4),
    "transposed rows": lambda u: u.transpose(0, 1).reshape(4, 16).reshape(4, 4, 4).transpose(0, 1).reshape(16, 4),
    "softmax": lambda u: u.softmax(-1).log_softmax(1).reshape(16, 4),
    "mean": lambda u: u.mean(1),
    "sum": lambda u: u.sum(-1, keepdim=True).expand(4, 4, 4).amax(1),
    "moments": lambda u: torch.stack([u.var(1), u.logsumexp(1), u.norm(dim=1), u.max(1)[0]], 1).reshape(16, 4),
    "selection": lambda u: u[:, 0] + u.unbind(1)[1] + u.split(2, 1)[1][:, 0] + u[:, -1:].squeeze(1),
    "cat": lambda u: torch.cat([u, u.flip(2)], 1).reshape(32, 4),
    "products": lambda u: u @ WEIGHT + torch.addmm(u[:, 1], u[:, 0], WEIGHT)[:, None],
    "batched products": lambda u: u @ u.transpose(1, 2),
    "broadcasting": lambda u: u * u[:, :1] + u.mean(2, keepdim=True),
    "cumulative sums": lambda u: u.cumsum(1),
    "layer norm": lambda u: functional.layer_norm(u, (4,)),
    "group norm": lambda u: functional.group_norm(u, 2),
    "convolution": lambda u: functional.conv1d(functional.pad(u, (1, 1)), random(4, 4, 3, seed=22)),
    "pooling": lambda u: functional.max_pool2d(u[:, None], 2).flatten(1),
    "attention": lambda u: functional.scaled_dot_product_attention(*[u.reshape(4, 2, 2, 4)] * 3),
    "whole slice": lambda u: u[0:],
}

# The examples along the first axis, too, which all of these combine, move or select.
MIXED = {
    "mean": lambda u: u + u.mean(0),
    "full mean": lambda u: u + u.mean(),
    "softmax": lambda u: u.softmax(0),
    "roll": lambda u: u.roll(1, 0),
    "flip": lambda u: u.flip(0),
    "slices": lambda u: torch.cat([u[2:], u[:2]]),
    "index": lambda u: u[torch.tensor([0, 1, 2, 3])],
    "mask": lambda u: u + u[torch.ones(4, dtype=torch.bool)],
    "gather": lambda u: u.gather(0, torch.arange(4)[:, None, None].expand(4, 4, 4)),
    "sort": lambda u: u.sort(0)[0],
    "transpose": lambda u: u + u.transpose(0, 1),
    "product": lambda u: torch.einsum("mn,ntc->mtc", torch.eye(4, dtype=u.dtype), u),
    "gram": lambda u: (u[:, 0] @ u[:, 0].T)[:, None] + u,
    "attention": lambda u: functional.scaled_dot_product_attention(*[u.transpose(0, 1)] * 3).transpose(0, 1),
    "broadcasting": lambda u: u[:, None] * u[None],
    "cumulative sums": lambda u: u.cumsum(0),
    "convolution": lambda u: functional.conv1d(u.transpose(0, 1), torch.eye(4, dtype=u.dtype)[..., None]).transpose(
        0, 1
    ),
    "layer norm": lambda u: functional.layer_norm(u, (4, 4, 4)),
    "padding": lambda u: functional.pad(u, (0, 0, 0, 0, 1, -1)),
}


def traced(function, X):
    """Return whether the examples are followed, and the places (N, elements) that the outputs of each depend on."""
    u = X.clone().requires_grad_() * 1
    f = function(u)
    f = f.reshape(-1, f.shape[-1])
    gradients = [torch.autograd.grad(own.square().sum(), u, retain_graph=True)[0] for own in f.chunk(N)]
    return keeps_examples_apart(f, N, {u.grad_fn}), torch.stack(gradients).flatten(1) != 0


@pytest.mark.parametrize("name", APART)
def test_an_operation_keeps_examples_apart(name):
    is_apart, places = traced(APART[name], random(4, 4, 4, seed=23))
    assert is_apart
    assert (places.sum(0) <= 1).all()


@pytest.mark.parametrize("name", MIXED)
def test_an_operation_may_mix_examples(name):
    assert not traced(MIXED[name], random(4, 4, 4, seed=24))[0]


def test_two_paths_must_agree_on_the_examples():
    """The examples are along the first axis in one path and along the second in the other."""
    assert traced(lambda u: torch.tanh(u.transpose(0, 1)).transpose(0, 1) + u, random(4, 4, 4, seed=25))[0]
    assert not traced(lambda u: torch.tanh(u.transpose(0, 1)) + u, random(4, 4, 4, seed=25))[0]
