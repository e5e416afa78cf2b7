"""Repeat every build that uses known facts with nothing known, and compare the two.

This is the only module of the tests that replaces private functions of the builds.
"""

from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch

from fisherops.problem.evaluation import MODES, Evaluation, GraphFacts
from fisherops.scores.build import RowsBuilder

# Builders whose builds with nothing known are running: they do not count.
_comparing = []


@dataclass
class Counts:
    """How often something was done, and how often with known facts."""

    builds: int = 0
    known_builds: int = 0
    modes: int = 0
    known_modes: int = 0

    def add(self, other):
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + other[field.name])

    def __str__(self):
        def rate(known, total, what):
            percent = f" ({known / total:.1%})" if total else ""
            return f"{known} of {total} {what} used known facts{percent}"

        return f"{rate(self.known_builds, self.builds, 'builds')}; {rate(self.known_modes, self.modes, 'modes')}"


@contextmanager
def counted(counts, compares=False):
    """Count builds and choices of modes; optionally repeat those that use known facts with nothing known."""
    originals = RowsBuilder.build, RowsBuilder._probe, Evaluation.choose_mode, Evaluation.linearize
    build, probe, choose_mode, linearize = originals
    probed = []

    def noted_probe(self, *args):
        if not _comparing:
            probed.append(self)
        return probe(self, *args)

    def noted_build(self, form, patient=False):
        counts.builds += 1
        before = len(probed)
        try:
            result = build(self, form, patient)
            is_known = len(probed) == before and not self._evaluation.problem.is_divided
        finally:
            del probed[before:]
        if is_known:
            counts.known_builds += 1
            if compares:
                compare_builds(self, form, patient, result, build)
        return result

    def noted_mode(original, mode_of, is_known_of):
        def noted(self):
            counts.modes += 1
            is_known = bool(self.reached) and is_known_of(self.facts) and not self.custom_functions
            counts.known_modes += is_known
            result = original(self)
            if is_known and compares and result is not False:
                difference = self.difference_from_reverse(mode_of(self.facts))
                assert difference <= self.facts.tolerance, f"known mode {mode_of(self.facts).name}: {difference:.2e}"
            return result

        return noted

    RowsBuilder.build, RowsBuilder._probe = noted_build, noted_probe
    Evaluation.choose_mode = noted_mode(choose_mode, lambda facts: facts.mode, lambda facts: facts.mode is not None)
    Evaluation.linearize = noted_mode(linearize, lambda facts: MODES[0], lambda facts: facts.linearizes)
    try:
        yield
    finally:
        RowsBuilder.build, RowsBuilder._probe, Evaluation.choose_mode, Evaluation.linearize = originals


def compare_builds(builder, form, patient, result, build):
    """Build once more with fresh facts, and assert that every bit is the same."""
    e = builder._evaluation
    known = e.facts
    e.facts = GraphFacts(known.tolerance)
    _comparing.append(builder)
    try:
        with torch.random.fork_rng(devices=[]):
            fresh = build(builder, form, patient)
    except Exception as error:
        raise AssertionError(f"the build with nothing known of {names_of(e.uses)} fails: {error}") from error
    finally:
        e.facts = known
        _comparing.pop()
    (batch, differentiated), (other, others) = result, fresh
    assert differentiated.keys() == others.keys(), f"differentiated {differentiated}, with nothing known {others}"
    assert batch.description == other.description, f"{batch.description}, with nothing known {other.description}"
    assert torch.equal(batch._dense, other._dense), f"dense rows differ: {names_of(e.uses)}"
    assert batch._own_spans == other._own_spans, "dense rows are those of other parameters"
    assert len(batch.blocks) == len(other.blocks), "other uses have columns"
    for (derived, columns), (other_derived, other_columns) in zip(batch.blocks, other.blocks, strict=True):
        use = f"{type(columns).__name__} of {', '.join(derived.names)}"
        assert type(columns) is type(other_columns), use
        assert (derived.names, derived.shape) == (other_derived.names, other_derived.shape), use
        pairs = zip(columns.tensors, other_columns.tensors, strict=True)
        assert all(torch.equal(t, u) for t, u in pairs), f"{use} differ from those with nothing known"


def names_of(uses):
    return ", ".join(f"{use.call.name} of {'/'.join(names)}" for use, names in uses)


def spoil_facts(op):
    """Exchange examples and positions in what an operator knows of arrangements."""
    for facts in op.score_matrix.problem.facts._known.values():
        for known in facts.rows.values():
            for place, arrangement in known.arrangements.items():
                known.arrangements[place] = replace(arrangement, axis=1 - arrangement.axis)
