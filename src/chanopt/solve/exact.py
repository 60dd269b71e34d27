"""The packing program in whole numbers, for few readers (CP-SAT).

For every union U of signatures: how many bins hold nothing outside U, and how many channels of each class are
put there. Which of these bins a channel is in does not matter, so no two solutions differ by names alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chanopt.solve.columns import Priced
from chanopt.solve.packing import Counts, floor_of, gray_order

__all__ = ["Proven", "prove"]

_EFFORT = 2.0
"""Deterministic seconds of CP-SAT: a limit that does not hang on how busy the machine is."""


@dataclass(frozen=True, slots=True)
class Proven:
    """Bins, and what any bins pay at least."""

    bins: Counts
    bound: int


def prove(priced: Priced, start: Counts, bound: int, deadline: float, workers: int) -> Proven | None:
    """Return the best bins, or the best found in time; None if there is no time for any.

    `start` are bins to begin with, `bound` is what is known to be paid at least.
    """
    from ortools.sat.python import cp_model

    packing = priced.packing
    unions, classes = range(len(priced.unions)), range(len(packing.counts))
    counts = packing.counts.tolist()
    model = cp_model.CpModel()
    full = [model.new_int_var(0, packing.full, "") for _ in unions]
    short = [model.new_bool_var("") if packing.rest else 0 for _ in unions]
    put = {(u, c): model.new_int_var(0, counts[c], "") for u in unions for c in classes if priced.fits[u, c]}
    for c in classes:
        model.add(sum(put[u, c] for u in unions if (u, c) in put) == counts[c])
    model.add(sum(full) == packing.full)
    if packing.rest:
        model.add(sum(short) == 1)
    for u in unions:
        inside = [(c, put[u, c]) for c in classes if (u, c) in put]
        model.add(sum(x for _, x in inside) == packing.grain * full[u] + packing.rest * short[u])
        for c, x in inside:
            # A bin holds at most what there is of a class: without this the relaxation proves the floors only.
            if counts[c] < packing.grain:
                model.add(x <= counts[c] * (full[u] + short[u]))
    sizes = (packing.counts @ packing.signatures).tolist()
    touched = [model.new_int_var(-(-size // packing.grain), packing.bins, "") for size in sizes]
    for reader, count in enumerate(touched):
        model.add(count == sum(full[u] + short[u] for u in unions if priced.unions[u, reader]))
    paid = cp_model.LinearExpr.weighted_sum(touched, list(packing.weights))
    model.add(paid >= max(bound, floor_of(packing)))
    model.minimize(paid)
    for variable, value in _hints(priced, start, full, short, put):
        model.add_hint(variable, value)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = workers
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = _EFFORT
    solver.parameters.max_time_in_seconds = max(deadline - time.monotonic(), 0.001)
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    held = np.zeros(priced.fits.shape, dtype=np.int64)
    for at, variable in put.items():
        held[at] = solver.value(variable)
    if status == cp_model.OPTIMAL:
        bound = sum(weight * solver.value(count) for weight, count in zip(packing.weights, touched, strict=True))
    else:
        bound = max(bound, math.floor(solver.best_objective_bound * (1 - 2**-50)))
    return Proven(_bins(priced, held, [bool(packing.rest and solver.value(last)) for last in short]), bound)


def _hints(
    priced: Priced, start: Counts, full: Sequence[Any], short: Sequence[Any], put: Mapping[tuple[int, int], Any]
) -> Iterator[tuple[Any, int]]:
    """Yield every variable with its value in some bins."""
    number = {union.tobytes(): u for u, union in enumerate(priced.unions)}
    held = np.zeros(priced.fits.shape, dtype=np.int64)
    used = [0] * len(full)
    last = -1
    for position, row in enumerate(start):
        u = number[priced.packing.signatures[row > 0].any(axis=0).tobytes()]
        held[u] += row
        if priced.packing.rest and position == len(start) - 1:
            last = u
        else:
            used[u] += 1
    yield from zip(full, used, strict=True)
    if priced.packing.rest:
        yield from ((variable, int(u == last)) for u, variable in enumerate(short))
    yield from ((variable, int(held[at])) for at, variable in put.items())


def _bins(priced: Priced, held: Counts, short: list[bool]) -> Counts:
    """Cut what is put into the bins of each union into single bins, the short one last."""
    packing = priced.packing
    order = gray_order(packing.signatures)
    rows: list[Counts] = []
    last: list[Counts] = []
    for counts, shorter in zip(held, short, strict=True):
        classes = np.repeat(order, counts[order])
        ends = [*range(packing.grain, len(classes) + 1, packing.grain)]
        pieces = np.split(classes, ends)
        made = [np.bincount(piece, minlength=len(counts)).astype(np.int64) for piece in pieces if len(piece)]
        if shorter:
            last.append(made.pop())
        rows += made
    return np.array(rows + last)
