"""Values in a chain, as in a residual stage: an exact dynamic program over the intervals of the chain.

A part of a chain is an interval of it. What an interval pays as one part is a problem of a single value, and
it pays at least what two halves of it pay apart, so most long intervals are ruled out without being solved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import networkx as nx

from chanopt.solve.conflicts import graph_of
from chanopt.solve.decision import Decision
from chanopt.solve.pqtree import PQTree
from chanopt.solve.problem import Problem, insert

__all__ = ["chain_of", "decide_chain"]

Decide = Callable[[Problem], Decision]


def chain_of(problem: Problem) -> list[int] | None:
    """Return the values in the order of their chain; None if the links are no chain."""
    graph = graph_of(problem)
    ends = [value for value, degree in graph.degree if degree == 1]
    if len(ends) != 2 or len(problem.links) != len(problem.values) - 1:
        return None
    if any(degree > 2 for _, degree in graph.degree):
        return None
    return nx.shortest_path(graph, source=ends[0], target=ends[1])


@dataclass(frozen=True, slots=True)
class _Best:
    """The best known choice in an interval of the chain."""

    together: float
    """What the interval pays at least as one part; infinite if its hard items conflict."""
    low: float
    """What it pays at least."""
    cost: float
    free: tuple[int, ...]
    cut: tuple[int, ...]


def decide_chain(problem: Problem, chain: Sequence[int], decide: Decide) -> Decision:
    """Solve a problem whose links are a chain; `decide` solves its problems of a single value.

    The answer is proven as far as those of `decide` are.
    """
    graph = graph_of(problem)
    links = [graph.edges[step]["link"] for step in pairwise(chain)]
    best: dict[tuple[int, int], _Best] = {}
    solved: list[Decision] = []

    def noted(part: Problem) -> Decision:
        solved.append(decide(part))
        return solved[-1]

    for length in range(1, len(chain) + 1):
        for first in range(len(chain) - length + 1):
            best[first, first + length] = _interval(problem, chain, links, best, first, first + length, noted)
    whole = best[0, len(chain)]
    return Decision(
        frozenset(whole.free),
        frozenset(whole.cut),
        int(whole.cost),
        int(whole.low),
        sum(decision.cuts for decision in solved),
        sum(decision.masters for decision in solved),
    )


def _interval(
    problem: Problem,
    chain: Sequence[int],
    links: Sequence[int],
    best: dict[tuple[int, int], _Best],
    start: int,
    stop: int,
    decide: Decide,
) -> _Best:
    """Return the best of one part, solved only if it might be, and of a cut at every link inside."""
    split = _Best(0, math.inf, math.inf, (), ())
    together = 0.0
    for middle in range(start + 1, stop):
        left, right, link = best[start, middle], best[middle, stop], links[middle - 1]
        weight = problem.links[link].weight
        together = max(together, left.together + right.together)
        low = min(split.low, left.low + right.low + weight)
        cost = left.cost + right.cost + weight
        if cost < split.cost:
            split = _Best(0, low, cost, left.free + right.free, (*left.cut, *right.cut, link))
        split = replace(split, low=low)
    if together >= split.cost:
        return replace(split, together=together, low=min(split.low, together))
    numbers, part = _part(problem, set(chain[start:stop]))
    if not _consistent(part):
        return replace(split, together=math.inf)
    decision = decide(part)
    together = max(together, decision.bound)
    low = min(split.low, together)
    if decision.cost >= split.cost:
        return replace(split, together=together, low=low)
    free = tuple(numbers[number] for number in sorted(decision.free))
    return _Best(together, low, decision.cost, free, ())


def _part(problem: Problem, values: set[int]) -> tuple[list[int], Problem]:
    """Return the problem of some values as one part, and the numbers of its items in the whole problem."""
    numbers = [number for number, item in enumerate(problem.items) if item.value in values]
    one = min(values)
    items = tuple(replace(problem.items[number], value=one) for number in numbers)
    hard = sum(number < problem.hard for number in numbers)
    return numbers, Problem(problem.atoms, (one,), items, hard, ())


def _consistent(part: Problem) -> bool:
    tree = PQTree(part.atoms)
    return all(insert(tree, item) for item in part.items[: part.hard])
