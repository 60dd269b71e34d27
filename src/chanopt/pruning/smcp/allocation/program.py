"""`allocate`: the channels that every group keeps, with the true cost of every layer, and a proof.

1. The relaxation (`relaxation.py`) gives a bound, good choices, and strikes options that no better choice can have.
2. Local search (`search.py`) improves these choices.
3. If the two do not meet, CP-SAT decides among the options that are left: one count per group, its value by an
   element of a table, and the cost of each layer by a table over its kept inputs and kept outputs.

Costs enter CP-SAT as whole numbers of a granularity. Whole costs are exact; others are rounded up, so that what is
found is within the capacity in any case. Values are resolved to 2**-40 of their total.
"""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from chanopt.errors import AllocationError
from chanopt.pruning.smcp.allocation.curves import Curves
from chanopt.pruning.smcp.allocation.instance import Instance, Layer, Product, Table, Term
from chanopt.pruning.smcp.allocation.relaxation import Relaxation
from chanopt.pruning.smcp.allocation.search import Choice, choices_by_price, improve, kept_of
from chanopt.pruning.smcp.allocation.solution import Allocation

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

__all__ = ["allocate"]

_VALUE_BITS = 40
_COST_BITS = 32
_MOST_TUPLES = 2**15
"""Pairs of counts of one layer that are given as a table; more become a product of two numbers."""
_SLACK = 1e-9
"""Relative rounding of the relaxation's sums."""
_IMPROVED = 4
"""Of the choices found by prices, how many are improved by local search."""


def allocate(instance: Instance, *, time_limit: float = 10.0, workers: int = 1) -> Allocation:
    """Find the options worth most within the capacity; at the time limit, the best found and a bound.

    Args:
        instance: the program.
        time_limit: seconds of wall time for CP-SAT; the relaxation before it takes what it takes, usually under a
            second.
        workers: CP-SAT threads. With 1 the answer is the same every time, unless the time runs out.

    Raises:
        AllocationError: no choice is within the capacity, or none was found in time.
    """
    start = time.monotonic()
    curves = Curves(instance)
    relaxation = Relaxation.of(curves)
    known = _explore(curves, relaxation)
    if known.choice is not None and known.proven:
        return _allocation(instance, kept_of(curves, known.choice), known.bound, True, start, "relaxation")
    left = _options_left(curves, relaxation, known)
    program = _Program(curves, left, known)
    kept, bound, optimal = program.solve(time_limit, workers)
    return _allocation(instance, kept, min(bound, known.bound), optimal, start, "program")


def _allocation(
    instance: Instance, kept: Sequence[int], bound: float, optimal: bool, start: float, method: str
) -> Allocation:
    value = instance.value(kept)
    return Allocation(
        kept=tuple(kept),
        value=value,
        cost=instance.cost(kept),
        capacity=instance.capacity,
        bound=value if optimal else max(bound, value),
        optimal=optimal,
        seconds=time.monotonic() - start,
        method=method,
    )


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known before CP-SAT: the best choice, its value, a bound, and the price that gave the bound."""

    choice: Choice | None
    value: float
    bound: float
    price: float

    @property
    def proven(self) -> bool:
        return self.bound - self.value <= _SLACK * max(abs(self.bound), abs(self.value)) * 1e-3


def _explore(curves: Curves, relaxation: Relaxation | None) -> _Known:
    instance = curves.instance
    most = float(sum(values.max() for values in curves.values))
    bound, price = most, 0.0
    found: list[Choice] = []
    if relaxation is None:
        found.extend(choices_by_price(curves))
    else:
        _require_affordable(instance, relaxation.cheapest().cost)
        for point in relaxation.prices():
            found.append(point.choice)
            if point.bound < bound:
                bound, price = point.bound, point.price
    allowed = [choice for choice in dict.fromkeys(found) if instance.allows(kept_of(curves, choice))]

    def value(choice: Choice) -> float:
        return instance.value(kept_of(curves, choice))

    improved = [improve(curves, choice) for choice in sorted(allowed, key=value)[-_IMPROVED:]]
    best = max(improved, key=value, default=None)
    return _Known(best, -math.inf if best is None else value(best), bound, price)


def _require_affordable(instance: Instance, least: float) -> None:
    if least <= instance.capacity:
        return
    fixed = [group.name for group in instance.groups if len(group.options) == 1]
    raise AllocationError(
        f"expected some choice of channels within the target cost of {instance.capacity:g}, but the cheapest costs "
        f"{least:g}; raise the target (a lower pruning ratio), allow layers to go, or prune some of the "
        f"{len(fixed)} groups that must keep all their channels ({', '.join(fixed[:4]) or 'none'})"
    )


def _options_left(curves: Curves, relaxation: Relaxation | None, known: _Known) -> list[list[int]]:
    """Per group, the indices of the options that a choice better than the known one may have."""
    everything = [list(range(len(options))) for options in curves.options]
    if relaxation is None or known.choice is None:
        return everything
    least = known.value - _SLACK * max(1e-300, abs(known.value))
    left = [np.flatnonzero(worth >= least).tolist() for worth in relaxation.worth(known.price)]
    # The known choice itself always stays, as the start of the search.
    return [sorted({*options, at}) for options, at in zip(left, known.choice, strict=True)]


class _Program:
    """The CP-SAT model; importing OR-Tools takes half a second, so that waits until here."""

    def __init__(self, curves: Curves, left: Sequence[Sequence[int]], known: _Known) -> None:
        from ortools.sat.python import cp_model

        self._cp = cp_model
        self._instance = instance = curves.instance
        self._known = known
        self._options = [
            [group.options[option] for option in options] for group, options in zip(instance.groups, left, strict=True)
        ]
        self._model = cp_model.CpModel()
        self._kept = [
            self._model.new_int_var_from_domain(cp_model.Domain.from_values(options), f"kept[{group.name}]")
            for group, options in zip(instance.groups, self._options, strict=True)
        ]
        self._unit = _granularity(instance)
        self._scale = _value_scale(instance)
        self._model.add(sum(self._cost(layer) for layer in instance.layers) <= self._whole(instance.capacity, False))
        self._require_cuts()
        self._maximize(left)
        self._start(curves)

    def solve(self, time_limit: float, workers: int) -> tuple[list[int], float, bool]:
        """The kept counts, a bound, and whether the two meet."""
        solver = self._cp.CpSolver()
        solver.parameters.max_time_in_seconds = max(time_limit, 0.001)
        solver.parameters.num_workers = workers
        solver.parameters.random_seed = 0
        solver.parameters.linearization_level = 2
        status = solver.solve(self._model)
        if self._contradicts(solver, status):
            solver.parameters.cp_model_presolve = False
            status = solver.solve(self._model)
        known = self._known
        if self._contradicts(solver, status):
            return self._kept_before(), known.bound, False
        if status in (self._cp.OPTIMAL, self._cp.FEASIBLE):
            kept = [solver.value(variable) for variable in self._kept]
            bound = (solver.best_objective_bound + len(self._kept)) / float(self._scale)
            if self._instance.value(kept) < known.value:
                # Worth less by no more than the resolution of values.
                kept = self._kept_before()
            return kept, bound, status == self._cp.OPTIMAL
        if known.choice is not None:
            return self._kept_before(), known.bound, False
        least = (
            "each is dearer, or leaves no path from input to output"
            if status == self._cp.INFEASIBLE
            else (f"none was found in {time_limit:g} s, which proves nothing; give more time")
        )
        raise AllocationError(
            f"expected some choice of channels within the target cost of {self._instance.capacity:g}, but {least}"
        )

    def _contradicts(self, solver: cp_model.CpSolver, status: Any) -> bool:
        """Whether the answer denies the choice that was known before: no proof may rest on the solver alone."""
        if self._known.choice is None:
            return False
        known = float(sum(self._worth(group)[at] for group, at in enumerate(self._known.choice)))
        if status == self._cp.OPTIMAL:
            return solver.objective_value < known
        return status == self._cp.INFEASIBLE

    def _kept_before(self) -> list[int]:
        assert self._known.choice is not None
        return [group.options[at] for group, at in zip(self._instance.groups, self._known.choice, strict=True)]

    def _worth(self, group: int) -> list[int]:
        """The values of a group's options as whole numbers."""
        return [round(Fraction(value) * self._scale) for value in self._instance.groups[group].values]

    def _maximize(self, left: Sequence[Sequence[int]]) -> None:
        worth = []
        for number, options in enumerate(left):
            values = self._worth(number)
            worth.append(self._element(number, [values[option] for option in options]))
        total = sum(worth)
        if math.isfinite(self._known.bound):
            rounding = len(worth) + math.ceil(self._scale * abs(self._known.bound) * _SLACK)
            self._model.add(total <= math.ceil(self._known.bound * self._scale) + rounding)
        self._model.maximize(total)

    def _start(self, curves: Curves) -> None:
        if self._known.choice is None:
            return
        for variable, count in zip(self._kept, kept_of(curves, self._known.choice), strict=True):
            self._model.add_hint(variable, count)

    def _require_cuts(self) -> None:
        for cut in self._instance.cuts:
            self._model.add(sum(self._kept[group] for group in cut) >= 1)

    def _cost(self, layer: Layer) -> cp_model.LinearExprT:
        """The layer's cost in whole units, as an expression of the kept counts."""
        groups = layer.groups
        tuples = math.prod(len(self._options[group]) for group in groups)
        if len(groups) <= 2 and tuples <= _MOST_TUPLES:
            return self._by_table(layer)
        if isinstance(layer.cost, Product):
            return self._by_product(layer, layer.cost)
        return self._by_breakpoints(layer, layer.cost)

    def _by_table(self, layer: Layer) -> cp_model.LinearExprT:
        groups = layer.groups
        rows = [
            (*counts, self._whole(layer.at(dict(zip(groups, counts, strict=True)))))
            for counts in itertools.product(*(self._options[group] for group in groups))
        ]
        costs = sorted({row[-1] for row in rows})
        if len(costs) == 1:
            return costs[0]
        if len(groups) == 1:
            return self._element(groups[0], [row[1] for row in rows])
        cost = self._model.new_int_var_from_domain(self._cp.Domain.from_values(costs), f"cost[{layer.name}]")
        self._model.add_allowed_assignments([*(self._kept[group] for group in groups), cost], rows)
        return cost

    def _by_product(self, layer: Layer, cost: Product) -> cp_model.LinearExprT:
        rate = self._whole(cost.rate)
        inputs, most_in = self._count(layer.inputs)
        outputs, most_out = self._count(layer.outputs) if layer.outputs else (1, 1)
        if isinstance(inputs, int):
            return rate * inputs * outputs
        if isinstance(outputs, int):
            return rate * outputs * inputs
        product = self._model.new_int_var(0, most_in * most_out, f"pairs[{layer.name}]")
        self._model.add_multiplication_equality(product, [inputs, outputs])
        return rate * product

    def _by_breakpoints(self, layer: Layer, cost: Table) -> cp_model.LinearExprT:
        rows, columns = self._place(layer.inputs, cost.inputs), self._place(layer.outputs, cost.outputs)
        costs = [[self._whole(entry) for entry in row] for row in cost.costs]
        entries = [
            (row, column, costs[row - 1][column - 1] if row and column else 0)
            for row, column in itertools.product(range(len(cost.inputs) + 1), range(len(cost.outputs) + 1))
        ]
        found = self._model.new_int_var(0, max(entry for _, _, entry in entries), f"cost[{layer.name}]")
        self._model.add_allowed_assignments([rows, columns, found], entries)
        return found

    def _place(self, terms: Sequence[Term], points: Sequence[int]) -> cp_model.LinearExprT:
        """0 for no channels, else one more than the number of the breakpoint that serves so many."""
        count, most = self._count(terms) if terms else (1, 1)
        places = [0, *(1 + bisect.bisect_left(points, number) for number in range(1, most + 1))]
        if isinstance(count, int):
            return places[count]
        place = self._model.new_int_var(0, len(points), "")
        self._model.add_allowed_assignments([count, place], list(enumerate(places)))
        return place

    def _count(self, terms: Sequence[Term]) -> tuple[cp_model.LinearExprT, int]:
        """The channels of one side as a number or a variable, and how many there are at most."""
        most = sum(times * self._options[group][-1] for group, times in terms)
        least = sum(times * self._options[group][0] for group, times in terms)
        if most == least:
            return most, most
        if len(terms) == 1 and terms[0][1] == 1:
            return self._kept[terms[0][0]], most
        total = self._model.new_int_var(least, most, "")
        self._model.add(total == sum(times * self._kept[group] for group, times in terms))
        return total, most

    def _element(self, group: int, values: Sequence[int]) -> cp_model.LinearExprT:
        """The entry of `values` that belongs to the option that the group keeps."""
        if len(set(values)) == 1:
            return values[0]
        # A table, and not one Boolean per option that pick both count and value: under linear constraints over the
        # same Booleans the presolve of OR-Tools 9.15 loses solutions (an instance of this is among the tests).
        found = self._model.new_int_var_from_domain(self._cp.Domain.from_values(sorted(set(values))), "")
        rows = list(zip(self._options[group], values, strict=True))
        self._model.add_allowed_assignments([self._kept[group], found], rows)
        return found

    def _whole(self, cost: float, up: bool = True) -> int:
        exact = Fraction(cost) / self._unit
        return math.ceil(exact) if up else math.floor(exact)


def _granularity(instance: Instance) -> Fraction:
    """The unit of cost: what divides all whole costs, or 2**-32 of the capacity."""
    costs = list(itertools.chain.from_iterable(_entries(layer) for layer in instance.layers))
    if all(float(cost).is_integer() for cost in costs):
        return Fraction(math.gcd(*(int(cost) for cost in costs)) or 1)
    unit = Fraction(2) ** (math.ceil(math.log2(max(abs(instance.capacity), 1e-300))) - _COST_BITS)
    # Products of counts are kept exact, which a unit that divides no rate would not be.
    products = any(isinstance(layer.cost, Product) for layer in instance.layers)
    return min(unit, Fraction(1)) if products else unit


def _entries(layer: Layer) -> Iterable[float]:
    if isinstance(layer.cost, Product):
        return (layer.cost.rate,)
    return itertools.chain.from_iterable(layer.cost.costs)


def _value_scale(instance: Instance) -> Fraction:
    """What values are multiplied by to become whole: 1 if they are, else a power of two."""
    values = [value for group in instance.groups for value in group.values]
    total = sum(max(map(abs, group.values)) for group in instance.groups)
    if total < 2**_VALUE_BITS and all(float(value).is_integer() for value in values):
        return Fraction(1)
    return Fraction(2) ** (_VALUE_BITS - math.ceil(math.log2(max(total, 1e-300))))
