"""`solve`: from an instance to a solution with a proof."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import networkx as nx
import numpy as np

from chanopt.solve.decision import Decision
from chanopt.solve.instance import Instance
from chanopt.solve.pqtree import PQTree
from chanopt.solve.problem import Demand, Scale, collapse, demands_of, insert, items_of, split
from chanopt.solve.search import decide
from chanopt.solve.solution import Order, Solution, cost, parts_of
from chanopt.solve.ties import frontier_of_few_runs

__all__ = ["solve"]


def solve(instance: Instance, *, time_limit: float = 10.0, workers: int = 1) -> Solution:
    """Find the orders that pay least, with a proof; at the time limit, the best found and a bound.

    `time_limit` is in seconds of wall time; `workers` is the number of CP-SAT threads, which with 1 gives the
    same answer every time. Integer weights are counted exactly up to a total of 2**60, others to 2**-50 of
    their total. Among the cheapest orders: preferences hold where they can, heaviest first; then the readers
    that pay have few runs; then the order is near the natural one.
    """
    start = time.monotonic()
    deadline = start + time_limit
    scale = Scale.of([item.weight for item in (*instance.readers, *instance.edges)])
    problems = split(instance, scale)
    decisions = [decide(problem, deadline, workers) for problem in problems]
    paying = {
        reader
        for problem, decision in zip(problems, decisions, strict=True)
        for number, item in enumerate(problem.items)
        if number not in decision.free
        for reader in item.readers
    }
    cut = {
        edge
        for problem, decision in zip(problems, decisions, strict=True)
        for link in decision.cut
        for edge in problem.links[link].edges
    }
    orders = _orders(instance, scale, paying, cut)
    return _solution(instance, scale, orders, decisions, start)


def _solution(
    instance: Instance, scale: Scale, orders: tuple[Order, ...], decisions: Sequence[Decision], start: float
) -> Solution:
    gathered, cut, objective = cost(instance, orders)
    proven = sum(decision.bound for decision in decisions)
    # A reader may turn out free by luck: what counts is what the orders cost.
    names, edges = set(gathered), set(cut)
    paid = sum(scale.up(reader.weight) for reader in instance.readers if reader.name in names)
    paid += sum(scale.up(edge.weight) for edge in instance.edges if edge.name in edges)
    optimal = paid <= proven
    return Solution(
        order=orders[0],
        orders=orders,
        parts=parts_of(instance, orders),
        gathered=gathered,
        cut=cut,
        objective=objective,
        bound=objective if optimal else min(scale.down(proven), objective),
        optimal=optimal,
        seconds=time.monotonic() - start,
        stats={
            "problems": len(decisions),
            "cuts": sum(decision.cuts for decision in decisions),
            "masters": sum(decision.masters for decision in decisions),
        },
    )


def _orders(instance: Instance, scale: Scale, paying: set[int], cut: set[int]) -> tuple[Order, ...]:
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(instance.values))
    graph.add_edges_from((edge.source, edge.target) for number, edge in enumerate(instance.edges) if number not in cut)
    hard, soft = demands_of(instance, scale)
    wishes = [Demand(wish.set, wish.value) for wish in sorted(instance.prefer, key=lambda wish: -wish.weight)]
    orders: dict[int, Order] = {}
    for values in nx.connected_components(graph):
        must = _inside([*hard, *(demand for demand in soft if demand.readers[0] not in paying)], values)
        pays = _inside((demand for demand in soft if demand.readers[0] in paying), values)
        order = _order(instance.channels, must, _inside(wishes, values), pays)
        orders.update(dict.fromkeys(values, order))
    return tuple(orders[value] for value in range(instance.values))


def _inside(demands: Iterable[Demand], values: set[int]) -> list[Demand]:
    return [demand for demand in demands if demand.value in values]


def _order(channels: int, must: Sequence[Demand], wishes: Sequence[Demand], pays: Sequence[Demand]) -> Order:
    """Return the order of a part: what must hold, what is wished if it can, few runs of what pays."""
    weightless = [demand for demand in must if demand.readers and not demand.weight]
    # A sequence in place first is a line at once; later sets then find little left to arrange.
    must = sorted((d for d in must if d not in weightless), key=lambda d: (not d.ordered, -len(d.channels)))
    if not channels:
        return ()
    named = {channel for demand in (*must, *wishes, *weightless, *pays) for channel in demand.channels}
    # Channels that nobody names stay single, so that they can keep their natural places.
    alone = [Demand((channel,), 0) for channel in range(channels) if channel not in named]
    demands = [*alone, *must, *wishes, *weightless, *pays]
    atoms = collapse(channels, demands)
    items = items_of(demands, atoms)[len(alone) :]
    tree = PQTree(len(atoms.members))
    if not all(insert(tree, item) for item in items[: len(must)]):
        raise AssertionError("the items of a part were decided to be free together")
    refused = [item for item in items[len(must) :] if not insert(tree, item)]
    bits = np.array([[item.mask >> atom & 1 for item in refused] for atom in range(tree.size)], dtype=np.float32)
    sizes = [len(members) for members in atoms.members]
    positions = [sum(members) / len(members) for members in atoms.members]
    frontier = frontier_of_few_runs(tree, bits, positions, sizes)
    return tuple(channel for atom in frontier for channel in atoms.members[atom])
