"""One order in which some demands hold: what must hold, what is wished, and few runs of the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chanopt.solve.pqtree import PQTree
from chanopt.solve.problem import Demand, collapse, insert, items_of
from chanopt.solve.ties import frontier_of_few_runs

__all__ = ["arrange"]


def arrange(channels: int, must: Sequence[Demand], wishes: Sequence[Demand], pays: Sequence[Demand]) -> tuple[int, ...]:
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
