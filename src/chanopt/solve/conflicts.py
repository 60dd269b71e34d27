"""Which items cannot all be ranges in one order, and the cuts that say so to the master.

Three sets conflict or not by which of the seven regions of their Venn diagram are empty, so the test of a
triple is a count and a look-up. A family in which every triple conflicts has at most two ranges in one order,
however large it is; such families give much stronger cuts than their triples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations, pairwise
from typing import TypeAlias

import networkx as nx
import numpy as np
import numpy.typing as npt

from chanopt.solve.pqtree import PQTree, labels_of
from chanopt.solve.problem import Item, Problem, insert

__all__ = [
    "Cut",
    "Graph",
    "Triples",
    "cliques",
    "cut_of",
    "forbidden",
    "graph_of",
    "initial_cuts",
    "shrink",
    "triples",
    "widen",
]

Triples: TypeAlias = "list[list[int]]"
"""Bit k of `triples[i][j]` is set if items i, j and k conflict."""
Counts: TypeAlias = "npt.NDArray[np.int_]"
Graph: TypeAlias = "nx.Graph[int]"
"""Values joined by links; the attribute `link` of an edge is the number of the link."""

_MOST_MASKS = 128
"""The test of all triples takes about 0.3 s for as many items; with more, every cut comes from the trees."""
_MOST_CLIQUES = 3000
_MOST_CUTS = 1000
_MOST_CHOICES = 100
_MOST_SETS = 8
"""The regions of so many sets are still a number of a few hundred bits."""
_MOST_STEPS = 600


@dataclass(frozen=True, slots=True)
class Cut:
    """At most `limit` of the items are free, and per cut link as many more as its coefficient says."""

    items: frozenset[int]
    limit: int
    links: tuple[tuple[int, int], ...] = ()
    """(link, coefficient)."""


@cache
def _conflicting_regions() -> npt.NDArray[np.bool_]:
    """Whether three sets conflict, by the code of their non-empty regions.

    Bit r - 1 of the code says that the region r = 1 .. 7 is not empty, where bit s of r says that set s holds
    it.
    """
    return np.array([not _hold(code << 1, 3) for code in range(128)])


def triples(problem: Problem) -> Triples | None:
    """Test every triple of items, or return None if they are too many different sets.

    Equal sets, as the same block of many values, are tested once: two of them and a third never conflict.
    """
    masks = list(dict.fromkeys(item.mask for item in problem.items))
    if not 3 <= len(masks) <= _MOST_MASKS:
        return None
    pair = _overlaps(masks, masks)
    table = _conflicting_regions()
    number = {mask: set_ for set_, mask in enumerate(masks)}
    of = [number[item.mask] for item in problem.items]
    rows: Triples = []
    for first, mask in enumerate(masks):
        conflict = table[_codes(pair, _overlaps([mask & other for other in masks], masks), first)]
        packed = np.packbits(conflict[:, of], axis=1, bitorder="little")
        found = [int.from_bytes(row.tobytes(), "little") for row in packed]
        rows.append([found[set_] for set_ in of])
    return [rows[set_] for set_ in of]


def _overlaps(first: Sequence[int], second: Sequence[int]) -> Counts:
    """Return how many atoms each mask shares with each other.

    Integers of Python, not a matrix product: BLAS would start threads, which costs far more than these sums.
    """
    return np.array([[(a & b).bit_count() for b in second] for a in first])


def _codes(pair: Counts, shared: Counts, i: int) -> Counts:
    """Return the codes of the triples (i, j, k) for all j and k; 0 where two of the three are one item."""
    ij, ik, jk = pair[i][:, None], pair[i][None, :], pair
    size = np.diagonal(pair)
    regions = (
        size[i] - ij - ik + shared,
        size[:, None] - ij - jk + shared,
        ij - shared,
        size[None, :] - ik - jk + shared,
        ik - shared,
        jk - shared,
        shared,
    )
    code = np.zeros(pair.shape, dtype=np.int_)
    for bit, region in enumerate(regions):
        code |= (region > 0).astype(np.int_) << bit
    code[i, :] = code[:, i] = 0
    np.fill_diagonal(code, 0)
    return code


def cliques(conflicts: Triples, deadline: float = math.inf) -> list[int]:
    """Return families, as masks, that cover every conflicting triple and in which every triple conflicts.

    Greedy: a family starts from a triple not yet covered and takes in the first item that fits, until none
    does. Past the deadline (of `time.monotonic`), and past many families, the rest stays uncovered.
    """
    count = len(conflicts)
    covered = [[0] * count for _ in range(count)]
    found: list[int] = []
    for first, second in combinations(range(count), 2):
        later = conflicts[first][second] >> (second + 1) << (second + 1)
        if time.monotonic() >= deadline:
            break
        while (open_ := later & ~covered[first][second]) and len(found) < _MOST_CLIQUES:
            third = (open_ & -open_).bit_length() - 1
            members, mask = _grow(conflicts, [first, second, third])
            for a, b in combinations(members, 2):
                covered[a][b] |= mask
            found.append(mask)
    return found


def _grow(conflicts: Triples, members: list[int]) -> tuple[list[int], int]:
    """Extend a family in which every triple conflicts until no item fits; return it, and as a mask."""
    members = list(members)
    fitting = -1
    for a, b in combinations(members, 2):
        fitting &= conflicts[a][b]
    while fitting:
        new = (fitting & -fitting).bit_length() - 1
        for member in members:
            fitting &= conflicts[member][new]
        members.append(new)
    mask = 0
    for member in members:
        mask |= 1 << member
    return sorted(members), mask


def graph_of(problem: Problem, without: Iterable[int] = ()) -> Graph:
    """Return the values joined by all links but those given."""
    graph: Graph = nx.Graph()
    graph.add_nodes_from(problem.values)
    left_out = set(without)
    for number, link in enumerate(problem.links):
        if number not in left_out:
            graph.add_edge(*link.ends, link=number)
    return graph


def cut_of(problem: Problem, graph: Graph, members: Sequence[int], limit: int) -> Cut:
    """Return the cut for items of which any `limit` + 1 conflict while a tree of links joins their values.

    Cutting a link of the tree leaves a items on one side and b on the other, so it lets min(limit, a) +
    min(limit, b) be free instead of `limit`; pieces of pieces gain no more than that, so the gains of several
    cut links add up to an upper bound.
    """
    values = [problem.items[member].value for member in members]
    root = values[0]
    if all(value == root for value in values):
        return Cut(frozenset(members), limit)
    below: dict[tuple[int, int], int] = {}
    paths = nx.single_source_shortest_path(graph, root)
    for value in values:
        for step in pairwise(paths[value]):
            below[step] = below.get(step, 0) + 1
    gains = [
        (graph.edges[step]["link"], min(limit, count) + min(limit, len(values) - count) - limit)
        for step, count in below.items()
    ]
    return Cut(frozenset(members), limit, tuple(sorted(gain for gain in gains if gain[1])))


@dataclass(frozen=True, slots=True)
class Flow:
    """A family in which every triple conflicts, over a tree of links: every part has two places to give.

    The places of a part appear at its topmost value and go down the links that are not cut. This says at once
    what `cut_of` says for every subtree.
    """

    root: tuple[int, ...]
    """The members at the topmost value."""
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One link of a flow, from the value above to the one below."""

    above: int
    """The step that ends at the value above; -1 for the root."""
    link: int
    places: int
    """What the members below can use of the two places."""
    members: tuple[int, ...]
    """The members at the value below."""


def flow_of(problem: Problem, tree: Graph, family: int) -> Flow:
    """Return the flow of a family, a mask of items, over a spanning tree of the links."""
    at: dict[int, list[int]] = {value: [] for value in problem.values}
    for member in labels_of(family):
        at[problem.items[member].value].append(member)
    root = next(value for value in problem.values if at[value])
    above = dict(nx.bfs_predecessors(tree, root))
    below = {value: len(members) for value, members in at.items()}
    for value in reversed(above):
        below[above[value]] += below[value]
    number = {root: -1}
    steps: list[Step] = []
    for value, parent in above.items():
        if below[value]:
            number[value] = len(steps)
            link = tree.edges[parent, value]["link"]
            steps.append(Step(number[parent], link, min(2, below[value]), tuple(at[value])))
    return Flow(tuple(at[root]), tuple(steps))


def tree_of(problem: Problem) -> Graph:
    """Return a spanning tree of the links that costs most to cut."""
    graph = graph_of(problem)
    for _, _, data in graph.edges(data=True):
        data["weight"] = problem.links[data["link"]].weight
    return nx.maximum_spanning_tree(graph)


def cycles_of(problem: Problem, tree: Graph) -> list[list[int]]:
    """Return the links of every cycle that one more link closes in a spanning tree.

    A cycle with exactly one cut link would have a cut inside a part, where nothing changes.
    """
    inside = {link for _, _, link in tree.edges(data="link")}
    found: list[list[int]] = []
    for number, link in enumerate(problem.links):
        if number not in inside:
            path = nx.shortest_path(tree, *link.ends)
            found.append([number, *(tree.edges[step]["link"] for step in pairwise(path))])
    return found


def initial_cuts(problem: Problem, families: Sequence[int]) -> tuple[list[Cut], list[Flow]]:
    """Return what conflicting families say: the largest as flows, the others along every path."""
    if not problem.links:
        return [Cut(frozenset(labels_of(family)), 2) for family in families], []
    families = sorted(families, key=int.bit_count, reverse=True)
    tree = tree_of(problem)
    flows = [flow_of(problem, tree, family) for family in families[: max(1, _MOST_STEPS // len(problem.links))]]
    return _path_cuts(problem, families[len(flows) :]), flows


def _path_cuts(problem: Problem, families: Sequence[int]) -> list[Cut]:
    graph = graph_of(problem)
    at = dict.fromkeys(problem.values, 0)
    for number, item in enumerate(problem.items):
        at[item.value] |= 1 << number
    paths = sorted(_paths(graph), key=len) if families else []
    found: dict[tuple[int, tuple[int, ...]], Cut] = {}
    for path in paths:
        for family in families:
            if len(found) >= _MOST_CUTS:
                return list(found.values())
            if not (family & at[path[0]] and family & at[path[-1]]):
                continue
            mask = sum(family & at[value] for value in path)
            key = (mask, tuple(path))
            if mask.bit_count() < 3 or key in found:
                continue
            found[key] = cut_of(problem, graph, list(labels_of(mask)), 2)
    return list(found.values())


def _paths(graph: Graph) -> list[list[int]]:
    """Return a shortest path between any two values that have one, each once, with those of one value."""
    return [
        path for start, targets in nx.all_pairs_shortest_path(graph) for end, path in targets.items() if start <= end
    ]


def shrink(base: PQTree, first: int, others: Sequence[int], items: Sequence[Item]) -> list[int]:
    """Return a minimal conflict, on top of a tree: `first` and as few of the others as conflict with it.

    All of them together must conflict. Every pass over the others finds one that is needed: the last of the
    shortest conflicting beginning.
    """
    tree = base.copy()
    core = [first]
    while insert(tree, items[core[-1]]):
        trial = tree.copy()
        length = next((n for n, other in enumerate(others) if not insert(trial, items[other])), None)
        if length is None:
            raise AssertionError("shrink was given items that do not conflict")
        core.append(others[length])
        others = others[:length]
    return core


def widen(base: PQTree, core: Sequence[int], candidates: Iterable[int], items: Sequence[Item]) -> list[int]:
    """Extend a minimal conflict by candidates to a family in which as many items as it has always conflict.

    A candidate joins if it conflicts, on top of a tree, with every choice of one item less from the family.
    """
    rank, family = len(core) - 1, list(core)
    # With a block or a sequence about, regions would miss conflicts: the cuts would be weaker, though none wrong.
    plain = rank < _MOST_SETS and base.is_free and not any(item.sequence for item in items)

    def choose(numbers: Iterable[int]) -> _Regions | _Tree:
        chosen = [items[number] for number in numbers]
        return _Regions.of(base.root.mask, chosen) if plain else _Tree.of(base, chosen)

    choices = [choose(chosen) for chosen in combinations(family, rank)]
    for candidate in candidates:
        if candidate in family or len(choices) > _MOST_CHOICES:
            continue
        if any(choice.admits(items[candidate]) for choice in choices):
            continue
        if rank:
            choices += [choose((*chosen, candidate)) for chosen in combinations(family, rank - 1)]
        family.append(candidate)
    return family


def forbidden(problem: Problem) -> list[int]:
    """Return the readers that the hard items of their own value conflict with: they pay, whatever is cut.

    One that takes a part of each of three operands of a concat is such a reader.
    """
    readers = dict(enumerate(problem.items[problem.hard :], problem.hard))
    around: dict[int, list[Item]] = {item.value: [] for item in readers.values()}
    for item in problem.items[: problem.hard]:
        if item.value in around:
            around[item.value].append(item)

    def choose(items: Sequence[Item]) -> _Regions | _Tree:
        plain = len(items) < _MOST_SETS and not any(item.sequence for item in items)
        return _Regions.of((1 << problem.atoms) - 1, items) if plain else _Tree.of(PQTree(problem.atoms), items)

    choices = {value: choose(items) for value, items in around.items()}
    return [number for number, item in readers.items() if not choices[item.value].admits(item)]


@dataclass(frozen=True, slots=True)
class _Tree:
    """The tree of some items; None if they conflict."""

    tree: PQTree | None

    @classmethod
    def of(cls, base: PQTree, items: Iterable[Item]) -> _Tree:
        """Insert items into a copy of a tree."""
        tree = base.copy()
        return cls(tree if all(insert(tree, item) for item in items) else None)

    def admits(self, item: Item) -> bool:
        """Whether the items and one more hold together."""
        return self.tree is not None and insert(self.tree.copy(), item)


@dataclass(frozen=True, slots=True)
class _Regions:
    """The regions of the Venn diagram of some sets that are not empty: the sets that hold each, and its atoms.

    Where nothing else constrains the order, whether sets conflict depends on these alone, not on the number of atoms:
    a small question, which is asked again and again.
    """

    regions: tuple[tuple[int, int], ...]
    """Bit s of the first is set for set s."""
    count: int

    @classmethod
    def of(cls, atoms: int, items: Sequence[Item]) -> _Regions:
        """Divide a mask of atoms."""
        regions = [(0, atoms)]
        for number, item in enumerate(items):
            parts = [
                part
                for sets, held in regions
                for part in ((sets, held & ~item.mask), (sets | 1 << number, held & item.mask))
            ]
            regions = [part for part in parts if part[1]]
        return cls(tuple(regions), len(items))

    def admits(self, item: Item) -> bool:
        """Whether the sets and one more hold together."""
        mask, bit, found = item.mask, 1 << self.count, 0
        for sets, held in self.regions:  # the innermost loop of all: no generators
            inside = held & mask
            if inside:
                found |= 1 << (sets | bit)
            if inside != held:
                found |= 1 << sets
        return _hold(found, self.count + 1)


@lru_cache(maxsize=2**16)
def _hold(regions: int, count: int) -> bool:
    """Whether so many sets have an order; bit r is set if region r has atoms, those of the sets in the bits of r."""
    codes = list(labels_of(regions))
    tree = PQTree(max(len(codes), 1))
    return all(tree.reduce(at for at, code in enumerate(codes) if code >> s & 1) for s in range(count))
