"""Values that some best choice keeps in one part become one, before anything is decided.

Most values of a residual or dense stage only hand channels on: the one behind a conv, behind an addition, a slice of a
concat. Each would be one more link to cut for the master, mostly in ways that cost the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import networkx as nx

from chanopt.solve.conflicts import Graph, forbidden, graph_of
from chanopt.solve.problem import Item, Link, Problem, linked

__all__ = ["contract"]


def contract(problem: Problem) -> Problem:
    """Return a problem with the same best cost in which values are joined across links that need not be cut.

    Let v have no reader that can be free and no pin, and one link, to u, that costs at least as much as its others
    together. Whatever choice parts the two, v can move to the part of u for no more: if the hard items of v hold there.
    They do where they are hard at u; and where nothing in that part overlaps them, for a set that overlaps none is no
    constraint to them (McConnell, "A certifying algorithm for the consecutive-ones property", SODA 2004, section 3).
    """
    if not problem.links:
        return problem
    graph = graph_of(problem)
    joins = _Joins(problem, graph)
    into: dict[int, int] = {}
    waiting = list(reversed(problem.values))
    while waiting:
        value = waiting.pop()
        if value not in graph or (other := joins.join(value)) is None:
            continue
        into[value] = other
        waiting += [*(near for near in graph[value] if near != other), other]
        joins.merge(value, other)
    return _merged(problem, into, graph) if into else problem


class _Joins:
    """Which values may join which, in a graph of links that shrinks."""

    def __init__(self, problem: Problem, graph: Graph) -> None:
        self.graph = graph
        for _, _, data in graph.edges(data=True):
            data["links"] = [data["link"]]
            data["weight"] = problem.links[data["link"]].weight
        hard = problem.items[: problem.hard]
        always = set(forbidden(problem))
        items = [item for number, item in enumerate(problem.items) if number not in always]
        self.fixed = {item.value for item in items if item.readers or item.sequence}
        self.holds: dict[int, set[int]] = {value: set() for value in problem.values}
        for item in hard:
            self.holds[item.value].add(item.mask)
        self.harmless = {value: set(masks) for value, masks in self.holds.items()}
        for mask in {item.mask for item in hard}:
            for value in self._beside(mask, items):
                self.harmless[value].add(mask)

    def _beside(self, mask: int, items: list[Item]) -> Iterator[int]:
        """Yield the values whose part, if it has no value that holds the mask, has no item that overlaps it.

        That stays true as values merge, since a merged value holds what either held: a path that meets no holder among
        the merged values met none before.
        """
        crossed = {item.value for item in items if linked(mask, False, item.mask, bool(item.sequence))}
        without = self.graph.subgraph([value for value in self.graph if mask not in self.holds[value]])
        for values in nx.connected_components(without) if crossed else [without]:
            if crossed.isdisjoint(values):
                yield from values

    def join(self, value: int) -> int | None:
        """Return the value that one may join; None if there is none."""
        if value in self.fixed:
            return None
        weights = {near: data["weight"] for near, data in self.graph[value].items()}
        total = sum(weights.values())
        best = sorted(weights, key=lambda near: (-weights[near], near))
        return next((near for near in best if 2 * weights[near] >= total and self._holds(value, near)), None)

    def _holds(self, value: int, near: int) -> bool:
        return self.holds[value] <= self.harmless[near] | self.holds[near]

    def merge(self, value: int, other: int) -> None:
        """Let a value join another: links that are now parallel are one."""
        for near, data in self.graph[value].items():
            if near == other:
                continue
            if not self.graph.has_edge(near, other):
                self.graph.add_edge(near, other, links=[], weight=0)
            joined = self.graph.edges[near, other]
            joined["links"] = joined["links"] + data["links"]
            joined["weight"] += data["weight"]
        self.graph.remove_node(value)
        self.holds[other] |= self.holds[value]


def _merged(problem: Problem, into: dict[int, int], graph: Graph) -> Problem:
    def root(value: int) -> int:
        while value in into:
            value = into[value]
        return value

    moved = [replace(item, value=root(item.value)) for item in problem.items]
    hard = list(dict.fromkeys(moved[: problem.hard]))
    links = tuple(
        Link(
            (min(first, second), max(first, second)),
            data["weight"],
            tuple(edge for link in data["links"] for edge in problem.links[link].edges),
        )
        for first, second, data in graph.edges(data=True)
    )
    return Problem(problem.atoms, tuple(sorted(graph)), (*hard, *moved[problem.hard :]), len(hard), links)
