"""The command line: ``python -m fisherops spectrum``, and so on for the other commands."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

import fisherops
from fisherops import approximate, linalg
from fisherops.app import launch, problems
from fisherops.app.problems import KINDS, LOSSES, Problem, UsageError
from fisherops.app.progress import Progress
from fisherops.approximate.distance import BUILDERS, table_of
from fisherops.fisher import FisherOperator
from fisherops.scores import CACHES

_SEED = 2147483647
_SHOWN = 6  # queries that are printed and drawn
_TITLES = {"mc": "Monte-Carlo Fisher", "exact": "Exact Fisher", "empirical": "Empirical Fisher"}
_DEMO = (
    "Without --model and --data, the model is a small convolutional network that is trained for a few seconds on "
    "scikit-learn's handwritten digits."
)
_MISSING = (
    "Only the Python API has custom likelihoods, several outputs, options of losses (class weights, ignore_index, "
    "label smoothing, ...), inputs that are not one array, data loaders, sampler='stream' and spill."
)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


class _Outcome(NamedTuple):
    """What a command found: numbers for JSON, lines to print, and perhaps a picture or arrays."""

    numbers: dict[str, Any]
    lines: list[str]
    draw: Callable[[Any], Any] | None = None
    arrays: Mapping[str, Any] | None = None


class _Question(NamedTuple):
    """Data to ask about: this process's batches of the training data and of the queries, and all of them."""

    problem: Problem
    train: list[Any]
    query: list[Any]


class _Command(NamedTuple):
    compute: Callable[..., _Outcome]
    """Takes the operator, arguments and progress, and a question if there are data to ask about."""
    found: str
    help: str
    files: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns
    -------
    int
        Exit status: 0; 2 if the input is at fault, with one line on stderr that names the fix; 130 after an interrupt.
    """
    started = time.perf_counter() - fisherops.IMPORT_SECONDS
    parser = _make_parser()
    name, is_first = parser.prog, True
    try:
        arguments = parser.parse_args(argv)
        name = f"{parser.prog} {arguments.command}"
        with launch.joined(arguments.device) as group:
            is_first = group is None or group.rank() == 0  # the only rank that prints and writes
            with Progress(is_first and not arguments.quiet) as progress:
                text = _run(arguments, group, is_first, progress, started)
        if is_first:
            print(text)
    except UsageError as error:
        if is_first:
            print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted, nothing was written.", file=sys.stderr)
        return 130
    return 0


def _run(arguments: argparse.Namespace, group: Any, is_first: bool, progress: Progress, started: float) -> str:
    """Load, compute, describe, write, and return what is to be printed: the same for every command."""
    command = _COMMANDS[arguments.command]
    files = [arguments.out / file for file in command.files]
    problems.check_options(arguments)
    progress.start("importing matplotlib")
    plot = _import_plot() if files[-1].suffix == ".png" and not problems.asks(arguments) else None
    if is_first:
        _make_directory(arguments.out)
    problem = launch.load_everywhere(lambda: problems.load_problem(arguments, progress), group)
    if problem.has_images:
        plot = _import_plot()
    elif plot is None:
        files = [file for file in files if file.suffix != ".png"]
    try:
        progress.start("reading the data")
        batches = launch.divide(problem.X, problem.y, arguments.batch_size, group)
        question = []
        if problem.query is not None:
            query = launch.divide(*problem.query, arguments.batch_size, group)
            question = [_Question(problem, problems.reported(batches, progress), problems.reported(query, progress))]
        shared = {} if group is None else {"process_group": group}
        op = problems.make_operator(problem, arguments, batches, progress, **shared)
        progress.start(f"computing the {command.found} of the {op.shape[0]:,} × {op.shape[0]:,} matrix")
        begun = time.perf_counter()
        outcome = command.compute(op, arguments, progress, *question)
        seconds = time.perf_counter() - begun
        description = _describe(problem, op, arguments)
    except UsageError:
        raise
    except Exception as error:  # The model is the user's, so that anything may be raised.
        kind = "" if isinstance(error, ValueError | FloatingPointError) else f"{type(error).__name__}: "
        hint = "; y looks one-hot: pass classes, such as y.argmax(1)" if problems.is_one_hot(problem.y) else ""
        shapes = f"X {tuple(problem.X.shape)} and y {tuple(problem.y.shape)}"
        raise UsageError(f"the Fisher of the model on {shapes} failed: {kind}{error}{hint}") from None
    result = description | outcome.numbers | {"seconds": round(seconds, 3)}
    title = f"{_TITLES[arguments.kind]} of {problem.title}"
    size = f"{result['parameters']:,} parameters, {result['examples']:,} examples"
    if is_first:
        with _atomic_files(files) as temporary:
            for path in temporary:
                if path.suffix == ".json":
                    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
                elif path.suffix == ".npz":
                    np.savez(path, **outcome.arrays or {})
                elif outcome.draw is not None:
                    from matplotlib import pyplot

                    ax = outcome.draw(plot)
                    ax.set_title(f"{title}\n{size}", fontsize=11)
                    ax.figure.savefig(path, format="png", dpi=160)
                    pyplot.close(ax.figure)
    if arguments.json:
        return json.dumps(result, indent=2)
    samples = f"{result['mc_samples']} sample(s) per loss term, " if arguments.kind == "mc" else ""
    processes = f" in {result['processes']} processes" if result["processes"] > 1 else ""
    loss = f"loss {problem.loss} ({result['reduction']})"
    head = [title, f"{size}, {loss}, {samples}{result['dtype']} on {result['device']}{processes}"]
    if problem.held_out_accuracy is not None:
        head.append(f"held-out accuracy: {problem.held_out_accuracy:.1%}")
    total, imports = time.perf_counter() - started, fisherops.IMPORT_SECONDS
    if result["rows"] < result["parameters"]:
        zeros = result["parameters"] - result["rows"]
        outcome.lines.append(f"F is a sum over {result['rows']:,} rows, so at least {zeros:,} eigenvalues are zero")
    return "\n".join([
        *head, "", *outcome.lines, f"method {result['method']}: {_METHODS[result['method']]}",
        f"{seconds:.1f} s for the {command.found}; {total:.1f} s in total, of which {imports:.1f} s for imports",
        f"wrote {' and '.join(map(str, files))}",
    ])  # fmt: skip


def _describe(problem: Problem, op: FisherOperator, arguments: argparse.Namespace) -> dict[str, Any]:
    sampled = arguments.kind == "mc"
    return {
        "fisherops": fisherops.__version__,
        "command": arguments.command,
        "model": problem.title,
        "kind": arguments.kind,
        "loss": problem.loss,
        "reduction": op.reductions[0],
        "parameters": op.shape[0],
        "examples": len(problem.y),
        "rows": op.num_rows,
        "mc_samples": (arguments.mc_samples or 1) if sampled else None,
        "seed": (_SEED if arguments.seed is None else arguments.seed) if sampled else None,
        "dtype": op.dtype.name,
        "device": str(op.device),
        "processes": op.processes.size,
        "held_out_accuracy": problem.held_out_accuracy,
    }


# ---- Commands ------------------------------------------------------------------------------------------


def _spectrum(op: FisherOperator, arguments: argparse.Namespace, progress: Progress) -> _Outcome:
    from fisherops.plot import rank_threshold

    D = op.shape[0]
    if arguments.k is not None and arguments.k > D:
        raise UsageError(f"-k is {arguments.k}, but the model has {D} parameters: choose k ≤ {D}")
    trace = op.trace()
    if trace == 0:
        raise UsageError("the Fisher of the model on these data is zero, so it has no eigenvalues to find")
    pairs = linalg.eigsh(
        op, arguments.k or min(50, D), tol=arguments.tol, method=arguments.method, return_eigenvectors=False,
        checkpoint=arguments.checkpoint, callback=lambda products, *_: progress.report(f"{products:,} products"),
    )  # fmt: skip
    if not pairs.converged:
        raise UsageError(
            f"eigsh gave up after {pairs.products} products before --tol {arguments.tol:g}: ask for fewer eigenvalues, "
            "or for a larger --tol such as 1e-3"
        )
    values = [float(value) for value in pairs.eigenvalues[::-1]]
    threshold = rank_threshold(values, D, op.dtype, op.num_rows)
    numbers = {
        "eigenvalues": values,
        "trace": trace,
        "share_of_trace": [value / trace for value in values],
        "rank_threshold": threshold,
        "method": pairs.method,
        "products": pairs.products,
    }
    lines = [f"{'index':>5}  {'eigenvalue':>12}  {'share of trace':>14}  {'cumulative':>10}"]
    for i, value in enumerate(values, 1):
        lines.append(f"{i:>5}  {value:>12.5e}  {value / trace:>14.2%}  {sum(values[:i]) / trace:>10.2%}")
    rank = sum(value > threshold for value in values)
    least = "" if rank < len(values) else "at least "
    lines += ["", f"trace {trace:.5e}; numerical rank {least}{rank} (eigenvalues above {threshold:.1e})"]
    return _Outcome(numbers, lines, lambda plot: plot.spectrum(values, trace=trace, threshold=threshold))


def _density(op: FisherOperator, arguments: argparse.Namespace, _: Progress) -> _Outcome:
    density = linalg.spectral_density(op, method=arguments.method, probes=arguments.probes, steps=arguments.steps)
    grid, counts, errors = density.grid.tolist(), density.counts.tolist(), density.standard_error.tolist()
    numbers = {"method": density.method, "grid": grid, "counts": counts, "standard_error": errors}
    numbers |= {"below": density.below, "above": density.above}
    is_estimate = any(errors)
    lines = [f"{'from':>12}  {'to':>12}  {'eigenvalues':>12}" + is_estimate * f"  {'std. error':>10}"]
    for low, high, count, error in zip(grid[:-1], grid[1:], counts, errors, strict=True):
        if count > 0:
            lines.append(f"{low:>12.3e}  {high:>12.3e}  {count:>12.1f}" + is_estimate * f"  {error:>10.1f}")
    lines += ["", f"{density.below:,.0f} eigenvalues are below {grid[0]:.1e}, zero to rounding"]
    return _Outcome(numbers, lines, lambda plot: plot.density(density))


def _solve(op: FisherOperator, arguments: argparse.Namespace, progress: Progress) -> _Outcome:
    gradient = op.gradient()
    solution = linalg.solve(
        op, gradient, arguments.damping, method=arguments.method, rtol=arguments.rtol, checkpoint=arguments.checkpoint,
        callback=lambda done, residual: progress.report(f"{done:,} iterations, residual {float(residual):.1e}"),
    )  # fmt: skip
    if not solution.converged:
        raise UsageError(
            f"the residual is {solution.residual:.1e} after {solution.iterations} iterations and does not come to "
            f"--rtol {arguments.rtol:g}: choose a larger one, or a larger --damping, or --dtype float64"
        )
    numbers = {
        "damping": arguments.damping,
        "method": solution.method,
        "iterations": solution.iterations,
        "gradient_norm": float(np.linalg.norm(gradient)),
        "residual": solution.residual,
        "norm": float(np.linalg.norm(solution.x)),
        "decrease": float(gradient @ solution.x),
    }
    lines = [
        f"‖∇loss‖ {numbers['gradient_norm']:.5e}, λ {arguments.damping:g}, x = (F + λI)⁻¹ ∇loss",
        f"‖x‖ {numbers['norm']:.5e}, ⟨∇loss, x⟩ {numbers['decrease']:.5e}",
        f"residual ‖∇loss − (F + λI) x‖ {solution.residual:.1e}, {solution.iterations} iterations",
    ]
    shapes = op.parameter_shapes
    arrays = {name: solution.x[slice(*span)].reshape(shapes[name]) for name, span in op.parameter_spans.items()}
    return _Outcome(numbers, lines, arrays=arrays)


def _trace(op: FisherOperator, arguments: argparse.Namespace, _: Progress) -> _Outcome:
    norm = linalg.frobenius_norm(op, method=arguments.method)
    found = [("trace", op.trace(), 0.0), ("Frobenius norm", norm.value, norm.standard_error)]
    if arguments.damping is not None:
        dimension = linalg.effective_dimension(op, arguments.damping, method=arguments.method)
        log = linalg.slogdet(op, arguments.damping, method=arguments.method)
        found.append(("effective dimension", dimension.value, dimension.standard_error))
        found.append(("log determinant", log.logabsdet, log.standard_error))
    keys = {name: name.lower().replace(" ", "_") for name, *_ in found}
    numbers = {"damping": arguments.damping, "method": norm.method} | {keys[name]: value for name, value, _ in found}
    numbers["standard_errors"] = {keys[name]: error for name, _, error in found[1:]}
    lines = [f"{name:>20}  {value:>14.6e}" + (f"  ± {error:.1e}" if error else "") for name, value, error in found]
    return _Outcome(numbers, [*lines, ""])


def _approximate(op: FisherOperator, arguments: argparse.Namespace, progress: Progress) -> _Outcome:
    names = arguments.approximations or list(BUILDERS)
    progress.report(", ".join(names))
    found = approximate.compare(op, names, damping=arguments.damping, prints=False)
    numbers = {
        "method": "primal",
        "approximations": {
            x.name: {
                "error": x.error.value, "standard_error": x.error.standard_error, "bytes": x.nbytes,
                "seconds": x.seconds, "iterations": [{"damping": k, "count": n} for k, n in x.iterations.items()],
            }
            for x in found
        },
    }  # fmt: skip
    lines = [*table_of(found), ""]
    return _Outcome(numbers, lines, lambda plot: plot.approximations(found))


def _influence(op: FisherOperator, arguments: argparse.Namespace, progress: Progress, question: _Question) -> _Outcome:
    problem, query = question.problem, question.problem.query
    assert query is not None
    damping = arguments.damping or 0.1 * op.trace() / op.shape[0]
    if damping == 0:
        raise UsageError("the Fisher of the model on these data is zero: give a --damping")
    options = {"kind": "empirical", "rows": "datum", "cache": arguments.cache, "max_memory": arguments.max_memory}
    G: Any = op.scores
    train, asked = (G.on(batches, **options) for batches in (question.train, question.query))
    progress.report("gradients")
    found = linalg.inv_quad(op, asked, train, damping=damping, method=arguments.method, rtol=arguments.rtol)
    if not found.converged:
        raise UsageError(
            f"the residual is {found.residual:.1e} and does not come to --rtol {arguments.rtol:g}: choose a larger "
            "one, or a larger --damping, or --dtype float64"
        )
    # Rows are in the order of the processes, and the loss is divided by c.
    c, scores = float(getattr(G, "local", G).reader.divisor()), np.empty_like(found.value)
    scores[np.ix_(asked.datum, train.datum)] = found.value / c
    few = min(arguments.top, scores.shape[1])
    ranked, labels = [], [_labels(y) for y in (problem.y, query[1])]
    lines = [f"λ {damping:.3e}; how much the loss of a query grows, to first order, without a training example:"]
    for number, own in enumerate(scores):
        order = np.argsort(own)
        ranked.append({
            name: [{"example": int(n), "score": float(own[n])} for n in chosen]
            for name, chosen in (("helpful", order[::-1][:few]), ("harmful", order[:few]))
        })  # fmt: skip
        if number < _SHOWN:
            for name, entries in ranked[-1].items():
                text = ", ".join(f"{entry['example']} ({entry['score']:+.2e})" for entry in entries)
                lines.append(f"query {number:>3}  most {name}: {text}")
    if len(scores) > _SHOWN:
        lines.append(f"... and {len(scores) - _SHOWN:,} more queries, which are in the file")
    numbers = {
        "queries": len(scores), "damping": damping, "method": found.method, "residual": found.residual,
        "ranked": ranked,
    }  # fmt: skip
    images = [_as_array(X) for X in (problem.X, query[0][:_SHOWN])] if problem.has_images else []
    shown = None if any(own is None for own in labels) else (labels[0], labels[1])

    def draw(plot: Any) -> Any:
        return plot.influence(scores[:_SHOWN], *images, labels=shown, top=few)

    return _Outcome(numbers, [*lines, ""], draw if images else None, {"influence": scores})


def _labels(y: Any) -> Any:
    """Return classes (N,), or None if targets are others."""
    array = _as_array(y)
    return array if array.ndim == 1 and array.dtype.kind in "biu" else None


def _as_array(x: Any) -> np.ndarray[Any, Any]:
    return x.numpy() if hasattr(x, "numpy") else np.asarray(x)


_COMMANDS = {
    "spectrum": _Command(
        _spectrum, "largest eigenvalues", "Compute the largest eigenvalues.", ("spectrum.json", "spectrum.png")
    ),
    "density": _Command(
        _density, "eigenvalue density", "Count the eigenvalues by size.", ("density.json", "density.png")
    ),
    "solve": _Command(
        _solve, "natural gradient", "Compute the natural gradient (F + λI)⁻¹ ∇loss.",
        ("solve.json", "natural_gradient.npz"),
    ),
    "trace": _Command(
        _trace, "trace and norm", "Compute the trace and the Frobenius norm, and with --damping the effective "
        "dimension tr F(F + λI)⁻¹ and log det(F + λI).", ("trace.json",),
    ),
    "approximate": _Command(
        _approximate, "approximations", "Compare KFAC, EKFAC and other approximations by their distance from F, "
        "memory, time, and iterations of conjugate gradients with their inverse.",
        ("approximate.json", "approximate.png"),
    ),
    "influence": _Command(
        _influence, "influence scores", "Compute how much the loss of each query grows, to first order, without each "
        "training example, and draw the most helpful and harmful ones if they are images.",
        ("influence.json", "influence.npz", "influence.png"),
    ),
}  # fmt: skip
_METHODS = {
    "dual": "from the matrix of scalar products of the rows",
    "dense": "from F as a dense matrix",
    "primal": "by products of F with vectors",
}


# ---- Options -------------------------------------------------------------------------------------------


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m fisherops", description=f"{fisherops.__doc__} {_DEMO}", epilog=_MISSING)
    parser.add_argument("--version", action="version", version=f"fisherops {fisherops.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, own in _COMMANDS.items():
        command = commands.add_parser(name, help=own.help, description=f"{own.help} {_DEMO}", epilog=_MISSING)
        groups: dict[str, Any] = {}
        for title, names, options in _OPTIONS:
            if name in names and title not in groups:
                groups[title] = command.add_argument_group(title)
            for flag, keywords, text in options if name in names else ():
                groups[title].add_argument(flag, help=text, **keywords)
    return parser


def _number(read: Callable[[str], Any], accept: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if accept(value := read(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")

    return parse


def _integer(least: int) -> Callable[[str], Any]:
    return _number(int, lambda value: value >= least, f"an integer of at least {least}")


_tolerance = _number(float, lambda value: 0 <= value < 1, "a number from 0 to 1")
_positive = _number(float, lambda value: 0 < value < float("inf"), "a number above 0")
_flag = {"action": "store_true"}
_every = tuple(_COMMANDS)
_others = tuple(name for name in _COMMANDS if name != "influence")
_damping = {"type": _positive, "metavar": "λ"}
# fmt: off
_OPTIONS: list[tuple[str, tuple[str, ...], list[tuple[str, dict[str, Any], str]]]] = [
    ("model and data", _every, [
        ("--model", {"metavar": "FILE.py:FACTORY"},
         "The nn.Module, or a function without arguments that returns it; also package.module:FACTORY. It is evaluated "
         "in eval mode."),
        ("--weights", {"metavar": "FILE", "type": Path},
         "A state dict, as safetensors or in torch's format (read with weights_only). Default: the model's weights."),
    ]),
    ("model and data", _others, [
        ("--data", {"metavar": "FILE.npz", "type": Path}, "Arrays X and y with one row for each example."),
    ]),
    ("model and data", ("influence",), [
        ("--train", {"metavar": "FILE.npz", "type": Path, "dest": "data"},
         "Arrays X and y of the training data, with one row for each example."),
        ("--query", {"metavar": "FILE.npz", "type": Path}, "Arrays X and y of the examples to explain the loss of."),
    ]),
    ("model and data", _every, [
        ("--loss", {"choices": list(LOSSES)},
         "ce: CrossEntropyLoss; bce: BCEWithLogitsLoss; bce-probabilities: BCELoss; gaussian: GaussianNLLLoss, for "
         "models that return (mean, var); distribution: for models that return a torch.distributions.Distribution; "
         "the others as in torch.nn. All with torch's default options. Default: ce."),
    ]),
    ("Fisher", _every, [
        ("--kind", {"choices": list(KINDS), "default": "mc"},
         "Targets sampled from the model (mc), their expectation in closed form (exact), or the observed targets "
         "(empirical). Default: %(default)s."),
        ("--params", {"nargs": "+", "metavar": "PATTERN"},
         "Parameters to differentiate with respect to, as shell patterns of their names such as 'head.*'. Default: "
         "all that require gradients."),
        ("--reduction", {"choices": ["mean", "sum"]},
         "Whether F is divided by what the loss divides by over the whole data set. Default: mean."),
        ("--rows", {"choices": ["term", "datum"]},
         "Whether each loss term (token, pixel) has its own row, or the terms of an example are summed into one. Not "
         "for --kind exact. Default: term."),
        ("--mc-samples", {"type": _integer(1), "metavar": "M"}, "Samples for each loss term (mc only). Default: 1."),
        ("--seed", {"type": _integer(0)}, f"Seed of the samples (mc only). Default: {_SEED}."),
    ]),
    ("method", tuple(name for name in _COMMANDS if name != "approximate"), [
        ("--method", {"choices": ["auto", "dual", "dense", "primal"], "default": "auto"},
         "; ".join(f"{name}: {text}" for name, text in _METHODS.items()) + ". Default: auto, the cheapest."),
    ]),
    ("computation", _every, [
        ("--dtype", {"choices": ["float32", "float64"]},
         "Precision of the computation. Default: that of the parameters, float32 for half precisions."),
        ("--device", {"default": "cpu"}, "cpu, cuda, cuda:1, and so on. Default: %(default)s."),
        ("--batch-size", {"type": _integer(1), "default": 512, "metavar": "B"},
         "Examples that are evaluated together. Default: %(default)s."),
        ("--cache", {"choices": CACHES, "default": "auto"},
         "What is cached between products; it does not change results. Default: %(default)s, the cheapest."),
        ("--max-memory", {"metavar": "SIZE"},
         "Memory for the cache, in bytes or such as 4GiB. Default: half of what is free."),
    ]),
    ("spectrum", ("spectrum",), [
        ("-k", {"type": _integer(1)},
         "Number of eigenvalues, at most the number of parameters D. Default: 50, or D if that is less."),
        ("--tol", {"type": _tolerance, "default": 0.0},
         "Residuals of --method primal, relative to the largest eigenvalue. Default: 0, machine precision."),
    ]),
    ("density", ("density",), [
        ("--probes", {"type": _integer(2), "default": 20}, "Random vectors of --method primal. Default: %(default)s."),
        ("--steps", {"type": _integer(1), "default": 80}, "Products with each of them. Default: %(default)s."),
    ]),
    ("solve", ("solve",), [
        ("--damping", {**_damping, "required": True}, "λ > 0, in the units of the eigenvalues. Required."),
        ("--rtol", {"type": _tolerance, "default": 1e-5},
         "Norm of the residual, relative to that of the gradient. Default: %(default)s."),
    ]),
    ("trace", ("trace",), [("--damping", _damping, "λ > 0, in the units of the eigenvalues. Default: none.")]),
    ("approximate", ("approximate",), [
        ("--approximations", {"nargs": "+", "choices": list(BUILDERS)},
         "Which approximations. Default: all."),
        ("--damping", {**_damping, "nargs": "+"},
         "λ > 0 of the systems that conjugate gradients solve. Default: 1e-4, 1e-6 and 1e-8 times λ_max."),
    ]),
    ("influence", ("influence",), [
        ("--damping", _damping, "λ > 0, in the units of the eigenvalues. Default: 0.1 of their mean."),
        ("--top", {"type": _integer(1), "default": 5, "metavar": "K"},
         "Number of the most helpful, and of the most harmful, examples to list. Default: %(default)s."),
        ("--rtol", {"type": _tolerance, "default": 1e-3}, "Relative error of the scores. Default: %(default)s."),
    ]),
    ("checkpoint", ("spectrum", "solve"), [
        ("--checkpoint", {"type": Path, "metavar": "FILE"},
         "Save the solver state to FILE and resume from it (--method primal only). Default: none."),
    ]),
    ("output", _every, [
        ("--out", {"type": Path, "default": Path(), "metavar": "DIR"},
         "Folder for the files, made if it does not exist. Default: the current folder."),
        ("--json", _flag, "Print the JSON file in place of text."),
        ("--quiet", _flag, "Show no progress. Default: progress is shown on stderr after one second."),
    ]),
]
# fmt: on


# ---- Files ---------------------------------------------------------------------------------------------


def _import_plot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError:
        raise UsageError(f"matplotlib is needed for the picture and is not installed: {problems.INSTALL}") from None
    mpl.use("Agg")
    from fisherops import plot

    return plot


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path} cannot be made: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"--out {path} cannot be written to: choose another directory")


@contextlib.contextmanager
def _atomic_files(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield temporary files that replace the targets together once all are complete."""
    with tempfile.TemporaryDirectory(dir=targets[0].parent, prefix=".fisherops-") as folder:
        temporary = [Path(folder) / target.name for target in targets]
        try:
            yield temporary
            for source, target in zip(temporary, targets, strict=True):
                source.replace(target)
        except OSError as error:
            raise UsageError(f"cannot write to {targets[0].parent}: {error.strerror}") from None
