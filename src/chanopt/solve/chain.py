"""Values in a chain, as in a residual stage: an exact dynamic program over the intervals of the chain.

A part of a chain is an interval of it. What an interval pays as one part is a problem of a single value, and
it pays at least what two halves of it pay apart, so most long intervals are ruled out without being solved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import networkx as nx
import numpy as np
import numpy.typing as npt

from chanopt.solve.conflicts import Graph, graph_of
from chanopt.solve.decision import Decision
from chanopt.solve.pqtree import PQTree
from chanopt.solve.problem import Problem, insert, restrict

__all__ = ["chain_of", "decide_chain", "path_of"]

Decide = Callable[[Problem], Decision]
Ints = npt.NDArray[np.int64]


def chain_of(problem: Problem) -> list[int] | None:
    """Return the values in the order of their chain; None if the links are no chain of two values or more."""
    return path_of(graph_of(problem)) if problem.links else None


def path_of(graph: Graph) -> list[int] | None:
    """Return the values of a graph in the order of the path that it is; None if it is none."""
    if len(graph) == 1:
        return list(graph)
    ends = [value for value, degree in graph.degree if degree == 1]
    if len(ends) != 2 or graph.number_of_edges() != len(graph) - 1 or not nx.is_connected(graph):
        return None
    return nx.shortest_path(graph, source=ends[0], target=ends[1])


def decide_chain(problem: Problem, chain: Sequence[int], decide: Decide, deadline: float = math.inf) -> Decision:
    """Solve a problem whose links are a chain; `decide` solves its problems of a single value.

    The answer is proven as far as those of `decide` are. Past the deadline (of `time.monotonic`) an interval is only
    cut, not taken as one part, and counts as what its halves pay at least.
    """
    table = _Table.of(problem, chain)
    solved: list[Decision] = []
    for length in range(1, len(chain) + 1):
        for start in range(len(chain) - length + 1):
            stop = start + length
            if table.split(start, stop) and (length == 1 or time.monotonic() < deadline):
                numbers, part = _part(problem, set(chain[start:stop]))
                decision = decide(part) if _consistent(part) else None
                table.join(start, stop, decision, numbers)
                solved += [decision] if decision else []
            table.settle(start, stop)
    free, cut = table.chosen()
    return Decision(
        frozenset(free),
        frozenset(cut),
        int(table.cost[0, len(chain)]),
        int(table.low[0, len(chain)]),
        sum(decision.cuts for decision in solved),
        sum(decision.masters for decision in solved),
    )


_NEVER = 1 << 61
"""More than anything costs; two of it and a weight are no overflow."""


@dataclass(slots=True)
class _Table:
    """The best known choices in the intervals of a chain: entry (start, stop) of each array is for one interval."""

    links: list[int]
    weights: Ints
    together: Ints
    """What an interval pays at least as one part; `_NEVER` if its hard items conflict."""
    low: Ints
    """What it pays at least."""
    cost: Ints
    middle: Ints
    """Where it is cut, if that is the best."""
    free: dict[tuple[int, int], list[int]]
    """The free items of intervals that are best as one part."""

    @classmethod
    def of(cls, problem: Problem, chain: Sequence[int]) -> _Table:
        """Make the table of a chain, with nothing in it."""
        graph = graph_of(problem)
        links = [graph.edges[step]["link"] for step in pairwise(chain)]
        weights = np.array([problem.links[link].weight for link in links], dtype=np.int64)
        empty = np.zeros((len(chain) + 1, len(chain) + 1), dtype=np.int64)
        return cls(links, weights, empty, empty.copy(), empty.copy(), empty.copy(), {})

    def split(self, start: int, stop: int) -> bool:
        """Cut an interval where that is best; False if it can be no better as one part."""
        at = start, stop
        if stop - start == 1:
            self.low[at] = self.cost[at] = _NEVER
            return True
        left, right = (start, slice(start + 1, stop)), (slice(start + 1, stop), stop)
        weights = self.weights[start : stop - 1]
        costs = self.cost[left] + self.cost[right] + weights
        best = int(costs.argmin())
        self.middle[at], self.cost[at] = start + 1 + best, costs[best]
        self.low[at] = (self.low[left] + self.low[right] + weights).min()
        self.together[at] = min(_NEVER, (self.together[left] + self.together[right]).max())
        return bool(self.together[at] < self.cost[at])

    def join(self, start: int, stop: int, decision: Decision | None, numbers: Sequence[int]) -> None:
        """Note what an interval pays as one part, None if it cannot be one.

        `numbers` are its items in the whole problem.
        """
        at = start, stop
        self.together[at] = _NEVER if decision is None else max(int(self.together[at]), decision.bound)
        if decision is not None and decision.cost < self.cost[at]:
            self.cost[at] = decision.cost
            self.free[at] = [numbers[number] for number in decision.free]

    def settle(self, start: int, stop: int) -> None:
        """Note what an interval pays at least, in either way."""
        self.low[start, stop] = min(self.low[start, stop], self.together[start, stop])

    def chosen(self) -> tuple[list[int], list[int]]:
        """Return the free items and the links that are cut."""
        free: list[int] = []
        cut: list[int] = []
        left = [(0, len(self.links) + 1)]
        while left:
            start, stop = left.pop()
            if (start, stop) in self.free:
                free += self.free[start, stop]
                continue
            middle = int(self.middle[start, stop])
            cut.append(self.links[middle - 1])
            left += [(start, middle), (middle, stop)]
        return free, cut


def _part(problem: Problem, values: set[int]) -> tuple[list[int], Problem]:
    """Return the problem of some values as one part, and the numbers of its items in the whole problem."""
    numbers = [number for number, item in enumerate(problem.items) if item.value in values]
    one = min(values)
    part = restrict(problem, numbers)
    return numbers, replace(part, values=(one,), items=tuple(replace(item, value=one) for item in part.items), links=())


def _consistent(part: Problem) -> bool:
    tree = PQTree(part.atoms)
    return all(insert(tree, item) for item in part.items[: part.hard])
