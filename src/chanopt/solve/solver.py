"""`solve`: from an instance to a solution with a proof."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import networkx as nx

from chanopt.solve.arrange import arrange
from chanopt.solve.contract import contract
from chanopt.solve.decision import Decision
from chanopt.solve.instance import Instance
from chanopt.solve.problem import Demand, Scale, demands_of, split
from chanopt.solve.search import decide
from chanopt.solve.solution import Order, Solution, cost, parts_of, touched_blocks
from chanopt.solve.touched import touch_few

__all__ = ["solve"]


def solve(instance: Instance, *, time_limit: float = 10.0, workers: int = 1) -> Solution:
    """Find the orders that pay least, with a proof; at the time limit, the best found and a bound.

    `time_limit` is in seconds of wall time; `workers` is the number of CP-SAT threads, which with 1 gives the
    same answer every time. Integer weights are counted exactly up to a total of 2**60, others to 2**-50 of
    their total. Among the cheapest orders: preferences hold where they can, heaviest first; then the readers
    that pay have few runs; then the order is near the natural one.

    Readers with a grain pay for the aligned blocks that they touch. An instance of only such readers, of one value
    and one grain and without hard ranges, is a packing program with a bound of its own. In others the order is
    the best of several: see `chanopt.solve.touched`. Preferences then hold only as far as the range program's
    order is the cheapest.
    """
    start = time.monotonic()
    deadline = start + time_limit
    scale = Scale.of(_payable(instance))
    problems = [contract(problem) for problem in split(instance, scale)]
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
    proven = sum(decision.bound for decision in decisions)
    if any(reader.grain for reader in instance.readers):
        touching = touch_few(instance, scale, orders, (paying, cut), deadline, workers)
        orders, proven = touching.orders, max(proven + touching.bound, touching.joint)
    return _solution(instance, scale, orders, proven, decisions, start)


def _payable(instance: Instance) -> list[float]:
    """Return what each reader and edge pays at most."""
    blocks = [min(len(r.set), -(-instance.channels // r.grain)) if r.grain else 1 for r in instance.readers]
    paid = [reader.weight * count for reader, count in zip(instance.readers, blocks, strict=True)]
    return [*paid, *(edge.weight for edge in instance.edges)]


def _solution(
    instance: Instance,
    scale: Scale,
    orders: tuple[Order, ...],
    proven: int,
    decisions: Sequence[Decision],
    start: float,
) -> Solution:
    gathered, cut, objective = cost(instance, orders)
    touched = touched_blocks(instance, orders)
    # A reader may turn out free by luck: what counts is what the orders cost.
    names, edges = set(gathered), set(cut)
    paid = sum(scale.up(reader.weight) for reader in instance.readers if reader.name in names)
    paid += sum(scale.up(edge.weight) for edge in instance.edges if edge.name in edges)
    paid += sum(scale.up(reader.weight) * touched[reader.name] for reader in instance.readers if reader.grain)
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
        touched=touched,
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
        order = arrange(instance.channels, must, _inside(wishes, values), pays)
        orders.update(dict.fromkeys(values, order))
    return tuple(orders[value] for value in range(instance.values))


def _inside(demands: Iterable[Demand], values: set[int]) -> list[Demand]:
    return [demand for demand in demands if demand.value in values]
