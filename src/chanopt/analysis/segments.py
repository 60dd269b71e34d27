"""Segments: the values that share an order, who reads them, and the permutation program of each (design: section 5).

A segment is a connected component of values under flow. Nodes of the program are values; a flow between two values
is an edge, which may be *cut*: the tensor is gathered there and the order changes. What cannot matter is contracted
first, so that an instance has a node per place where a choice exists:

1. a producer that only feeds one flow takes its consumer's order: it joins the consumer's node;
2. a value that only feeds one flow of the same channels joins it; the cut between them is the cheaper of the two;
3. a value that is only read whole sets no order: its incoming flows become readers of what it is made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import networkx as nx
import numpy as np

from chanopt.analysis.convs import image_conv
from chanopt.analysis.demand import Demand
from chanopt.analysis.labels import Labelling, Labels, unique_in_order
from chanopt.analysis.wider import wider
from chanopt.ir import Access, IndexMap, Kind, Op, Program, Read, flow_back
from chanopt.solve import Block, Edge, Instance, Pin, Preference, Reader
from chanopt.target import SECTOR, Target

Place = tuple[str, int]
"""A read: (op result, operand position); the sink's result is ""."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A reader of a node: it is served if its labels are one range (in this very order, if ordered).

    Attributes:
        name: the layer that reads.
        labels: what it reads.
        weight: bytes it gathers otherwise; with a grain, bytes of a block.
        place: the read where it gathers, or None: where it reads what was served whole further down.
        ordered: whether the order matters too.
        grain: if not 0, it pays for every aligned block of so many channels that it touches.
    """

    name: str
    labels: Labels
    weight: int
    place: Place | None
    ordered: bool = False
    grain: int = 0


@dataclass(slots=True)
class Flow:
    """An edge between nodes: a read that may gather, for its weight."""

    source: str
    target: str
    labels: Labels
    weight: int
    place: Place


@dataclass(frozen=True, slots=True)
class Whole:
    """A node that is only read whole, and so takes its order from what it is made of.

    Attributes:
        flows: what it is made of.
        spans: of a concat, the labels of each operand, live or not, in operand order.
    """

    flows: tuple[Flow, ...]
    spans: tuple[Labels, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """One permutation program and what its parts stand for.

    Attributes:
        name: the first producer's layer.
        instance: the program, in local labels 0 .. n - 1.
        wider: the program in which an operand of a concat may bring channels that nobody reads behind it, so that
            blocks do not cross; None where none do.
        labels: the label of each local one.
        nodes: the node of each value of the instance.
        places: per reader and edge name, the read that gathers if it pays.
        producers: layers that make channels of this segment.
        consumers: layers that read it.
        channel_bytes: bytes of one channel, of the first value.
    """

    name: str
    instance: Instance
    wider: Instance | None
    labels: Labels
    nodes: tuple[str, ...]
    places: Mapping[str, Place]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    channel_bytes: int


@dataclass
class OrderGraph:
    """The values of a program as nodes of the permutation program.

    Attributes:
        node_of: the node each value belongs to.
        labels: per node, the labels it has live.
        flows: by the read that each stands for, in program order.
        into: per node, the flows that end there; `out`, those that begin there.
        apart: flows that take half of a block, which is never a range: they gather whatever the order, and no order
            passes through them.
        whole: the dropped nodes: they follow the order of what they are made from.
    """

    program: Program
    demand: Demand
    labelling: Labelling
    node_of: dict[str, str] = field(default_factory=dict)
    labels: dict[str, Labels] = field(default_factory=dict)
    flows: dict[Place, Flow] = field(default_factory=dict)
    wishes: dict[str, list[Wish]] = field(default_factory=dict)
    pins: dict[str, Labels] = field(default_factory=dict)
    blocks: dict[str, list[Labels]] = field(default_factory=dict)
    spans: dict[str, list[Labels]] = field(default_factory=dict)
    into: dict[str, dict[Place, Flow]] = field(default_factory=dict)
    out: dict[str, dict[Place, Flow]] = field(default_factory=dict)
    apart: set[Place] = field(default_factory=set)
    whole: dict[str, Whole] = field(default_factory=dict)
    members: dict[str, list[str]] = field(default_factory=dict)

    # -- building -------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, program: Program, demand: Demand, labelling: Labelling) -> OrderGraph:
        """The contracted graph of a program."""
        graph = cls(program, demand, labelling)
        for op in program.ops:
            if op.kind is not Kind.SINK and program.values[op.result].layout is not None:
                graph._node(op)
            for position, read in enumerate(op.reads):
                if program.values[read.value].layout is not None:
                    graph._read(op, position, read)
        graph._contract()
        return graph

    def _live(self, value: str) -> Labels:
        return unique_in_order(self.labelling.of[value][self.demand.live[value]]).array

    def _node(self, op: Op) -> None:
        name = op.result
        self.node_of[name] = name
        self.members[name] = [name]
        self.labels[name] = self._live(name)
        self.wishes[name] = []
        self.into[name], self.out[name] = {}, {}
        if op.kind in (Kind.SOURCE, Kind.BARRIER) or name in self.labelling.rigid:
            self.pins[name] = self.labels[name]
        if op.kind is Kind.CONCAT:
            here = [read.index.array >= 0 for read in op.reads]
            live = [self.labelling.of[name][self.demand.live[name] & part] for part in here]
            self.blocks[name] = [part for part in live if len(part)]
            self.spans[name] = [self.labelling.of[name][part] for part in here]
        if op.kind is Kind.SPLIT:
            self.blocks[name] = [self.labels[name]]

    def _read(self, op: Op, position: int, read: Read) -> None:
        operand = self.program.values[read.value]
        labels = self.labelling.of[read.value]
        place = (op.result, position)
        node = self.node_of[read.value]
        if read.access is Access.FLOW and place not in self.labelling.loose:
            taken = flow_back(read, IndexMap(np.flatnonzero(self.demand.live[op.result])))
            if not self._in_whole_blocks(read.value, taken):
                self.apart.add(place)
                return
            weight = len(np.unique(taken.array)) * operand.channel_bytes
            wanted = unique_in_order(labels[taken.array]).array
            self._connect(Flow(node, self.node_of[op.result], wanted, weight, place))
            return
        taken = self._taken(op, read)
        if not len(taken):
            return
        wanted = unique_in_order(labels[taken.array]).array
        ordered = read.access is not Access.SET or op.kind is Kind.GROUPED
        if not self._in_whole_blocks(read.value, taken):
            return
        if self._gathers_while_loading(op):
            block = SECTOR * operand.channel_bytes
            self.wishes[node].append(Wish(op.label(), wanted, block, place, grain=SECTOR))
            return
        weight = len(taken) * operand.channel_bytes
        self.wishes[node].append(Wish(op.label(), wanted, weight, place, ordered))

    def _connect(self, flow: Flow) -> None:
        self.flows[flow.place] = self.out[flow.source][flow.place] = self.into[flow.target][flow.place] = flow

    def _gathers_while_loading(self, op: Op) -> bool:
        """Whether the blocks that a conv touches count, and not the ranges that it reads (chanopt.target)."""
        fuses = Target.parse(self.program.target).fuses(channels_last=self.program.channels_last)
        return fuses and image_conv(op, self.program) is not None

    def _taken(self, op: Op, read: Read) -> IndexMap:
        if read.access is Access.ALL:
            return IndexMap.identity(self.program.values[read.value].live.channels)
        if read.access is Access.FLOW:
            return flow_back(read, IndexMap(np.flatnonzero(self.demand.live[op.result])))
        return read.index

    def _in_whole_blocks(self, value: str, taken: IndexMap) -> bool:
        """Whether a read takes all or none of every block; half of one is never a range, whatever the order."""
        labels = self.labelling.of[value]
        live = labels[self.demand.live[value]]
        asked, counts = np.unique(labels[np.unique(taken.array)], return_counts=True)
        names, sizes = np.unique(live, return_counts=True)
        return bool((sizes[np.searchsorted(names, asked)] <= counts).all())

    # -- contraction ----------------------------------------------------------------------------------------------

    def _contract(self) -> None:
        while self._join_producers() or self._join_chains() or self._drop_whole():
            pass

    def _passes_on(self, node: str) -> Flow | None:
        """The only flow out of a node without wishes, pins or blocks: it may take the order of another."""
        fixed = self.wishes[node] or node in self.pins or node in self.blocks
        return None if fixed or len(self.out[node]) != 1 else next(iter(self.out[node].values()))

    def _join_producers(self) -> bool:
        merged = False
        for node in list(self.labels):
            flow = self._passes_on(node)
            if flow is not None and not self.into[node] and flow.target != node:
                self._merge(flow, node, flow.target)
                merged = True
        return merged

    def _join_chains(self) -> bool:
        merged = False
        for node in list(self.labels):
            after = self._passes_on(node)
            if after is None or len(self.into[node]) != 1 or len(after.labels) != len(self.labels[after.target]):
                continue
            before = next(iter(self.into[node].values()))
            if len(before.labels) != len(after.labels) or before.source == node:
                continue
            if after.weight < before.weight:  # the gather is cheaper further down: this value keeps the order above
                self._merge(before, node, before.source)
            else:
                self._merge(after, node, after.target)
            merged = True
        return merged

    def _disconnect(self, flow: Flow) -> None:
        del self.flows[flow.place], self.out[flow.source][flow.place], self.into[flow.target][flow.place]

    def _merge(self, flow: Flow, source: str, target: str) -> None:
        """Make two nodes one."""
        self._disconnect(flow)
        for other in self.out.pop(source).values():
            other.source = target
            self.out[target][other.place] = other
        for other in self.into.pop(source).values():
            other.target = target
            self.into[target][other.place] = other
        for member in self.members[source]:
            self.node_of[member] = target
        self.members[target] += self.members.pop(source)
        self.labels[target] = unique_in_order(np.concatenate([self.labels[target], self.labels.pop(source)])).array
        self.wishes[target] += self.wishes.pop(source)
        for table in (self.blocks, self.spans):
            if source in table:
                table[target] = table.get(target, []) + table.pop(source)

    def _drop_whole(self) -> bool:
        """Case 3: nodes without outgoing flows whose readers all take everything in any order."""
        dropped = False
        for node in reversed(list(self.labels)):
            flows = list(self.into[node].values())
            if self.out[node] or not self._only_whole(node, flows):
                continue
            for flow in flows:
                self._disconnect(flow)
            self._drop(node, flows)
            dropped = True
        return dropped

    def _only_whole(self, node: str, flows: list[Flow]) -> bool:
        wishes = self.wishes[node]
        if not flows or not wishes or node in self.pins:
            return False
        if any(wish.ordered or len(wish.labels) < len(self.labels[node]) for wish in wishes):
            return False
        if node in self.blocks:
            return _disjoint([flow.labels for flow in flows]) and _disjoint(self.blocks[node])
        return len(flows) == 1 and len(flows[0].labels) == len(self.labels[node])

    def _drop(self, node: str, flows: list[Flow]) -> None:
        wishes = self.wishes.pop(node)
        later = sum(wish.weight for wish in wishes)
        for flow in flows:
            at_flow = len(flows) > 1 or flow.weight <= later
            weight, place = (flow.weight, flow.place) if at_flow else (later, None)
            self.wishes[flow.source].append(Wish(wishes[0].name, flow.labels, weight, place))
        for table in (self.labels, self.into, self.out):
            table.pop(node)
        self.blocks.pop(node, None)
        self.whole[node] = Whole(tuple(flows), tuple(self.spans.pop(node, ())))

    # -- instances ------------------------------------------------------------------------------------------------

    def segments(self) -> list[Segment]:
        """The permutation programs with anything to decide, in program order."""
        graph: nx.Graph[str] = nx.Graph()
        graph.add_nodes_from(self.labels)
        graph.add_edges_from((flow.source, flow.target) for flow in self.flows.values())
        order = {name: position for position, name in enumerate(self.node_of)}
        components = sorted(
            (sorted(c, key=order.__getitem__) for c in nx.connected_components(graph)),
            key=lambda c: order[c[0]],
        )
        return [self._segment(nodes) for nodes in components if self._undecided(nodes)]

    def _undecided(self, nodes: list[str]) -> bool:
        wishes = [wish for node in nodes for wish in self.wishes[node]]
        partial = any(
            wish.ordered or len(wish.labels) < len(self.labels[node]) for node in nodes for wish in self.wishes[node]
        )
        return bool(wishes) and (partial or len(nodes) > 1)

    def _segment(self, nodes: list[str]) -> Segment:
        labels = np.unique(np.concatenate([self.labels[node] for node in nodes]))
        number = {node: position for position, node in enumerate(nodes)}

        def local(these: Labels) -> tuple[int, ...]:
            return tuple(np.searchsorted(labels, these).tolist())

        places: dict[str, Place] = {}
        readers: list[Reader] = []
        for node in nodes:
            for wish in self.wishes[node]:
                name = _unique(wish.name, {reader.name for reader in readers})
                readers.append(Reader(name, local(wish.labels), wish.weight, number[node], wish.ordered, wish.grain))
                if wish.place is not None:
                    places[name] = wish.place
        edges: list[Edge] = []
        for flow in self.flows.values():
            if flow.source in number and flow.target in number and flow.source != flow.target:
                name = _unique(f"{flow.source} -> {flow.target}", {edge.name for edge in edges})
                edges.append(Edge(name, number[flow.source], number[flow.target], flow.weight))
                places[name] = flow.place
        blocks = [Block(local(block), number[n]) for n in nodes for block in self.blocks.get(n, []) if len(block) > 1]
        pins = [Pin(number[node], local(self.pins[node])) for node in nodes if node in self.pins]
        prefer = [
            Preference(local(flow.labels), number[flow.target], flow.weight)
            for flow in self.flows.values()
            if flow.source in number and 1 < len(flow.labels) < len(labels)
        ]
        instance = Instance(len(labels), tuple(readers), tuple(blocks), tuple(pins), tuple(edges), tuple(prefer))
        return self._described(instance, labels, nodes, places)

    def _following(self, nodes: list[str]) -> list[str]:
        """Dropped nodes that take their order from these, directly or through one another."""
        found: list[str] = []
        for node, whole in reversed(self.whole.items()):  # what a dropped node is made of was dropped after it
            sources = {self.node_of[flow.source] for flow in whole.flows}
            if sources & {*nodes, *found}:
                found.append(node)
        return found

    def _described(self, instance: Instance, labels: Labels, nodes: list[str], places: dict[str, Place]) -> Segment:
        values = [member for node in (*nodes, *self._following(nodes)) for member in self.members[node]]
        makers = {op.result: op for op in self.program.ops}
        producers = dict.fromkeys(
            makers[v].label() for v in values if not any(r.access is Access.FLOW for r in makers[v].reads)
        )
        consumers = dict.fromkeys(wish.name for node in nodes for wish in self.wishes[node])
        name = next(iter(producers), makers[nodes[0]].label())
        size = self.program.values[nodes[0]].channel_bytes
        grown = wider(instance, [np.searchsorted(labels, self.labels[node]).tolist() for node in nodes])
        nodes_, producers_, consumers_ = tuple(nodes), tuple(producers), tuple(consumers)
        return Segment(name, instance, grown, labels, nodes_, places, producers_, consumers_, size)


def _disjoint(sets: list[Labels]) -> bool:
    labels = np.concatenate(sets)
    return len(np.unique(labels)) == len(labels)


def _unique(name: str, taken: set[str]) -> str:
    count, unique = 1, name
    while unique in taken:
        count, unique = count + 1, f"{name} #{count}"
    return unique
