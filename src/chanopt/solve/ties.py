"""The order among equally cheap ones: few runs of the readers that pay, then near the natural order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chanopt.solve.pqtree import Kind, Node, PQTree, post_order

__all__ = ["frontier_of_few_runs", "runs"]

Bits = npt.NDArray[np.float32]
_MOST_CHILDREN = 4096
"""A walk over the children of a P-node is quadratic; wider nodes keep the natural order."""


def runs(order: Sequence[int], bits: Bits) -> int:
    """Return the number of runs of some sets in an order; row `a` of `bits` tells the sets of atom `a`."""
    stood = bits[list(order)]
    starts = stood[1:] * (1 - stood[:-1])
    return int(stood[0].sum() + starts.sum()) if len(stood) else 0


def frontier_of_few_runs(tree: PQTree, bits: Bits, positions: Sequence[float], sizes: Sequence[int]) -> tuple[int, ...]:
    """Return an order in which the sets of `bits` have few runs; the natural one if none is better.

    Bottom up: the children of a P-node are walked from nearest to nearest by the sets that begin or end
    between them, then the children of every node are turned so that neighbours differ least (exact by dynamic
    programming for the given sequence of children, each child being turned as a whole).
    """
    natural = tree.frontier(positions, sizes)
    if not bits.size or tree.root.kind is Kind.LEAF:
        return natural
    rank = {atom: place for place, atom in enumerate(natural)}
    done: dict[int, _Stretch] = {}
    for node in post_order(tree.root):
        done[id(node)] = _stretch(node, [done.pop(id(child)) for child in node.children], bits, rank)
    found = done[id(tree.root)].order
    return tuple(found) if runs(found, bits) < runs(natural, bits) else natural


@dataclass(frozen=True, slots=True)
class _Stretch:
    """The order chosen below a node, and whether it may be reversed as a whole."""

    order: list[int]
    free: bool


def _stretch(node: Node, children: list[_Stretch], bits: Bits, rank: dict[int, int]) -> _Stretch:
    if node.kind is Kind.LEAF:
        return _Stretch([node.mask.bit_length() - 1], True)
    if node.kind is Kind.P and len(children) <= _MOST_CHILDREN:
        children = sorted(children, key=lambda child: min(map(rank.__getitem__, (child.order[0], child.order[-1]))))
        children = _walk(children, bits)
    order = [atom for piece in _turn(children, bits) for atom in piece]
    return _Stretch(order, not node.fixed and all(child.free for child in children))


def _walk(children: list[_Stretch], bits: Bits) -> list[_Stretch]:
    """Return the children in the order of a walk that begins with the first and goes on to the nearest."""
    ends = [[child.order[0] for child in children], [child.order[-1] for child in children]]
    sides = [bits[atoms] for atoms in ends]
    # Leaves begin and end with the same atom; einsum, unlike a matrix product, starts no threads.
    tries = sides if ends[0] != ends[1] else sides[:1]
    sizes = [side.sum(axis=1) for side in tries]
    left = np.zeros(len(children), dtype=np.float32)
    walk = [0]
    for _ in range(len(children) - 1):
        left[walk[-1]] = np.inf
        end = sides[1][walk[-1]]
        steps = [size - 2 * np.einsum("ij,j->i", side, end) for side, size in zip(tries, sizes, strict=True)]
        walk.append(int(np.argmin(np.minimum(steps[0], steps[-1]) + left)))
    return [children[index] for index in walk]


def _turn(children: list[_Stretch], bits: Bits) -> list[list[int]]:
    """Turn the children so that neighbours differ in as few sets as possible."""
    options = [[c.order, c.order[::-1]] if c.free and len(c.order) > 1 else [c.order] for c in children]
    costs, back = [0.0] * len(options[0]), list[list[int]]()
    for before, after in itertools.pairwise(options):
        step = [[cost + _differ(b[-1], a[0], bits) for b, cost in zip(before, costs, strict=True)] for a in after]
        back.append([row.index(min(row)) for row in step])
        costs = [min(row) for row in step]
    pick = costs.index(min(costs))
    picks = [pick]
    for row in reversed(back):
        pick = row[pick]
        picks.append(pick)
    return [option[pick] for option, pick in zip(options, reversed(picks), strict=True)]


def _differ(first: int, second: int, bits: Bits) -> float:
    return float(np.abs(bits[first] - bits[second]).sum())
