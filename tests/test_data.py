"""The data: every form that is taken, and every one that is refused."""

import collections
import collections.abc
import dataclasses

import numpy as np
import pytest
import torch
from models import make_case
from tolerances import assert_same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherops as fo


def dense(model, data, loss=None, **options):
    return fo.FisherMCLinearOperator(model, loss or nn.CrossEntropyLoss(), data=data, **options).todense()


@pytest.fixture
def case():
    return make_case("dense", "ce", sizes=(4, 4, 2), dtype=torch.float32)


@pytest.fixture
def expected(case):
    return dense(case.model, case.data)


def arrays(case):
    return torch.cat([X for X, _ in case.data]), torch.cat([y for _, y in case.data])


class Reiterable:
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def test_a_data_loader_or_any_reiterable_gives_the_matrix_of_the_list(case, expected):
    loader = DataLoader(TensorDataset(*arrays(case)), batch_size=4)
    np.testing.assert_array_equal(dense(case.model, loader), expected)
    np.testing.assert_array_equal(dense(case.model, Reiterable(case.data)), expected)
    np.testing.assert_array_equal(dense(case.model, tuple(case.data)), expected)
    np.testing.assert_array_equal(dense(case.model, [list(batch) for batch in case.data]), expected)


def test_a_pair_of_arrays_is_cut_into_batches(case, expected):
    X, y = arrays(case)
    np.testing.assert_array_equal(dense(case.model, (X, y), batch_size=4), expected)
    np.testing.assert_array_equal(dense(case.model, [X.numpy(), y.numpy()], batch_size=4), expected)
    np.testing.assert_array_equal(dense(case.model, (X, y.numpy()), batch_size=np.int64(4)), expected)
    np.testing.assert_array_equal(dense(case.model, (X, y)), dense(case.model, [(X, y)]))


def test_numpy_floats_are_converted_to_the_precision_of_the_model(case, expected):
    X, y = arrays(case)
    X64 = X.numpy().astype(np.float64)
    np.testing.assert_array_equal(dense(case.model, (X64, y.numpy()), batch_size=4), expected)
    np.testing.assert_array_equal(dense(case.model, [(X64, y.numpy())]), dense(case.model, [(X, y)]))


class FromMapping(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, X):
        return self.body(X["a"] + X["b"]["c"])


@pytest.mark.parametrize("kind", [dict, collections.UserDict, collections.OrderedDict])
def test_mappings(case, expected, kind):
    data = [(kind(a=0.5 * X, b={"c": 0.5 * X}, note="text"), y) for X, y in case.data]
    np.testing.assert_array_equal(dense(FromMapping(case.model), data), expected)
    X, y = arrays(case)
    pair = (kind(a=0.5 * X, b={"c": 0.5 * X}), y)
    np.testing.assert_array_equal(dense(FromMapping(case.model), pair, batch_size=4), expected)


def test_tuples_named_tuples_and_other_objects(case, expected):
    Point = collections.namedtuple("Point", "left right")

    @dataclasses.dataclass
    class Graph:
        nodes: torch.Tensor

        def to(self, device):
            return Graph(self.nodes.to(device))

    class Sum(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, X):
            return self.body(X.nodes if isinstance(X, Graph) else X[0] + X[1])

    model = Sum(case.model)
    np.testing.assert_array_equal(dense(model, [((0.5 * X, 0.5 * X), y) for X, y in case.data]), expected)
    np.testing.assert_array_equal(dense(model, [(Point(0.5 * X, 0.5 * X), y) for X, y in case.data]), expected)
    assert_same(dense(model, [(Graph(X), y) for X, y in case.data]), expected, torch.float32)


def test_batch_size_fn_counts_and_num_data_checks(case, expected):
    data = [({"a": X, "b": {"c": 0 * X}}, y) for X, y in case.data]
    model = FromMapping(case.model)
    options = {"batch_size_fn": lambda X: len(X["a"]), "num_data": 10}
    np.testing.assert_array_equal(dense(model, data, **options), expected)
    with pytest.raises(ValueError, match=r"`num_data` must be the number of examples in `data`, 10, got 11"):
        dense(model, data, num_data=11)
    with pytest.raises(ValueError, match=r"`num_data` must be the number of examples in `data`, 10, got 11"):
        op = fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=data, num_data=11, check_deterministic=False)
        op @ np.zeros(op.shape[0])
    np.testing.assert_array_equal(dense(model, data, num_data=np.int64(10)), expected)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="`num_data` must be at least 1, got"):
            dense(model, data, num_data=wrong)
    for wrong in (1.5, True, "10"):
        with pytest.raises(TypeError, match="`num_data` must be an integer, got"):
            dense(model, data, num_data=wrong)
    with pytest.raises(TypeError, match=r"`batch_size_fn` must return an integer, got 2.5 for batch 0"):
        dense(model, data, batch_size_fn=lambda X: 2.5)


def test_a_generator_is_refused(case):
    for data in ((batch for batch in case.data), iter(case.data), map(tuple, case.data)):
        with pytest.raises(
            TypeError, match=r"`data` must be re-iterable, got .*Pass a list of batches or a DataLoader"
        ):
            dense(case.model, data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "`data` must be iterable, got NoneType"),
        (5, "`data` must be iterable, got int"),
        (torch.zeros(4, 3), "`data` must hold inputs and targets, got one Tensor"),
        ({"X": 1}, "`data` must hold inputs and targets, got one dict"),
        ([torch.zeros(4, 3)], r"batch 0 must be a pair \(X, y\), or .* got Tensor"),
        ([(torch.zeros(4, 3), torch.zeros(4).long(), torch.zeros(4), 1)], r"batch 0 must be a pair.*tuple of length 4"),
        (
            [(torch.zeros(4, 3), "abcd")],
            "targets y of batch 0 must be a tensor or array, .*got str",
        ),
        (
            [(torch.zeros(4, 3), ["a", "b", "c", "d"])],
            "targets y of batch 0 must be a tensor or array, .*got list. Convert them",
        ),
        ((object(), torch.zeros(4)), r"the inputs X of a pair \(X, y\) must be arrays, got object"),
        ([(np.array(["a"] * 4), torch.zeros(4).long())], "X of batch 0.*of dtype <U1"),
    ],
)
def test_data_of_the_wrong_type(case, data, message):
    with pytest.raises(TypeError, match=message):
        dense(case.model, data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "`data` must have at least one batch, got none"),
        ((torch.zeros(0, 3), torch.zeros(0).long()), "`data` must have at least one batch, got none"),
        ([(torch.zeros(0, 3), torch.zeros(0).long())], "batch 0 must have at least one example, got size 0"),
        (
            [(torch.zeros(2, 3), torch.zeros(2).long()), (torch.zeros(0, 3), torch.zeros(0).long())],
            "batch 1 must have at least one example, got size 0",
        ),
        (
            (torch.zeros(4, 3), torch.zeros(5).long()),
            r"one row for each example, got shapes \[\(4, 3\)\] and \[\(5,\)\]",
        ),
        ((torch.zeros(4, 3), torch.tensor(1)), r"one row for each example, got shapes \[\(4, 3\)\] and \[\(\)\]"),
        (
            [(torch.zeros(4, 3), torch.tensor(1))],
            r"the targets y must have a batch axis, got an array without axes \(0-d\) in batch 0",
        ),
    ],
)
def test_empty_data_and_shapes_that_do_not_fit(case, data, message):
    with pytest.raises(ValueError, match=message):
        dense(case.model, data)
    with pytest.raises(ValueError, match=message):
        dense(case.model, data, check_deterministic=False)


def test_batch_size_is_checked(case):
    X, y = arrays(case)
    for wrong in (0, -3):
        with pytest.raises(ValueError, match="`batch_size` must be at least 1, got"):
            dense(case.model, (X, y), batch_size=wrong)
    for wrong in (2.5, True):
        with pytest.raises(TypeError, match="`batch_size` must be an integer, got"):
            dense(case.model, (X, y), batch_size=wrong)
    with pytest.raises(ValueError, match="got `data` of type list. Leave it out if the data are already in batches"):
        dense(case.model, case.data, batch_size=2)


def test_shuffled_loaders_are_found_at_once(case):
    loader = DataLoader(TensorDataset(*arrays(case)), batch_size=4, shuffle=True)
    with pytest.raises(
        RuntimeError, match=r"changed between two passes: batch 0 .*shuffle=False.*let the loader yield \(X, y, index\)"
    ):
        dense(case.model, loader)


def test_without_the_check_a_shuffled_loader_has_one_fixed_order(case):
    loader = DataLoader(TensorDataset(*arrays(case)), batch_size=4, shuffle=True)
    op = fo.FisherMCLinearOperator(case.model, nn.CrossEntropyLoss(), data=loader, check_deterministic=False)
    first = op @ np.ones(op.shape[0])
    torch.rand(5)
    np.testing.assert_array_equal(op @ np.ones(op.shape[0]), first)


class Changing:
    """A data set whose pass number `when` is changed by a function."""

    def __init__(self, data, when, change):
        self.data, self.when, self.change, self.passes = data, when, change, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.change(self.data) if self.passes == self.when else self.data)


def swap_two_rows(data):
    X, y = data[1]
    order = [1, 0, *range(2, len(X))]
    return [data[0], (X[order], y[order]), *data[2:]]


CHANGES = {
    "another number": (lambda data: [data[0], (data[1][0] + 1e-7, data[1][1]), data[2]], "batch 1 is not the one"),
    "another label": (lambda data: [data[0], (data[1][0], (data[1][1] + 1) % 3), data[2]], "batch 1 is not the one"),
    "rows swapped": (swap_two_rows, "batch 1 is not the one"),
    "another size": (lambda data: [data[0], tuple(t[:-1] for t in data[1]), data[2]], "batch 1 is not the one"),
    "another dtype": (lambda data: [data[0], (data[1][0].double(), data[1][1]), data[2]], "batch 1 is not the one"),
    "a batch less": (lambda data: data[:2], "read 3 batches, this one only 2"),
    "a batch more": (lambda data: [*data, data[0]], "read 3 batches, this one has more"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", [2, 3])
def test_data_that_change_are_found_in_the_pass_where_they_do(case, change, when):
    function, message = CHANGES[change]
    data = Changing(case.data, when, function)
    if when == 2:
        with pytest.raises(RuntimeError, match=message):
            fo.FisherMCLinearOperator(case.model, nn.CrossEntropyLoss(), data=data)
        return
    op = fo.FisherMCLinearOperator(case.model, nn.CrossEntropyLoss(), data=data)
    with pytest.raises(RuntimeError, match=message):
        op @ np.ones(op.shape[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.bool, torch.int16])
@pytest.mark.parametrize("shift", [1, 7, 32, 2048])
def test_a_permutation_of_the_data_is_found(dtype, shift):
    X = torch.randint(2, (4096, 1)).to(dtype)
    loss, y = nn.MSELoss(), torch.zeros(4096, 1)

    class Scale(nn.Linear):
        def forward(self, X):
            return super().forward(X.float())

    data = Changing([(X, y)], 3, lambda data: [(X.roll(shift, 0), y)])
    op = fo.FisherMCLinearOperator(Scale(1, 1), loss, data=data)
    with pytest.raises(RuntimeError, match="batch 0 is not the one"):
        op @ np.ones(2)


@pytest.mark.parametrize("kind", ["memory shared with NumPy", ".data"])
def test_changes_that_torch_does_not_count_are_found(case, kind):
    X, y = arrays(case)
    op = fo.FisherMCLinearOperator(case.model, nn.CrossEntropyLoss(), data=[(X, y)])
    if kind == ".data":
        X.data.add_(1)
    else:
        X.numpy()[0] += 1
    with pytest.raises(RuntimeError, match="batch 0 is not the one"):
        op @ np.ones(op.shape[0])


class Wrapped(collections.abc.MutableMapping):
    """A mapping whose copies share their contents."""

    def __init__(self, **items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __setitem__(self, key, value):
        self.items_[key] = value

    def __delitem__(self, key):
        del self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


def test_a_mapping_of_the_user_is_not_written_to(case, expected):
    data = [(Wrapped(a=(0.5 * X).numpy().astype(np.float64), b={"c": 0.5 * X}), y) for X, y in case.data]
    assert_same(dense(FromMapping(case.model), data), expected, torch.float32)
    for (X, _), (original, _) in zip(data, case.data, strict=True):
        assert X["a"].dtype == np.float64
        assert X["a"].shape == tuple(original.shape)


def test_packed_sequences():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(2, 3), nn.Linear(3, 2)

        def forward(self, X):
            return self.head(self.gru(X)[1][0])

    sequences = [torch.randn(n, 2) for n in (4, 3, 1)]
    X = nn.utils.rnn.pack_sequence(sequences)
    model, y = Packed(), torch.zeros(3, 2)
    op = fo.FisherMCLinearOperator(model, nn.MSELoss(), data=[(X, y)], sampler="stream", cache="linearization")
    import oracle

    expected = oracle.monte_carlo_fisher(model, nn.MSELoss(), list(model.parameters()), [(X, y)])
    assert_same(op.todense(), expected, torch.float32)


def test_a_source_that_is_empty_the_second_time_is_called_so(case):
    data = Changing(case.data, 2, lambda data: [])
    with pytest.raises(RuntimeError, match="read 3 batches, this one only 0"):
        dense(case.model, data)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_arrays_changed_in_place_are_found(case, library):
    X, y = arrays(case)
    X = X.numpy() if library == "numpy" else X
    op, plain = (
        fo.FisherMCLinearOperator(case.model, nn.CrossEntropyLoss(), data=(X, y), batch_size=4, cache=cache)
        for cache in ("auto", "none")
    )
    v = np.ones(op.shape[0], op.dtype)
    first = op @ v, plain @ v
    X += 1
    with pytest.raises(RuntimeError, match="batch 0 is not the one"):
        plain @ v
    np.testing.assert_array_equal(op @ v, first[0])  # what is kept stays the same matrix
    op.refresh()
    with pytest.raises(RuntimeError, match="batch 0 is not the one"):
        op @ v


def test_the_progress_bar_is_on_stderr_and_silent_when_off(case, capfd):
    op = fo.FisherMCLinearOperator(case.model, nn.CrossEntropyLoss(), data=case.data, progressbar=False)
    op @ np.ones(op.shape[0])
    assert capfd.readouterr() == ("", "")
    op = fo.FisherMCLinearOperator(case.model, nn.CrossEntropyLoss(), data=case.data, progressbar=True)
    op @ np.ones(op.shape[0])
    out, err = capfd.readouterr()
    assert out == ""
    assert "FisherMCLinearOperator product" in err
    assert "batch" in err


@pytest.mark.parametrize("kind", [fo.FisherLinearOperator, fo.EmpiricalFisherLinearOperator])
def test_data_that_changed_and_were_put_back_have_their_order(kind):
    """What a pass that failed has seen of the order says nothing about the data."""
    torch.manual_seed(0)
    X, y = torch.randn(7, 4), torch.randint(3, (7,))
    own = X.clone()
    op = kind(nn.Linear(4, 3), nn.CrossEntropyLoss(), data=(own, y), cache="none")
    v = np.ones(15, np.float32)
    before, rows = op @ v, op.scores.rows()
    own += 1
    for _ in range(2):
        with pytest.raises(RuntimeError, match="`data` must be the same in every pass"):
            op @ v
    own.copy_(X)
    np.testing.assert_array_equal(op @ v, before)
    np.testing.assert_array_equal(op.scores.rows(), rows)
