"""The loop between the master, which proposes, and the PQ-trees, which answer with an order or with cuts."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import networkx as nx

from chanopt.solve.chain import chain_of, decide_chain
from chanopt.solve.conflicts import (
    Cut,
    Graph,
    Triples,
    cliques,
    cut_of,
    cycles_of,
    forbidden,
    graph_of,
    initial_cuts,
    shrink,
    tree_of,
    triples,
    widen,
)
from chanopt.solve.decision import Decision
from chanopt.solve.master import Master
from chanopt.solve.pqtree import PQTree, labels_of
from chanopt.solve.problem import Problem, insert, restrict

__all__ = ["decide"]

_FEW_FAMILIES = 4
"""With so few families of conflicting readers the master is faster than the dynamic program of a chain."""
_PASSES = 4
"""Orders in which the free readers of a part are tried per round; each may find other conflicts."""


def decide(problem: Problem, deadline: float, workers: int) -> Decision:
    """Solve one problem to a proof, or to the best choice known at the deadline (of `time.monotonic`).

    Cheap answers come first: readers that pay whatever is chosen; all is free; or the greedy choice meets the bound of
    disjoint conflicting families.
    """
    always = set(forbidden(problem))
    if always:
        numbers = [number for number in range(len(problem.items)) if number not in always]
        decision = decide(restrict(problem, numbers), deadline, workers)
        owed = sum(problem.items[number].weight for number in always)
        free = frozenset(numbers[number] for number in decision.free)
        return replace(decision, free=free, cost=decision.cost + owed, bound=decision.bound + owed)
    search = _Search(problem, deadline)
    best = search.whole()
    if best is not None and best.cost == 0:
        return best
    conflicts = None if search.is_late() else triples(problem)
    search.conflicts = conflicts
    families = cliques(conflicts, deadline) if conflicts else []
    chain = chain_of(problem) if len(families) > _FEW_FAMILIES else None
    if chain is not None:
        return decide_chain(problem, chain, lambda part: decide(part, deadline, workers), deadline)
    best = search.greedy(best)
    bound = 0 if problem.links else _clique_bound(problem, families)
    if bound >= best.cost:
        return best
    if search.is_late():
        return Decision(best.free, best.cut, best.cost, bound)
    return search.prove(best, bound, families, workers)


def _clique_bound(problem: Problem, families: Sequence[int]) -> int:
    """Return what is paid at least: in a conflicting family of one value, all but the two heaviest.

    Families that share a soft item count once; they are taken in the order of what they give.
    """
    soft = -1 << problem.hard

    def paid(family: int) -> int:
        kept = max(0, 2 - (family & ~soft).bit_count())
        return sum(problem.items[item].weight for item in list(labels_of(family & soft))[kept:])

    total = 0
    open_ = soft
    for family in sorted(families, key=paid, reverse=True):
        if family & soft & ~open_ == 0:
            total += paid(family)
            open_ &= ~family
    return total


@dataclass(slots=True)
class _Search:
    """One problem, and what is known of it."""

    problem: Problem
    deadline: float
    """Of `time.monotonic`. What comes after it is kept short: a round is finished, with the first cuts found."""
    conflicts: Triples | None = None
    known: dict[tuple[int, ...], tuple[int, ...] | None] = field(default_factory=dict)
    """Values of a part to the items that are free in it when readers are taken from the heaviest down."""

    def is_late(self) -> bool:
        """Return whether the deadline has passed."""
        return time.monotonic() >= self.deadline

    def whole(self) -> Decision | None:
        """Return the choice that cuts no link and takes heavy readers first, if hard items allow it."""
        return self._choice([tuple(self.problem.values)])

    def greedy(self, best: Decision | None) -> Decision:
        """Return the better of the given choice and one that starts from single values and joins parts.

        Parts are joined across the heaviest links first, wherever that does not cost more than the link.
        """
        parts: dict[int, tuple[int, ...]] = {value: (value,) for value in self.problem.values}
        for link in sorted(self.problem.links, key=lambda link: -link.weight):
            first, second = parts[link.ends[0]], parts[link.ends[1]]
            if first == second or (best is not None and self.is_late()):
                continue
            joined = tuple(sorted(first + second))
            together, apart = self._paid(joined), (self._paid(first) or 0) + (self._paid(second) or 0)
            if together is None or together > apart + self._between(first, second):
                continue
            parts.update(dict.fromkeys(joined, joined))
        choice = self._choice(sorted(set(parts.values())))
        if choice is None:
            raise AssertionError("blocks and pins of one value were checked to be consistent")
        return choice if best is None or choice.cost < best.cost else best

    def prove(self, best: Decision, bound: int, families: Sequence[int], workers: int) -> Decision:
        """Run rounds of master and separation until the bound meets the best choice, or to the deadline."""
        master = Master(self.problem, workers)
        cuts, flows = initial_cuts(self.problem, families)
        master.add(cuts)
        for flow in flows:
            master.add_flow(flow)
        for cycle in cycles_of(self.problem, tree_of(self.problem)):
            master.add_cycle(cycle)
        if bound:
            master.at_least(bound)
        count, rounds = len(cuts) + len(flows), 0
        while bound < best.cost and (left := self.deadline - time.monotonic()) > 0:
            master.hint(best.free, best.cut)
            proposal = master.solve(left)
            rounds += 1
            if proposal is None:
                break
            bound = max(bound, proposal.bound)
            found, choice = self.separate(proposal.free, proposal.cut)
            if choice is not None and choice.cost < best.cost:
                best = choice
            if not found:
                break
            master.add(found)
            count += len(found)
        return Decision(best.free, best.cut, best.cost, min(bound, best.cost), count, rounds)

    def separate(self, free: Collection[int], cut: Collection[int]) -> tuple[list[Cut], Decision | None]:
        """Return cuts that a choice violates, and the choice nearest to it that holds, if there is one."""
        graph = graph_of(self.problem, cut)
        found: dict[Cut, None] = {}
        kept: set[int] | None = set()
        for values in _parts(graph):
            members = self._members(values)
            cuts, fitted = self._separate_part(graph, values, [m for m in members if m in free])
            found.update(dict.fromkeys(cuts))
            rest = [m for m in members if m not in free]
            accepted = None if fitted is None else self._accept(*fitted, rest)
            kept = None if kept is None or accepted is None else kept | set(accepted)
        return list(found), None if kept is None else self._decision(kept, cut)

    def _separate_part(
        self, graph: Graph, values: Sequence[int], members: list[int]
    ) -> tuple[list[Cut], tuple[PQTree, list[int]] | None]:
        """Return cuts of a part, and the tree and members of what fits, unless hard items do not."""
        base, given = PQTree(self.problem.atoms), list[int]()
        hard = [member for member in members if member < self.problem.hard]
        soft = members[len(hard) :]
        if len(values) == 1:
            # Here the hard items hold whatever is cut, so they need not be told in a conflict.
            base, given, _ = self._fit(base, hard)
            hard = []
        tree, accepted, cores = self._fit(base, [*hard, *soft])
        for turn in range(1, min(_PASSES, len(soft)) if cores else 0):
            if self.is_late():
                break
            start = turn * len(soft) // _PASSES
            cores = cores + self._fit(base, [*hard, *soft[start:], *soft[:start]])[2]
        distinct = {frozenset(core): core for core in cores}
        cuts = [self._cut(graph, base, core) for core in distinct.values()]
        misfit = not set(hard) <= set(accepted)
        return cuts, None if misfit else (tree, given + accepted)

    def _fit(self, base: PQTree, members: Sequence[int]) -> tuple[PQTree, list[int], list[list[int]]]:
        """Insert members in order; return the tree, those that fit, and a minimal conflict per misfit."""
        tree, accepted, cores = base.copy(), list[int](), list[list[int]]()
        for member in members:
            if insert(tree, self.problem.items[member]):
                accepted.append(member)
            else:
                cores.append(shrink(base, member, accepted, self.problem.items))
        return tree, accepted, cores

    def _cut(self, graph: Graph, base: PQTree, core: list[int]) -> Cut:
        """Return the cut for a minimal conflict on top of a tree, widened by items that conflict alike."""
        cut = cut_of(self.problem, graph, core, len(core) - 1)
        if self.is_late():
            return cut
        joined = {value for link, _ in cut.links for value in self.problem.links[link].ends}
        joined.add(self.problem.items[core[0]].value)
        soft = range(self.problem.hard, len(self.problem.items))
        nearby = [number for number in soft if self.problem.items[number].value in joined]
        members = widen(base, core, nearby, self.problem.items)
        return cut_of(self.problem, graph, members, len(core) - 1)

    def _accept(self, tree: PQTree, accepted: list[int], candidates: Iterable[int]) -> list[int]:
        """Add to a tree whatever candidates fit, in their order; triples spare most of the tests."""
        accepted = list(accepted)
        blocked = self._blocked(accepted)
        for candidate in candidates:
            if blocked >> candidate & 1 or not insert(tree, self.problem.items[candidate]):
                continue
            if self.conflicts:
                for other in accepted:
                    blocked |= self.conflicts[other][candidate]
            accepted.append(candidate)
        return accepted

    def _blocked(self, accepted: Sequence[int]) -> int:
        blocked = 0
        if self.conflicts:
            for position, first in enumerate(accepted):
                for second in accepted[:position]:
                    blocked |= self.conflicts[first][second]
        return blocked

    def _members(self, values: Iterable[int]) -> list[int]:
        inside = set(values)
        return [number for number, item in enumerate(self.problem.items) if item.value in inside]

    def _free(self, values: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the greedy choice in a part; None if its hard items conflict."""
        if values not in self.known:
            members = self._members(values)
            accepted = self._accept(PQTree(self.problem.atoms), [], members)
            hard = sum(member < self.problem.hard for member in members)
            self.known[values] = tuple(accepted) if accepted[:hard] == members[:hard] else None
        return self.known[values]

    def _paid(self, values: tuple[int, ...]) -> int | None:
        free = self._free(values)
        if free is None:
            return None
        return sum(self.problem.items[m].weight for m in self._members(values) if m not in free)

    def _between(self, first: tuple[int, ...], second: tuple[int, ...]) -> int:
        ends = {(a, b) for a in first for b in second} | {(b, a) for a in first for b in second}
        return sum(link.weight for link in self.problem.links if link.ends in ends)

    def _choice(self, parts: Sequence[tuple[int, ...]]) -> Decision | None:
        free: set[int] = set()
        for values in parts:
            accepted = self._free(values)
            if accepted is None:
                return None
            free.update(accepted)
        part = {value: number for number, values in enumerate(parts) for value in values}
        cut = [n for n, link in enumerate(self.problem.links) if part[link.ends[0]] != part[link.ends[1]]]
        return self._decision(free, cut)

    def _decision(self, free: Iterable[int], cut: Iterable[int]) -> Decision:
        kept, parted = frozenset(free), frozenset(cut)
        cost = sum(item.weight for number, item in enumerate(self.problem.items) if number not in kept)
        cost += sum(self.problem.links[link].weight for link in parted)
        return Decision(kept, parted, cost, cost)


def _parts(graph: Graph) -> list[tuple[int, ...]]:
    return sorted(tuple(sorted(part)) for part in nx.connected_components(graph))
