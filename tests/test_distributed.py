"""Operators whose data are divided among processes: the same matrix, and no waiting in vain."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from rank_jobs import OPERATORS, everything, loss, natural_gradient, network, sharded_case
from ranks import DeathError, JobError, Processes

import fisherops as fo
from fisherops import linalg
from fisherops.parallel.scores import DistributedScores
from fisherops.score_matrix import ScoreMatrix


@pytest.fixture(scope="module")
def two():
    with Processes(2) as processes:
        yield processes


@pytest.fixture(scope="module")
def four():
    with Processes(4) as processes:
        yield processes


def alone(kind="mc", **options):
    if kind == "mc":
        options = {"mc_samples": 2, "seed": 5, **options}
    return OPERATORS[kind](network(), loss(), data=everything(), **options)


SPLITS = [
    "contiguous", "strided", "arrays", "batches", "dataset", "loader", "own", "nothing", "sampler", "shuffled sampler",
]  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [2, 4])
def test_the_matrix_is_that_of_one_process(size, split, request):
    processes = request.getfixturevalue({2: "two", 4: "four"}[size])
    F = alone().todense()
    V = np.linspace(-1, 1, 3 * len(F)).reshape(-1, 3)
    for dense, product, diagonal, trace, columns in processes.results("dense", "mc", split, {}):
        np.testing.assert_allclose(columns, F @ V, atol=1e-13)
        np.testing.assert_allclose(dense, F, atol=1e-14)
        np.testing.assert_allclose(product, F, atol=1e-14)
        np.testing.assert_allclose(diagonal, np.diag(F), atol=1e-14)
        np.testing.assert_allclose(trace, np.trace(F), rtol=1e-12)


@pytest.mark.parametrize("split", ["contiguous", "nothing"])
def test_the_gradient_is_summed_over_ranks(two, split):
    expected = alone("exact").gradient()
    for gradient in two.results("gradient", "exact", split):
        np.testing.assert_allclose(gradient, expected, atol=1e-14)


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("cache", ["auto", "scores", "factors", "linearization", "none"])
def test_every_operator_and_form(two, kind, cache):
    F = alone(kind).todense()
    for dense, product, *_ in two.results("dense", kind, "strided", {"cache": cache}):
        np.testing.assert_allclose(dense, F, atol=1e-14)
        np.testing.assert_allclose(product, F, atol=1e-14)


@pytest.mark.parametrize("options", [{"check_deterministic": False}, {"max_memory": 20_000}, {"rows": "datum"}])
def test_options(four, options):
    F = alone(**options).todense()
    for dense, product, *_ in four.results("dense", "mc", "strided", options):
        np.testing.assert_allclose(dense, F, atol=1e-14)
        np.testing.assert_allclose(product, F, atol=1e-14)


def test_a_stream_draws_other_numbers_on_each_rank(two):
    first, *others = two.results("dense", "mc", "own", {"sampler": "stream"})
    exact = alone("exact").todense()
    assert np.linalg.norm(first[0] - exact) < np.linalg.norm(exact)
    for other in others:
        np.testing.assert_array_equal(first[1], other[1])


@pytest.mark.parametrize("cache", ["factors", "scores", "none"])
def test_every_rank_gets_the_same_bits_and_no_digit_is_lost(four, cache):
    answers = four.results("same_bits", cache)
    assert len({bits for bits, _ in answers}) == 1
    X, y = everything(torch.float32, 500)
    op = fo.FisherMCLinearOperator(
        network(torch.float32), torch.nn.CrossEntropyLoss(), data=(X, y), batch_size=64, dtype="float64"
    )
    v = torch.randn(op.shape[0], 3, generator=torch.Generator().manual_seed(2))[:, 0]
    exact = (op @ v.double()).numpy()
    eps = np.finfo(np.float32).eps
    assert np.linalg.norm(answers[0][1] - exact) < 20 * eps * np.linalg.norm(exact)


CACHED = ["product", "begin", "product", "begin", "wait", "product", "begin", "wait", "wait"]
READ = ["product", "read", "begin", "begin", "wait", "begin", "wait", "wait"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [("cached", [CACHED, CACHED]), ("not cached", [READ, READ]), ("cached on one rank", [CACHED, READ])],
)
def test_the_sum_of_a_block_is_under_way_while_the_next_is_multiplied(two, where, expected):
    F = alone().todense()
    V = np.random.default_rng(0).standard_normal((len(F), 20))
    for (whole, product, events), own in zip(two.results("blocks", where), expected, strict=True):
        np.testing.assert_allclose(product, F @ V, atol=1e-13)
        np.testing.assert_allclose(whole, product, atol=1e-13)
        assert events == own


def test_what_several_processes_share_has_all_that_a_score_matrix_offers():
    # What a wrapper asks of the score matrix of one rank, and not what others ask of a score matrix.
    of_one_rank = {
        "reader", "problem", "counts", "check", "is_current", "is_cached", "materialized",
        "sum_of_squares", "sum_of_diagonals", "sum_of_gradients", "sum_of_moments", "sum_of_squared_norms", "find",
    }  # fmt: skip
    inherited = {"to", "blocks_of_gram"}  # is refused, and goes by rows and products
    offered = {name for name in vars(ScoreMatrix) if not name.startswith("_")} - of_one_rank - inherited
    assert offered <= set(vars(DistributedScores))
    assert inherited <= set(dir(DistributedScores))


@pytest.mark.parametrize(
    ("cache", "split"), [("auto", "contiguous"), ("factors", "contiguous"), ("none", "contiguous"), ("auto", "nothing")]
)
def test_the_score_matrix_is_divided_by_rows(four, cache, split):
    F = alone().todense()
    for shape, dense, applied, transposed, gram in four.results("rows", cache, split):
        assert shape == dense.shape
        np.testing.assert_allclose(dense.T @ dense, F, atol=1e-14)
        for difference in (applied, transposed, gram):
            np.testing.assert_allclose(difference, 0, atol=1e-13)


@pytest.mark.parametrize(
    ("cache", "other_cache", "split"),
    [
        ("auto", "auto", "strided"),
        ("scores", "none", "strided"),
        ("none", "auto", "strided"),
        ("none", "none", "weights"),
        ("factors", "scores", "nothing"),
    ],
)
def test_other_data_are_divided_too(two, cache, other_cache, split):
    X, y = everything()
    weights = np.arange(9.0) if split == "weights" else None
    expected = alone().scores.on((X[:9], y[:9]), kind="empirical", sample_weight=weights).todense()
    for dense, datum, differences in two.results("other_data", cache, other_cache, split):
        np.testing.assert_array_equal(np.sort(datum), np.arange(9))
        np.testing.assert_allclose(dense, expected[datum], rtol=1e-10, atol=1e-14)
        for difference in differences:
            np.testing.assert_allclose(difference, 0, atol=1e-11)


@pytest.mark.parametrize("method", ["dual", "dense", "primal"])
def test_damped_inverses_and_draws(two, method):
    results = two.results("damped_inverses", method)
    for whole, diagonal, draws in results:
        np.testing.assert_allclose(whole, 0, atol=1e-7)
        np.testing.assert_allclose(diagonal, 0, atol=1e-7)
        np.testing.assert_array_equal(draws, results[0][2])


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_the_rows_of_all_ranks_are_saved(two, cache, tmp_path):
    for G, S, datum, expected, files in two.results("stored", cache, str(tmp_path)):
        np.testing.assert_allclose(S, G, atol=1e-14)
        np.testing.assert_array_equal(datum, expected)
        assert "G.pt" in files


def test_there_may_be_no_other_data(two):
    D = alone().shape[0]
    assert two.results("no_other_data") == [((0, D), (0, 0))] * 2


def test_scipys_solvers_run_in_lockstep(two):
    op = alone()
    v0 = np.ones(op.shape[0])
    for values, x, info, singular in two.results("scipy_solvers"):
        np.testing.assert_allclose(values, sla.eigsh(op, k=4, v0=v0)[0], rtol=1e-9)
        np.testing.assert_allclose(x, np.linalg.solve(op.todense() + 1e-2 * np.eye(len(v0)), v0), atol=1e-7)
        assert info == 0
        np.testing.assert_allclose(np.sort(singular) ** 2, values[-3:], rtol=1e-9)


@pytest.mark.parametrize("method", ["dual", "dense", "primal", "auto"])
def test_linear_algebra(two, method):
    op = alone()
    F, b = op.todense(), np.linspace(-1, 1, op.shape[0])
    spectrum = np.linalg.eigvalsh(F)
    damped = F + 1e-2 * np.eye(len(F))
    for values, residuals, way, x, inverse, log, dimension in two.results("algebra", method):
        np.testing.assert_allclose(values, spectrum[-4:], rtol=1e-9)
        assert residuals.max() < 1e-9
        assert way == method or method == "auto"
        np.testing.assert_allclose(x, np.linalg.solve(damped, b), atol=1e-7)
        np.testing.assert_allclose(inverse, np.linalg.solve(damped, b), atol=1e-7)
        np.testing.assert_allclose(log, np.linalg.slogdet(damped)[1], rtol=1e-9)
        np.testing.assert_allclose(dimension, (spectrum / (spectrum + 1e-2)).sum(), rtol=1e-9)


@pytest.mark.parametrize("method", ["alone", "damped"])
def test_bounds(two, method):
    op = fo.FisherLinearOperator(network(), torch.nn.CrossEntropyLoss(reduction="sum"), data=everything())
    expected = linalg.crlb(op.damped(1e-2) if method == "damped" else op, "0.bias")
    for bounds in two.results("bounds", method):
        np.testing.assert_allclose(bounds.covariance, expected.covariance, rtol=1e-8)
        assert bounds.nullity == expected.nullity


@pytest.mark.parametrize("cache", ["factors", "linearization"])
def test_other_methods(four, cache):
    op = alone()
    again = op.resample(9)
    expected = (
        op.standard_error(np.ones(op.shape[0])),
        op.trace(),
        again.trace(),
        op.trace(),
        np.linalg.norm(op.todense()),
    )
    for answer in four.results("other_methods", cache):
        np.testing.assert_allclose(answer, expected, rtol=1e-9)


def test_a_mesh_is_taken_and_nothing_is_pickled(two):
    for difference, text in two.results("mesh"):
        assert difference < 1e-15
        assert "cannot be pickled" in text


def test_parameters_are_followed(two):
    for before, after in two.results("follows"):
        assert before != after
        assert (before, after) == two.results("follows")[0]


def test_checkpoints_are_resumed_by_another_number_of_processes(two, four, tmp_path):
    path = str(tmp_path / "eigsh.npz")
    values, products = two.results("interrupted", str(tmp_path / "other.npz"), 0)[0]
    assert four.results("interrupted", path, 12) == [None] * 4
    for found, products_found in two.results("interrupted", path, 0):
        np.testing.assert_allclose(found, values, rtol=1e-12)
        assert abs(products_found - products) <= 10  # rounding may ask for another cycle
    path = str(tmp_path / "solve.npz")
    x, _ = two.results("solved", str(tmp_path / "another.npz"), 0)[0]
    _, iterations = four.results("solved", str(tmp_path / "whole.npz"), 0)[0]  # two and four differ in rounding
    assert two.results("solved", path, 10) == [None] * 2
    for found, iterations_found in four.results("solved", path, 0):
        np.testing.assert_allclose(found, x, rtol=1e-6, atol=1e-6 * abs(x).max())
        assert abs(iterations_found - iterations) <= 1


def test_a_damaged_checkpoint_is_refused_on_all_ranks(two, tmp_path):
    path = tmp_path / "eigsh.npz"
    path.write_bytes(b"nothing")
    for answer in two.run("interrupted", str(path), 0):
        assert isinstance(answer, JobError)
        assert "damaged" in answer.text


# ---- Ranks that do not do the same -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("seed", "seed is 8 on rank 0, 7 on rank 1"),
        ("parameters", "checksum of the parameters is"),
        ("shapes", "shapes of the parameters is"),
        ("num_data", "num_data is 38 on rank 0, 37 on rank 1"),
        ("total", "`num_data` must be the number of examples in `data`, 37, got 38"),
        ("indices", "the indices of all ranks must be distinct, got 4 on rank 0 and on rank 1"),
        ("some without indices", "the batches of all ranks must be"),
        ("sampler", "DistributedSampler is of rank"),
        ("vectors", "the checksum of the vectors .*v0 or rng"),
        ("permuted vectors", "the checksum of the vectors .*v0 or rng"),
        ("permuted columns", "the checksum of the vectors .*v0 or rng"),
        ("columns", "the number of columns is 3 on rank 0, 2 on rank 1"),
        ("operators", r"product of operator \d+ on rank 0, product of operator \d+ on rank 1"),
        ("calls", r"product of operator (\d+) on rank 0, trace of operator \1 on rank 1"),
        ("changed parameters", "parameters on rank 1|trace of operator"),
    ],
)
def test_ranks_that_disagree_are_told_how(two, what, text):
    started = two.run("disagree", what, seconds=50)
    for answer in started:
        assert isinstance(answer, JobError), answer
        assert re.search(text, answer.text), answer.text
    # and the processes go on
    assert two.results("recover")[0] == two.results("recover")[1]


def test_products_on_a_device_wait_for_nothing(two):
    for waits, error in two.results("on_a_device", "same vectors"):
        assert not waits
        assert np.abs(error).max() <= 1e-12


def test_other_vectors_on_a_device_are_noticed_later(two):
    for answer in two.run("on_a_device", "other vectors", seconds=50):
        assert isinstance(answer, JobError), answer
        assert answer.kind == "RankError"
        assert "did not do the same: in product of operator" in answer.text
    assert two.results("recover")[0] == two.results("recover")[1]


@pytest.mark.parametrize("what", ["divisor", "check"])
def test_a_pass_that_repeats_more_on_one_rank_is_noticed_before_it_begins(two, what):
    for answer in two.run("repeat", what, seconds=50):
        assert isinstance(answer, JobError), answer
        assert "whether the model is checked again" in answer.text, answer.text


def test_the_others_are_told_of_an_error(four):
    answers = four.run("fail", "error", seconds=50)
    assert answers[3][0] == "ZeroDivisionError"
    for kind, text, seconds in answers[:3]:
        assert kind == "RankError"
        assert "rank 3 failed in product of operator" in text
        assert "ZeroDivisionError: division by zero" in text
        assert seconds < 10


def test_a_rank_that_dies_ends_the_others():
    with Processes(4) as processes:
        answers = processes.run("fail", "kill", seconds=60)
        assert isinstance(answers[3], DeathError)
        for kind, text, _ in answers[:3]:
            assert kind == "RankError"
            assert "rank 3 died, hangs or does something else" in text
            assert "product of operator" in text


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_does_not_come_is_named_after_the_timeout(size):
    with Processes(size, timeout=2.0) as processes:
        *others, last = processes.run("fail", "sleep", seconds=60)
        assert last == "slept"
        for kind, text, seconds in others:
            assert kind == "RankError"
            assert f"rank {size - 1} died, hangs or does something else" in text
            assert 1.5 < seconds < 11


def test_the_rank_that_holds_the_store_may_die(two):
    with Processes(2) as processes:
        answers = processes.run("fail_first", seconds=60)
        assert isinstance(answers[0], DeathError)
        assert answers[1][0] == "RankError"
        assert "rank 0" in answers[1][1]


# ---- Arguments ---------------------------------------------------------------------------------------


def test_what_is_no_process_group():
    with pytest.raises(TypeError, match=r"`process_group` must be a process group of torch\.distributed"):
        alone(process_group="world")


def test_data_that_cannot_be_divided(two):
    for answer in two.run("refused"):
        for kind, text, pattern in answer:
            assert kind in ("TypeError", "ValueError")
            assert re.search(pattern, text), text


# ---- Parameters that are sharded themselves ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "convolution", "attention"])
@pytest.mark.parametrize("rows", ["term", "datum"])
@pytest.mark.parametrize("size", [2, 4])
def test_sharded_parameters(kind, rows, size, request):
    processes = request.getfixturevalue({2: "two", 4: "four"}[size])
    model, _, data = sharded_case(kind)
    whole = fo.FisherMCLinearOperator(model, torch.nn.CrossEntropyLoss(), data=data, rows=rows, mc_samples=2)
    F = whole.todense()
    V = np.linspace(-1, 1, 3 * len(F)).reshape(3, -1).T
    damped = F + 0.1 * np.eye(len(F))
    expected = F @ V, F @ V[:, 0], np.diag(F), *2 * [np.linalg.solve(damped, V[:, 0])], F @ V
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    every = []
    answers = processes.results("sharded_products", kind, rows)
    for places, results, (trace, log), spectrum, gradients, after, plan in answers:
        every += places
        for found, right in zip(results, expected, strict=True):
            np.testing.assert_allclose(found, right[places], rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(trace, np.trace(F), rtol=1e-10)
        np.testing.assert_allclose(log, np.linalg.slogdet(damped)[1], rtol=1e-9)
        np.testing.assert_allclose(spectrum, np.linalg.eigvalsh(F)[-3:], rtol=1e-9)
        np.testing.assert_allclose(after, whole.trace(), rtol=1e-10)
        assert gradients == [None] * len(gradients)
        assert "factors" in plan
    assert sorted(every) == list(range(len(F)))


@pytest.mark.parametrize("kind", ["dense", "convolution", "attention"])
def test_other_data_of_sharded_parameters(two, kind):
    model, _, data = sharded_case(kind)
    G = fo.FisherMCLinearOperator(model, torch.nn.CrossEntropyLoss(), data=data, rows="datum").scores
    Q = G.on(tuple(part[:8] for part in data), kind="empirical")
    for datum, gram, own, norms, (product, places), w, projection in two.results("sharded_other_data", kind):
        np.testing.assert_array_equal(np.sort(datum), np.arange(8))
        np.testing.assert_allclose(gram, Q.gram(G)[datum], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(own, Q.gram()[np.ix_(datum, datum)], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(norms, Q.row_norms()[datum], rtol=1e-9)
        np.testing.assert_allclose(projection.value, Q.project(9, 2).value[datum], rtol=1e-9, atol=1e-12)
        errors = np.linalg.norm(projection.value @ projection.value.T - own) / np.linalg.norm(own)
        assert 0.3 < projection.error / errors < 3
        np.testing.assert_allclose(product, (Q.rows()[datum].T @ w)[places], rtol=1e-9, atol=1e-12)


def test_one_rank_shows_progress(two):
    assert two.results("progress") == [[True, True], [False, False]]


def test_a_natural_gradient_of_sharded_parameters(two):
    model, _, data = sharded_case("dense")
    op = fo.FisherMCLinearOperator(model, torch.nn.CrossEntropyLoss(), data=data)
    for step, gradient in two.results("sharded_gradient"):
        right = linalg.natural_gradient(op, gradient, 1e-2, rtol=1e-10)
        assert step.keys() == right.keys()
        for name, found in step.items():
            np.testing.assert_allclose(found, right[name], atol=1e-8)


@pytest.mark.parametrize("size", [1, 2])
def test_composites_of_sharded_parameters(size):
    model, _, data = sharded_case("dense")
    F = fo.FisherMCLinearOperator(model, torch.nn.CrossEntropyLoss(), data=data).todense()
    D = len(F)
    x, eye = np.linspace(-1, 1, D), np.eye(D)
    matrices = F, 2 * F, F + 0.1 * eye, 0.5 * F, F @ F, F @ F, 2 * F + 0.1 * eye
    with Processes(size) as processes:
        for places, products, inner in processes.results("sharded_composites"):
            np.testing.assert_allclose(inner, x @ x, rtol=1e-12)
            for found, A in zip(products, matrices, strict=True):
                np.testing.assert_allclose(found, (A @ x)[places], rtol=1e-9, atol=1e-12)


def test_what_sharded_parameters_do_not_allow(two):
    texts = [
        r"pass a DTensor of this rank's part, such as `op\.sharded\(local\)` with \d+ rows here",
        r"got shape \(3,\), and this rank has \d+ numbers",
        "F as a dense matrix would be on every rank",
        "the gradient of sharded parameters is not supported. Compute it by `loss.backward",
        "the standard error of products with sharded parameters is not supported",
        "eigenvalues alone are supported",
        "`op` must have whole parameters, got sharded ones",
        "cache='scores' cannot be had where the parameters are sharded: use 'auto' or 'factors'",
        "cache='none' cannot be had where the parameters are sharded: use 'auto' or 'factors'",
        "leave out `dtype`",
        r"sharded over 2 processes: pass process_group=",
        "are DTensors that `fully_shard` did not make",
        "some parameters are sharded and others are not",
        "they have 5, 4 batches: give them equally many",
    ]
    for answers in two.results("sharded_refusals"):
        for (kind, text), pattern in zip(answers, texts, strict=True):
            assert kind in ("TypeError", "ValueError", "NotImplementedError"), (kind, text)
            assert re.search(pattern, text), text


def test_the_examples_of_the_how_to_page(two, tmp_path):
    folder = Path(__file__).parent.parent / "docs" / "how-to"
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "distributed.md").read_text(encoding="utf-8"), re.DOTALL)
    model, _, data = sharded_case("dense")
    top = linalg.eigvalsh(fo.FisherMCLinearOperator(model, torch.nn.CrossEntropyLoss(), data=data))[-1]
    for quotient, difference, count in two.results("documented", code):
        np.testing.assert_allclose(quotient, top, rtol=1e-6)
        assert difference < 1e-7
        assert count > 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*command, folder / "several_processes.py"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=True,
    )
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("eigenvalues")]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 5))
    X, y = torch.randn(1000, 20), torch.randint(5, (1000,))
    op = fo.FisherMCLinearOperator(model, torch.nn.CrossEntropyLoss(), data=(X, y))
    found = [float(number) for number in re.findall(r"\d+\.\d+", line)]
    np.testing.assert_allclose(found[:3], linalg.eigvalsh(op)[-3:], rtol=1e-4)


# ---- What a review found -----------------------------------------------------------------------------


def test_groups_of_some_of_the_ranks(four):
    answers = four.results("subgroups")
    whole = fo.FisherMCLinearOperator(network(), loss(), data=everything()).trace()
    for traces in answers:
        np.testing.assert_allclose(traces, whole, rtol=1e-12)
    assert [len(traces) for traces in answers] == [3, 3, 1, 2]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("buffers", "all parameters and buffers of the model is"),
        ("frozen", "all parameters and buffers of the model is"),
        ("class weights", "the checksum of the loss's options is"),
        ("ignore_index", "the checksum of the loss's options is"),
        ("check_deterministic", "check_deterministic is False on rank 0, True on rank 1"),
    ],
)
def test_what_else_makes_the_matrix_is_compared(two, what, text):
    for answer in two.run("differ", what, seconds=50):
        assert isinstance(answer, JobError), answer
        assert text in answer.text, answer.text


@pytest.mark.parametrize("how", ["nothing", "memory"])
def test_resampling_where_ranks_keep_different_things(two, how):
    expected = alone().resample(9) @ np.ones(alone().shape[0])
    for product, shape, inverse_ranks, scores_ranks in two.results("resampled", how):
        np.testing.assert_allclose(product, expected, atol=1e-12)
        assert shape == expected.shape
        assert inverse_ranks == scores_ranks == 2


def test_odd_samplers(two):
    F = alone().todense()
    for kind in ("subclass", "batch sampler"):
        for dense in two.results("odd_samplers", kind):
            np.testing.assert_allclose(dense, F, atol=1e-14)
    for answer in two.run("odd_samplers", "no batches"):
        assert "batch_size=None" in answer.text


def test_groups_of_the_same_ranks_do_not_share_alarms(two):
    for traces in two.results("again"):
        np.testing.assert_allclose(traces, traces[0], rtol=1e-12)


def test_an_error_in_a_callback_is_told(two):
    first, second = two.run("failing_callback", seconds=50)
    assert first.kind == "ZeroDivisionError"
    assert "rank 0 failed in the callback of solve: ZeroDivisionError: in the callback" in second.text


def test_the_rank_that_holds_the_store_may_hang():
    with Processes(2, timeout=3.0, tcp=True) as processes:
        ((kind, text),) = processes.run("stop_first", seconds=60, wait_for=[1])
        assert kind == "RankError"
        assert "rank 0" in text
        processes.processes[0].kill()


@pytest.mark.parametrize("cache", ["auto", "none"])
@pytest.mark.parametrize("split", ["contiguous", "nothing", "own"])
@pytest.mark.parametrize("name", ["kfac", "ekfac", "kronecker", "layers", "diagonal", "nystrom"])
def test_approximations_are_those_of_one_process(two, name, split, cache):
    op = alone("exact")
    K = getattr(fo.approximate, name)(op)
    error = fo.approximate.error(op, K).value
    found = two.results("approximations", name, "exact", split, {"cache": cache})
    for dense, own, plan in found:
        np.testing.assert_array_equal(dense, found[0][0])
        if name != "nystrom":  # whose pivots depend on the order of the rows
            np.testing.assert_allclose(dense, K.todense(), atol=1e-12 * np.abs(dense).max())
            np.testing.assert_allclose(own, error, atol=1e-7)
            assert plan == K.plan
        assert own <= max(error, 0.01) + 1e-7


# ---- Natural-gradient steps ------------------------------------------------------------------------


def test_ranks_make_the_steps_of_one_process(two):
    """Every kind, method and loss; one rank has no examples of a batch, or only ignored ones."""
    fixed = {"lr": 0.3, "damping": 0.1}
    cases = [
        ("heads", {**fixed, "momentum": 0.5}),
        ("mean", {**fixed, "kind": "mc", "momentum": 0.5}),
        ("heads", {**fixed, "kind": "empirical"}),
        ("sum", {**fixed, "method": "primal"}),
        ("mean", {"damping": "auto", "method": "dense", "trust": 0.1}),
    ]
    expected = natural_gradient(None, cases)
    first, second = two.results("natural_gradient", cases)
    for case, alone, one, other in zip(cases, expected, first, second, strict=True):
        assert one[2] == other[2], case
        assert one[0] == other[0], case
        # Conjugate gradients end at a relative residual of 1e-5.
        rtol = 1e-3 if "primal" in case[1].values() else 1e-6
        np.testing.assert_allclose(one[0], alone[0], rtol=rtol, err_msg=str(case))
        np.testing.assert_allclose(one[1], alone[1], rtol=rtol, atol=rtol, err_msg=str(case))
        assert one[3] == other[3] == alone[3], case


@pytest.mark.parametrize(
    ("fault", "own", "others"),
    [
        ("data", "FloatingPointError: the model's output .* contains NaN", "RankError: rank 1 failed in .*NaN"),
        ("closure", "OSError: the disk is full", "RankError: rank 1 failed in the batch of a step: OSError"),
        ("interrupt", "KeyboardInterrupt", "RankError: rank 1 failed in .*KeyboardInterrupt"),
        ("rate", "RankError: .*in options, lr is .*0.1.* on rank 0, .*0.2.* on rank 1", None),
    ],
)
def test_an_error_of_one_rank_ends_the_step_of_all(two, fault, own, others):
    first, second = two.results("natural_gradient_faults", fault)
    assert re.match(own, second[0]), second
    assert re.match(others or own, first[0]), first
    assert first[1], first
    assert second[1], second
    assert first[2] == second[2]  # the group is made again for the next step
