"""The master: which readers are free and which links are cut, under the cuts found so far (CP-SAT)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chanopt.solve.conflicts import Cut, Flow
from chanopt.solve.problem import Problem

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

__all__ = ["Master", "Proposal"]

_FLOAT_EXACT = 2**53
"""Integers up to this are exact as floats, the form in which CP-SAT gives its bound."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Items that the master would have free, hard ones included, and links it would cut.

    `cost` is what they leave to be paid and `bound` what any choice pays at least; both are equal unless the
    time ran out.
    """

    free: frozenset[int]
    cut: frozenset[int]
    cost: int
    bound: int


class Master:
    """A CP-SAT model that grows by cuts; importing OR-Tools takes half a second, so that waits until here."""

    def __init__(self, problem: Problem, workers: int) -> None:
        """Build the model without cuts."""
        from ortools.sat.python import cp_model

        self._problem = problem
        self._solver = cp_model.CpSolver()
        parameters = self._solver.parameters
        parameters.num_workers = workers
        parameters.random_seed = 0
        parameters.linearization_level = 2
        parameters.cp_model_probing_level = 0
        parameters.symmetry_level = 0
        self._model = cp_model.CpModel()
        soft = range(problem.hard, len(problem.items))
        self._pays = {item: self._model.new_bool_var(f"pays{item}") for item in soft}
        self._cuts = [self._model.new_bool_var(f"cuts{link}") for link in range(len(problem.links))]
        self._cost = cp_model.LinearExpr.weighted_sum(
            [*self._pays.values(), *self._cuts],
            [problem.items[item].weight for item in self._pays] + [link.weight for link in problem.links],
        )
        self._model.minimize(self._cost)

    def add(self, cuts: Iterable[Cut]) -> None:
        """Add cuts: of the soft items, at least this many pay, unless links are cut."""
        for cut in cuts:
            paying = [self._pays[item] for item in sorted(cut.items) if item >= self._problem.hard]
            helping = [gain * self._cuts[link] for link, gain in cut.links]
            self._model.add(sum(paying) + sum(helping) >= len(cut.items) - cut.limit)

    def add_flow(self, flow: Flow) -> None:
        """Add a family: the places that come down to a value cover its free members and what goes on down."""
        carried = [self._model.new_int_var(0, step.places, "") for step in flow.steps]
        down: dict[int, list[cp_model.LinearExprT]] = {}
        for step, carry in zip(flow.steps, carried, strict=True):
            down.setdefault(step.above, []).append(carry)
            self._model.add(carry + step.places * self._cuts[step.link] <= step.places)
        self._model.add(sum([*self._free(flow.root), *down.get(-1, [])]) <= 2)
        for number, (step, carry) in enumerate(zip(flow.steps, carried, strict=True)):
            needed = sum([*self._free(step.members), *down.get(number, [])])
            self._model.add(needed <= carry + step.places * self._cuts[step.link])

    def add_cycle(self, links: Sequence[int]) -> None:
        """Forbid that exactly one link of a cycle is cut: its ends are in one part all the same."""
        for link in links:
            others = [self._cuts[other] for other in links if other != link]
            self._model.add(self._cuts[link] <= sum(others))

    def _free(self, members: Iterable[int]) -> list[cp_model.LinearExprT]:
        """Return for every member 1 if it is free, else 0; hard ones are free."""
        return [1 - self._pays[member] if member in self._pays else 1 for member in members]

    def at_least(self, bound: int) -> None:
        """Tell the model a bound that was proven."""
        self._model.add(self._cost >= bound)

    def hint(self, free: Iterable[int], cut: Iterable[int]) -> None:
        """Offer a choice that satisfies every cut."""
        kept, parted = set(free), set(cut)
        self._model.clear_hints()
        for item, pays in self._pays.items():
            self._model.add_hint(pays, item not in kept)
        for link, variable in enumerate(self._cuts):
            self._model.add_hint(variable, link in parted)

    def solve(self, seconds: float) -> Proposal | None:
        """Return the cheapest choice under the cuts, or the best found in time; None if there is none."""
        from ortools.sat.python import cp_model

        self._solver.parameters.max_time_in_seconds = max(seconds, 0.001)
        status = self._solver.solve(self._model)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None
        value = self._solver.boolean_value
        free = [item for item, pays in self._pays.items() if not value(pays)]
        cut = [link for link, variable in enumerate(self._cuts) if value(variable)]
        problem = self._problem
        cost = sum(problem.items[item].weight for item in self._pays if item not in set(free))
        cost += sum(problem.links[link].weight for link in cut)
        bound = cost if status == cp_model.OPTIMAL else self._lower()
        return Proposal(frozenset([*range(problem.hard), *free]), frozenset(cut), cost, bound)

    def _lower(self) -> int:
        bound = self._solver.best_objective_bound
        return math.floor(bound if bound <= _FLOAT_EXACT else bound * (1 - 2**-50))
