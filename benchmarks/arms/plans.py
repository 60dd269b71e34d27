"""Programs whose channels are laid out by a plan of their own: the naive, greedy and constrained arms.

All three cut like UPSCALE does: a channel goes where no consumer of its segment reads it, everywhere in the segment
at once; batch norms and constants stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import networkx as nx
import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from benchmarks.arms.base import Copies
from benchmarks.arms.greedy import greedy_order
from chanopt.analysis.labels import Labelling, is_rigid, label
from chanopt.analysis.weights import matrix, used
from chanopt.ir import Access, Form, IndexMap, Kind, Layout, Op, Program, Read, physical_read, physical_reads

Labels = npt.NDArray[np.int64]
Order = Callable[["Group"], list[int]]

_READS = (torch.ops.aten.slice.Tensor, torch.ops.aten.index_select.default)


@dataclass(frozen=True, slots=True)
class Consumer:
    """A layer that can leave input channels out.

    Attributes:
        op: the result of its op.
        layer: its name.
        kept: the operand channels with a weight other than zero, at least one.
        labels: their labels.
        channels: how many channels the operand has.
        bytes: bytes of one of them.
    """

    op: str
    layer: str
    kept: IndexMap
    labels: tuple[int, ...]
    channels: int
    bytes: int

    @property
    def masked(self) -> bool:
        """Whether any channel is left out."""
        return len(self.kept) < self.channels


@dataclass(frozen=True, slots=True)
class Group:
    """A segment: consumers that read channels in common, or channels of one producer.

    Attributes:
        consumers: in program order.
        labels: everything they read.
        block_of: the rank of the producer of every label, such that the producers of a concat ascend.
        pinned: whether an order is not free here.
    """

    consumers: tuple[Consumer, ...]
    labels: tuple[int, ...]
    block_of: Mapping[int, int]
    pinned: bool


class Flow:
    """What a plan needs to know of a program.

    Attributes:
        program: as lowered.
        makers: the op behind every value.
        labelling: its labels.
        consumers: by the result of their op.
        whole: labels that something takes whole: the output, a grouped conv, a norm over channels.
        block_of: the first op that makes each label, as a rank that respects the concats.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.makers = {op.result: op for op in program.ops}
        self.labelling: Labelling = label(program)
        self.total = 1 + max((int(labels.max(initial=0)) for labels in self.labelling.of.values()), default=0)
        self.consumers = {op.result: self._consumer(op) for op in program.ops if self._is_consumer(op)}
        self.whole = self._whole()
        self.block_of = self._blocks()

    def _is_consumer(self, op: Op) -> bool:
        if not op.linear or op.kind is not Kind.MIX or not op.reads or op.reads[0].access is not Access.SET:
            return False
        return self.makers[op.reads[0].value].kind is not Kind.BARRIER

    def _consumer(self, op: Op) -> Consumer:
        read = op.reads[0]
        operand = self.program.values[read.value]
        columns = np.flatnonzero(np.any(used(op, self.program), axis=0))
        kept = IndexMap(columns if len(columns) else read.index.array[:1])
        labels = np.unique(self.labelling.of[read.value][kept.array])
        return Consumer(
            op.result, op.label(), kept, tuple(labels.tolist()), operand.live.channels, operand.channel_bytes
        )

    def _whole(self) -> npt.NDArray[np.bool_]:
        """Shape (labels,): taken whole by something."""
        whole = np.zeros(self.total, np.bool_)
        for op in self.program.ops:
            fixed = op.kind in (Kind.SOURCE, Kind.BARRIER, Kind.STATISTIC, Kind.GROUPED) or is_rigid(op)
            if fixed and op.result in self.labelling.of:
                whole[self.labelling.of[op.result]] = True
            for position, read in enumerate(op.reads):
                if read.value not in self.labelling.of:
                    continue
                flows = read.access is Access.FLOW and (op.result, position) not in self.labelling.loose and not fixed
                if not flows and op.result not in self.consumers:
                    whole[self.labelling.of[read.value]] = True
        return whole

    def _blocks(self) -> Labels:
        """Shape (labels,): rank of the producer of each label."""
        first = np.full(self.total, -1)
        for number, op in enumerate(self.program.ops):
            labels = self.labelling.of.get(op.result)
            if labels is not None and op.kind is not Kind.CONCAT:
                labels = labels[first[labels] < 0]
                first[labels] = number
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from(np.unique(first).tolist())
        for op in self.program.ops:
            if op.kind is Kind.CONCAT:
                blocks = list(dict.fromkeys(first[self.labelling.of[op.result]].tolist()))
                graph.add_edges_from(pairwise(blocks))
        ranks = nx.lexicographical_topological_sort(graph) if nx.is_directed_acyclic_graph(graph) else sorted(graph)
        rank = {block: place for place, block in enumerate(ranks)}
        return np.array([rank[int(block)] for block in first])

    def groups(self) -> list[Group]:
        """The segments that a consumer reads."""
        graph: nx.Graph[tuple[str, int | str]] = nx.Graph()
        for consumer in self.consumers.values():
            node = ("consumer", consumer.op)
            graph.add_node(node)
            blocks = np.unique(self.block_of[list(consumer.labels)]).tolist()
            graph.add_edges_from((node, ("block", block)) for block in blocks)
        return [
            self._group({name for kind, name in part if kind == "consumer"}) for part in nx.connected_components(graph)
        ]

    def _group(self, names: set[int | str]) -> Group:
        consumers = tuple(consumer for name, consumer in self.consumers.items() if name in names)
        labels = tuple(sorted({taken for consumer in consumers for taken in consumer.labels}))
        block_of = {taken: int(self.block_of[taken]) for taken in labels}
        return Group(consumers, labels, block_of, bool(self.whole[list(labels)].any()))

    def laid_out(self, order: Order | None = None, kept: Mapping[str, IndexMap] | None = None) -> Program:
        """The program with dead channels cut and the others in an order, natural unless one is given.

        Args:
            order: the labels of a segment in the wanted order; not asked where the order is not free.
            kept: what consumers keep, by the result of their op, instead of what has weights.
        """
        sets = {name: consumer.kept for name, consumer in self.consumers.items()} | dict(kept or {})
        live = self.whole.copy()
        for op in self.program.ops:
            if op.result in sets:
                live[self.labelling.of[op.reads[0].value][sets[op.result].array]] = True
        rank = self._ranked(order)
        values = {
            name: replace(value, layout=self._layout(name, live, rank))
            for name, value in self.program.values.items()
            if value.layout is not None
        }
        ops = [self._trimmed(op, sets) for op in self.program.ops]
        return self.program.evolve(ops=ops, values=values)

    def _ranked(self, order: Order | None) -> Labels:
        rank = np.arange(self.total)
        for group in self.groups() if order else ():
            if group.pinned or not order:
                continue
            places = np.array(sorted(group.labels))
            rank[np.array(order(group), dtype=np.int64)] = places
        return np.lexsort((rank, self.block_of)).argsort()

    def _layout(self, value: str, live: npt.NDArray[np.bool_], rank: Labels) -> Layout:
        labels = self.labelling.of[value]
        channels = np.flatnonzero(live[labels])
        if not len(channels):
            channels = np.arange(1)
        fixed = is_rigid(self.makers[value]) or self.makers[value].kind in (Kind.SOURCE, Kind.BARRIER)
        order = np.arange(len(channels)) if fixed else np.argsort(rank[labels[channels]], kind="stable")
        return Layout(len(labels), IndexMap(channels[order]))

    def _trimmed(self, op: Op, sets: Mapping[str, IndexMap]) -> Op:
        if op.result not in sets:
            return op
        first = op.reads[0]
        return op.map_args(lambda arg: replace(arg, index=sets[op.result]) if arg is first else arg)


def naive_copies(flow: Flow, program: Program | None = None) -> Copies:
    """The copies of the naive export: every masked consumer gathers, even a range (UPSCALE's baseline export).

    Args:
        flow: the masked network.
        program: it in the natural order, if that is at hand.
    """
    own = (_copied(consumer) for consumer in flow.consumers.values() if consumer.masked)
    return sum(own, _other_copies(flow, program or flow.laid_out()))


def naive(flow: Flow) -> tuple[nn.Module, Copies]:
    """The naive export, channels in their natural order."""
    masked = {name: consumer for name, consumer in flow.consumers.items() if consumer.masked}
    program = flow.laid_out()
    return _with_own_gathers(program, masked, always=True), naive_copies(flow, program)


def greedy_copies(flow: Flow) -> tuple[Program, Copies]:
    """The program in the greedy order, and its copies: one per consumer whose channels are no range, and shuffles."""
    program = flow.laid_out(_greedy)
    own = (_copied(consumer) for consumer in _paying(flow, program).values())
    return program, sum(own, _other_copies(flow, program))


def greedy(flow: Flow) -> tuple[nn.Module, Copies]:
    """The greedy order, in which every consumer that gathers does so for itself."""
    program, planned = greedy_copies(flow)
    return _with_own_gathers(program, _paying(flow, program), always=False), planned


def _paying(flow: Flow, program: Program) -> dict[str, Consumer]:
    consumers = ((op, flow.consumers[op.result]) for op in program.ops if op.result in flow.consumers)
    return {
        op.result: consumer for op, consumer in consumers if physical_read(op, op.reads[0], program).form is Form.GATHER
    }


def _other_copies(flow: Flow, program: Program) -> Copies:
    """What is copied though no consumer asks for it: the model's own channel shuffles, which these arms still make."""
    copies = Copies()
    for op in program.ops:
        for read, physical in physical_reads(op, program) if op.result not in flow.consumers else ():
            if physical.form is Form.GATHER:
                channels = len(physical.positions)
                copies += Copies(1, channels, channels * program.values[read.value].channel_bytes)
    return copies


def _copied(consumer: Consumer) -> Copies:
    return Copies(1, len(consumer.kept), len(consumer.kept) * consumer.bytes)


def _greedy(group: Group) -> list[int]:
    return greedy_order([consumer.labels for consumer in group.consumers], group.block_of)


def _with_own_gathers(program: Program, consumers: Mapping[str, Consumer], *, always: bool) -> nn.Module:
    """The program's module, in which each of the consumers selects its channels by itself, by an index."""
    module = program.to_module()
    assert isinstance(module, fx.GraphModule)
    makers = {op.result: op for op in program.ops}
    for node in list(module.graph.nodes):
        if node.name in consumers:
            op = makers[node.name]
            _own_gather(module, node, op, op.reads[0], program, always=always)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def _own_gather(module: fx.GraphModule, node: fx.Node, op: Op, read: Read, program: Program, *, always: bool) -> None:
    physical = physical_read(op, read, program)
    if physical.form is not Form.GATHER and not always:
        return
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    base = operand if physical.form is Form.WHOLE else _before_read(operand)
    if base is None:
        return  # the channels-last form of a gather already stands for itself
    axis = program.values[read.value].axis
    name = f"{op.result}_own_channels"
    module.register_buffer(name, torch.from_numpy(physical.positions.array.copy()))
    with module.graph.inserting_before(node):
        index = module.graph.get_attr(name)
        own = module.graph.call_function(torch.ops.aten.index_select.default, (base, axis, index))
    node.replace_input_with(operand, own)


def _before_read(operand: fx.Node) -> fx.Node | None:
    """The tensor that a slice or a gather, as emitted for a read, was taken from."""
    if operand.target not in _READS:
        return None
    base = operand.args[0]
    assert isinstance(base, fx.Node)
    return base


def agreed(flow: Flow, ratio: float) -> dict[str, IndexMap]:
    """What consumers keep if all that share channels keep the same: per producer, a share of the channels.

    Args:
        flow: the masked network.
        ratio: share of every producer's channels that stays, at least one.

    Returns:
        By the result of the op, the channels each consumer keeps. Channels are ranked by the norm of the weights
        that read them, over all consumers.
    """
    score = np.zeros(flow.total)
    for op in flow.program.ops:
        if op.result in flow.consumers:
            norms = matrix(op, flow.program).double().square().sum((0, 2)).cpu().numpy()
            np.add.at(score, flow.labelling.of[op.reads[0].value], norms)
    stays = flow.whole.copy()
    read = np.unique([taken for consumer in flow.consumers.values() for taken in _all_labels(flow, consumer)])
    for block in np.unique(flow.block_of[read]):
        labels = read[flow.block_of[read] == block]
        count = max(1, round(ratio * len(labels)))
        stays[labels[np.argsort(-score[labels], kind="stable")[:count]]] = True
    kept: dict[str, IndexMap] = {}
    for op in flow.program.ops:
        if op.result in flow.consumers:
            channels = np.flatnonzero(stays[flow.labelling.of[op.reads[0].value]])
            kept[op.result] = IndexMap(channels if len(channels) else np.arange(1))
    return kept


def _all_labels(flow: Flow, consumer: Consumer) -> Iterable[int]:
    op = flow.makers[consumer.op]
    return np.unique(flow.labelling.of[op.reads[0].value]).tolist()


__all__ = ["Consumer", "Flow", "Group", "agreed", "greedy", "greedy_copies", "naive", "naive_copies"]
