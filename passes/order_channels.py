"""Find the channel order of every segment that leaves the fewest bytes to gather, and lay the values out in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from chanopt.analysis.demand import Mask, demand
from chanopt.analysis.figures import figures
from chanopt.analysis.labels import Labelling, Labels, label, uncrossed
from chanopt.analysis.segments import OrderGraph, Place, Segment
from chanopt.analysis.widening import widened
from chanopt.ir import Access, IndexMap, Kind, Layout, Op, Program, Read, flow_back
from chanopt.pass_infra import Pass, PassResult, Property
from chanopt.solve import Instance, Solution, solve_all

SEGMENTS = "segments"
"""Key of this pass's notes: a tuple of :class:`Ordered`."""


def _untrimmed(program: Program) -> str | None:
    wanted = demand(program)
    for op in program.ops:
        if op.kind not in (Kind.SOURCE, Kind.SINK) and op.result not in wanted.needed:
            return f"%{op.result}, which nobody needs"
        for read in op.reads:
            if len(wanted.sets.get((op.result, read.value), read.index)) < len(read.index):
                return f"{op.label()} reading channels of %{read.value} that it has no weight for"
    return None


READS_TRIMMED = Property("every op reads only what its result needs", _untrimmed, "DropDead")


@dataclass(frozen=True, slots=True)
class Ordered:
    """A segment and its solution."""

    segment: Segment
    solution: Solution


@dataclass(frozen=True)
class OrderChannels(Pass):
    """Order the channels of every segment by the permutation program (chanopt.solve).

    Cases:
        1. channels of a producer move, so that a reader's set becomes a range: the gather goes;
        2. a value that needs fewer channels than its operand, as later values of a residual chain do, is cut where
           they are a range, gathered where the program says that this is worth its bytes, and else made a little
           wider, at no copy;
        3. a gather stands where it moves the fewest bytes: above maps, inside concats, below pools;
        4. the channels that a depthwise conv makes of one channel move with it, as a block; or all stay where they
           are, if so less is gathered where they are added to those of another layer.

    Attributes:
        time_limit: seconds for each segment; past them the best order found is taken, with its bound.
        processes: how many solve segments at once, where these take more than moments; None: one a processor.

    Before and after::

        %a {0,2,5,7}  = mix conv(%x{0:3})                    %a {2,7,0,5} = mix conv(%x{0:3})
        %b = mix conv(%a{2,7})   # positions 1, 3: gather    %b = mix conv(%a{2,7})   # positions 0:2, a range
    """

    time_limit: float = 10.0
    processes: int | None = None

    name: ClassVar[str] = "order_channels"
    requires: ClassVar[tuple[Property, ...]] = (READS_TRIMMED,)

    def apply(self, program: Program) -> PassResult:
        """Solve every segment, then lay out every value."""
        labelling = label(program)
        solved, after = self._ordered(program, labelling)
        if labelling.crossed:
            others, other = self._ordered(program, uncrossed(program, labelling))
            if _copied(other) < _copied(after):
                solved, after = others, other
        return PassResult(after, after is not program, notes={SEGMENTS: tuple(solved)})

    def _ordered(self, program: Program, labelling: Labelling) -> tuple[list[Ordered], Program]:
        graph = OrderGraph.build(program, demand(program), labelling)
        segments = graph.segments()
        solved = [Ordered(*pair) for pair in zip(segments, self._solve([s.instance for s in segments]), strict=True)]
        after = _laid_out(graph, solved)
        for number, wider in self._wider(solved).items():
            tried = [*solved[:number], wider, *solved[number + 1 :]]
            other = _laid_out(graph, tried)
            if _copied(other) < _copied(after):
                solved, after = tried, other
        return solved, after

    def _solve(self, instances: Sequence[Instance]) -> list[Solution]:
        return solve_all(instances, time_limit=self.time_limit, processes=self.processes)

    def _wider(self, solved: Sequence[Ordered]) -> dict[int, Ordered]:
        """Segments with wider blocks by their numbers, where that promises less.

        The promise does not count what readers further down pay for channels that nobody asked for: the caller
        compares whole programs.
        """
        wider = {
            number: ordered.segment.wider
            for number, ordered in enumerate(solved)
            if ordered.segment.wider is not None and ordered.solution.objective > 0
        }
        solutions = zip(wider, self._solve(list(wider.values())), strict=True)
        return {
            number: _widened(solved[number], solution)
            for number, solution in solutions
            if solution.objective < solved[number].solution.objective
        }


def _widened(narrow: Ordered, solution: Solution) -> Ordered:
    """A segment in an order of its wider blocks; what no order of either beats is its bound."""
    assert narrow.segment.wider is not None
    bound = min(solution.bound, narrow.solution.bound)
    taken = replace(narrow.segment, instance=narrow.segment.wider)
    return Ordered(taken, replace(solution, bound=bound, optimal=bound >= solution.objective))


def _laid_out(graph: OrderGraph, solved: Sequence[Ordered]) -> Program:
    """The program with every value in the order of its segment; the same object if nothing moves."""
    program = graph.program
    changed = {
        name: replace(program.values[name], layout=layout)
        for name, layout in _Layouts(graph, solved).run().items()
        if program.values[name].layout != layout
    }
    return program.evolve(values=changed) if changed else program


def _copied(program: Program) -> tuple[int, int]:
    counted = figures(program)
    return counted.copied_bytes, counted.gathered_channels


class _Layouts:
    """From the orders of segments to the layout of every value."""

    def __init__(self, graph: OrderGraph, solved: Sequence[Ordered]) -> None:
        self.graph, self.program = graph, graph.program
        self.labels = graph.labelling.of
        self.rank: dict[str, Labels] = {}
        self.paid: set[Place] = set()
        self.total = 1 + max((int(labels.max(initial=0)) for labels in self.labels.values()), default=0)
        self.makers = {op.result: op for op in self.program.ops}
        for ordered in solved:
            self._take(ordered)

    def _take(self, ordered: Ordered) -> None:
        segment, solution = ordered.segment, ordered.solution
        for node, order in zip(segment.nodes, solution.orders, strict=True):
            self.rank[node] = self._ranked(segment.labels[np.array(order, dtype=np.int64)])
        for name in (*solution.gathered, *solution.cut):
            if name in segment.places:
                self.paid.add(segment.places[name])

    def _ranked(self, order: Labels) -> Labels:
        """Shape (labels,): the place of every label; those not in the order keep theirs, behind it."""
        rank = np.arange(self.total) + len(order)
        rank[order] = np.arange(len(order))
        return rank

    def _rank(self, node: str) -> Labels:
        if node not in self.rank:
            self.rank[node] = self._follow(node) if node in self.graph.whole else np.arange(self.total)
        return self.rank[node]

    def _follow(self, node: str) -> Labels:
        """The order of a node that is read whole: operand by operand, each in the order it comes in."""
        whole = self.graph.whole[node]
        if not whole.spans:
            return self._rank(self.graph.node_of[whole.flows[0].source])
        rank = np.arange(self.total)
        for flow in whole.flows:
            span = next(span for span in whole.spans if flow.labels[0] in span)
            rank[span] = self._rank(self.graph.node_of[flow.source])[span]
        return self._ranked(np.concatenate([span[np.argsort(rank[span], kind="stable")] for span in whole.spans]))

    def run(self) -> dict[str, Layout]:
        live = {
            name: self._sorted(name, np.flatnonzero(mask))
            for name, mask in self.graph.demand.live.items()
            if name in self.labels and name in self.makers and mask.any()
        }
        for name, value in self.program.values.items():
            if value.layout is not None and name not in live:
                live[name] = value.layout.live
        live = self._widened(live)
        return {name: Layout(self.program.values[name].live.channels, index) for name, index in live.items()}

    def _sorted(self, value: str, channels: Labels) -> IndexMap:
        if value in self.graph.labelling.rigid:
            return IndexMap(channels)
        rank = self._rank(self.graph.node_of[value])
        return IndexMap(channels[np.argsort(rank[self.labels[value][channels]], kind="stable")])

    # -- widening: a flow that is not gathered reads a range, if need be with channels nobody asked for -----------

    def _widened(self, live: dict[str, IndexMap]) -> dict[str, IndexMap]:
        spoiled: set[Place] = self.paid | self.graph.apart
        changed = True
        while changed:
            changed = False
            for op in self.program.ops:
                for position, read in enumerate(op.reads):
                    place = (op.result, position)
                    if read.access is not Access.FLOW or place in spoiled or place in self.graph.labelling.loose:
                        continue
                    wider = self._cover(op, read, live)
                    if wider is None:
                        continue
                    trial = self._grown(live, op.result, wider)
                    if trial is None:
                        spoiled.add(place)
                        continue
                    live, changed = trial, True
        return live

    def _cover(self, op: Op, read: Read, live: Mapping[str, IndexMap]) -> IndexMap | None:
        """The result channels that make the read one range; None if it is one already, or none of them would."""
        taken = flow_back(read, live[op.result])
        operand = Layout(self.program.values[read.value].live.channels, live[read.value])
        positions = np.unique(operand.positions(taken).array)
        if not len(positions) or positions[-1] - positions[0] + 1 == len(positions):
            return None
        between = np.zeros(operand.channels, np.bool_)
        between[operand.live.array[positions[0] : positions[-1] + 1]] = True
        index = read.index.array
        wanted = (index >= 0) & between[index]
        wanted[live[op.result].array] = True
        return IndexMap(np.flatnonzero(wanted)) if int(wanted.sum()) > len(live[op.result]) else None

    def _grown(self, live: dict[str, IndexMap], value: str, channels: IndexMap) -> dict[str, IndexMap] | None:
        """Every value with the channels that the wider one needs; None where an op cannot give them."""

        def arranged(name: str, mask: Mask) -> IndexMap:
            return self._sorted(name, np.flatnonzero(mask))

        return widened(self.program, self.makers, live, value, channels, arranged)
