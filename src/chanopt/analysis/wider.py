"""Blocks that bring channels nobody reads behind a concat, where those that somebody reads are no range."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_

import networkx as nx

from chanopt.errors import InstanceError
from chanopt.solve import Block, Instance
from chanopt.solve.pqtree import labels_of, mask_of

__all__ = ["wider"]


def wider(instance: Instance, live: Sequence[Iterable[int]]) -> Instance | None:
    """The instance with every block grown by the blocks that it crosses; None if nothing grows.

    A block is what one operand brings to a concat. Where it holds parts of several blocks of the value it comes from,
    no shared order makes all of them ranges; bringing those blocks whole copies nothing and leaves the order shared.
    An operand can bring what it and the values before it have, `live` by value, and no other operand brings; to a value
    whose order is pinned it brings what it did. Of two that could bring the same, the first does.
    """
    pinned = {pin.value for pin in instance.pins}
    blocks, values = [mask_of(block.set) for block in instance.blocks], [block.value for block in instance.blocks]
    can = _can_bring(instance, [mask_of(labels) for labels in live])
    grew = True
    while grew:
        grew = False
        for number, value in enumerate(values):
            if value in pinned:
                continue
            beside = reduce(or_, (block for n, block in enumerate(blocks) if values[n] == value and n != number), 0)
            for other in set(blocks):
                more = other & ~blocks[number]
                crosses = other & blocks[number] and blocks[number] & ~other
                if more and crosses and not more & (beside | ~can[number]):
                    blocks[number] |= more
                    grew = True
    grown = tuple(Block(tuple(labels_of(block)), value) for block, value in zip(blocks, values, strict=True))
    try:
        return replace(instance, blocks=grown) if grown != instance.blocks else None
    except InstanceError:  # blocks within blocks of one value, of which no order makes ranges any more
        return None


def _can_bring(instance: Instance, live: Sequence[int]) -> list[int]:
    """By block, the channels that the values it comes from, and those before them, have."""
    flows: nx.DiGraph[int] = nx.DiGraph()
    flows.add_nodes_from(range(len(live)))
    flows.add_edges_from((edge.source, edge.target) for edge in instance.edges)
    had = [reduce(or_, (live[before] for before in nx.ancestors(flows, value)), live[value]) for value in flows]
    from_ = [(mask_of(block.set), flows.predecessors(block.value)) for block in instance.blocks]
    return [reduce(or_, (had[value] for value in values if had[value] & block), block) for block, values in from_]
