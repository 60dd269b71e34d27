"""The structure of a model as pruners see it: layers with weights, and the segments whose channels they share.

Everything is read off the channel-flow program, so a model that chanopt can lower has a structure: concats place
blocks side by side, a flatten gives every channel h * w features, depthwise convs and batch norms pass channels on,
splits and shuffles move them. Channels that meet at an addition are one *channel of the segment*.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from chanopt.analysis.weights import weight_param
from chanopt.api import Captured, lower
from chanopt.errors import ChanoptError
from chanopt.ir import Access, Kind, Op, Param, Program, Read, Window

Numbers = npt.NDArray[np.int64]
Channels = tuple["int | None", ...]
"""Per channel of a layer, the segment's channel; None where the layer's channel comes from nowhere (padding)."""

_ABSENT = -1


@dataclass(frozen=True, slots=True)
class Layer:
    """A conv or linear layer.

    Attributes:
        name: the module's name.
        kind: ``conv1d``, ``conv2d``, ``conv3d``, ``conv_transpose1d``, ..., or ``linear``.
        in_channels: input channels (features of a linear layer).
        out_channels: output channels.
        groups: 1, or more for a grouped or depthwise conv.
        kernel: kernel sizes; empty for a linear layer.
        stride: strides; empty for a linear layer.
        padding: paddings; empty for a linear layer.
        dilation: dilations; empty for a linear layer.
        bias: whether it has a bias.
        positions: how often the kernel is applied for one sample of the example inputs, over all uses: output
            pixels (input pixels of a transposed conv), tokens of a linear layer.
        input_size: sizes of the input's other axes, without the batch, at the first use.
        output_size: sizes of the output's other axes, without the batch, at the first use.
        uses: how often the module is called in one forward.
        norm: the batch norm that reads its output directly, or "".
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    bias: bool = False
    positions: int = 1
    input_size: tuple[int, ...] = ()
    output_size: tuple[int, ...] = ()
    uses: int = 1
    norm: str = ""

    @property
    def depthwise(self) -> bool:
        """Whether every output channel is made of one input channel."""
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def weights_per_pair(self) -> int:
        """Weights of one kept input channel times one kept output channel."""
        return prod(self.kernel)

    @property
    def macs_per_pair(self) -> int:
        """Multiply-accumulates of one kept input channel times one kept output channel, for one sample."""
        return self.weights_per_pair * self.positions

    def pairs(self, inputs: int | None = None, outputs: int | None = None) -> int:
        """Pairs of an input and an output channel that have a weight, for so many kept channels (None: all).

        Grouped convs are counted with as many kept channels in every group; depthwise ones by their outputs.
        """
        inputs = self.in_channels if inputs is None else inputs
        outputs = self.out_channels if outputs is None else outputs
        return outputs if self.depthwise else inputs * outputs // self.groups

    def macs(self, inputs: int | None = None, outputs: int | None = None) -> int:
        """Multiply-accumulates for one sample with so many kept channels (None: all)."""
        return self.macs_per_pair * self.pairs(inputs, outputs)

    def parameters(self, inputs: int | None = None, outputs: int | None = None) -> int:
        """Entries of weight and bias with so many kept channels (None: all)."""
        biases = self.out_channels if outputs is None else outputs
        return self.weights_per_pair * self.pairs(inputs, outputs) + biases * self.bias


@dataclass(frozen=True, slots=True)
class Join:
    """An op at which channels of several operands meet: an addition, a product with a gate.

    Attributes:
        op: the operator, e.g. ``aten.add.Tensor``.
        layer: the module in whose forward it stands.
        source: the user's source line.
        operands: per operand, the layers whose output channels arrive there (``%name`` for what is no layer).
        channels: per operand, the segment's channels that arrive, in the result's order.
    """

    op: str
    layer: str
    source: str
    operands: tuple[tuple[str, ...], ...]
    channels: tuple[Channels, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """Channels that flow into one another, who makes them, and who reads them.

    Attributes:
        name: the first producer, or the op that makes the channels.
        channels: how many channels there are; what must be kept or dropped together for all layers to agree is one.
        producers: per layer that makes channels, the segment's channel of each of its output channels.
        consumers: per layer that reads channels, the segment's channel of each of its input channels.
        through: per depthwise conv, batch norm or other layer with parameters per channel that passes channels on,
            the segment's channel of each of its output channels.
        joins: where channels of several producers meet.
        pinned: whether channels cannot go away physically: they are the network's input or output, or an operator
            that counts channels, or is unknown, takes them all.
        pins: why, in words.
        spans: sets of channels that lie side by side wherever they exist: operands of concats, results of splits.
        ordered: whether an op takes or makes these channels only in their logical order (groups, pixel shuffle).
    """

    name: str
    channels: int
    producers: Mapping[str, Channels] = field(default_factory=dict)
    consumers: Mapping[str, Channels] = field(default_factory=dict)
    through: Mapping[str, Channels] = field(default_factory=dict)
    joins: tuple[Join, ...] = ()
    pinned: bool = False
    pins: tuple[str, ...] = ()
    spans: tuple[tuple[int, ...], ...] = ()
    ordered: bool = False


@dataclass(frozen=True, slots=True)
class Structure:
    """Layers and segments of a model.

    Attributes:
        layers: by module name, in order of execution.
        segments: in order of execution.
        others: by the name of their weight, what multiplies by weights but has no name that masks could be given for
            (the projections of an attention), or keeps all channels (transposed convs in groups).
        origin: the program that was looked at, for exact costs; not part of equality, and not kept in JSON or copies.
    """

    layers: Mapping[str, Layer]
    segments: tuple[Segment, ...]
    others: Mapping[str, Layer] = field(default_factory=dict)
    origin: Origin = field(default_factory=lambda: Origin(), compare=False, repr=False)

    def producing(self, layer: str) -> Segment:
        """The segment of a layer's output channels (also of a depthwise conv's).

        Raises:
            ChanoptError: no such layer.
        """
        return self._segment(layer, lambda s: layer in s.producers or layer in s.through)

    def consuming(self, layer: str) -> Segment:
        """The segment of a layer's input channels (also of a depthwise conv's).

        Raises:
            ChanoptError: no such layer.
        """
        return self._segment(layer, lambda s: layer in s.consumers or layer in s.through)

    def _segment(self, layer: str, holds: Any) -> Segment:
        found = next((segment for segment in self.segments if holds(segment)), None)
        if found is None:
            raise ChanoptError(f"expected one of the layers {', '.join(list(self.layers)[:5])}, ..., found {layer!r}")
        return found

    def to_json(self) -> str:
        """The JSON text that :meth:`from_json` reads."""
        data = asdict(self)
        del data["origin"]
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> Structure:
        """Read a structure that :meth:`to_json` wrote."""
        data = json.loads(text)
        layers, others = (
            {name: Layer(**_tuples(fields)) for name, fields in data.get(table, {}).items()}
            for table in ("layers", "others")
        )
        return cls(layers, tuple(_segment_from(fields) for fields in data["segments"]), others)


class Origin:
    """Where a structure comes from. A copy, pickled or not, comes from nowhere: a program belongs to its model.

    Attributes:
        program: as lowered from the model, sharing its weights, or None.
    """

    __slots__ = ("program",)

    def __init__(self, program: Program | None = None) -> None:
        self.program = program

    def __reduce__(self) -> tuple[type[Origin], tuple[()]]:
        """Nothing of the program."""
        return Origin, ()


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, at every depth."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _segment_from(fields: Mapping[str, Any]) -> Segment:
    plain: dict[str, Any] = _tuples(dict(fields))
    plain["joins"] = tuple(Join(**join) for join in plain["joins"])
    return Segment(**plain)


def discover(
    model: nn.Module | Captured | Program,
    example_inputs: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Structure:
    """The layers and segments of a model.

    Args:
        model: a module in eval mode, what :func:`chanopt.capture` made of one, or a lowered program.
        example_inputs: positional inputs, as for :func:`chanopt.lower`; not needed for the other two.
        kwargs: keyword inputs.

    Raises:
        CaptureError, ChanoptError: as :func:`chanopt.lower`.
    """
    program = model if isinstance(model, Program) else lower(model, example_inputs, kwargs)
    return _Discovery(program).run()


class _Discovery:
    """One walk over a program: every channel of every value gets the label of the channel it is."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.of: dict[str, Numbers] = {}
        self.arrivals: dict[str, tuple[str, ...]] = {}
        self.parent: list[int] = []
        self.values: nx.Graph[str] = nx.Graph()
        self.pins: list[tuple[str, str]] = []
        self.joins: list[tuple[str, Op, list[Read]]] = []
        self.births: list[tuple[str, str]] = []
        self.reads: list[tuple[str, str, Numbers]] = []
        self.passes: list[tuple[str, str, str]] = []
        self.spans: list[tuple[str, Numbers]] = []
        self.ordered: set[str] = set()
        self.linear = _maskable(program)

    # -- labels ---------------------------------------------------------------------------------------------------

    def _fresh(self, count: int) -> Numbers:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def _root(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def _same(self, one: Numbers, other: Numbers) -> None:
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            if a != _ABSENT and b != _ABSENT:
                first, second = sorted((self._root(a), self._root(b)))
                self.parent[second] = first

    # -- the walk -------------------------------------------------------------------------------------------------

    def run(self) -> Structure:
        for op in self.program.ops:
            if op.kind is not Kind.SINK and self.program.values[op.result].layout is not None:
                self._result(op)
            for read in op.reads:
                if self.program.values[read.value].layout is not None:
                    self._read(op, read)
        self._share_modules()
        return Structure(self._layers(), self._segments(), others_of(self.program), Origin(self.program))

    def _result(self, op: Op) -> None:
        name, channels = op.result, self.program.values[op.result].live.channels
        self.values.add_node(name)
        flows = [read for read in op.reads if read.access is Access.FLOW]
        if op.kind is Kind.GROUPED or any(read.fan > 1 for read in flows):
            self.ordered.update((name, *(read.value for read in op.reads)))
        if not flows:
            self.of[name] = self._fresh(channels)
            self.arrivals[name] = (op.label(),)
            self.births.append((self._label(op), name))
            if op.kind in (Kind.SOURCE, Kind.BARRIER):
                self.pins.append((name, f"made by {_words(op, self.program)}"))
            return
        self.of[name] = self._flowing(op, flows, channels)
        self.arrivals[name] = tuple(dict.fromkeys(layer for read in flows for layer in self.arrivals[read.value]))
        self.values.add_edges_from((name, read.value) for read in flows)
        if op.kind is Kind.CONCAT:
            self.spans.extend((name, self.of[name][read.index.array >= 0]) for read in flows)
        if op.kind is Kind.SPLIT:
            self.spans.append((name, self.of[name]))
        if len(flows) > 1 and op.kind is not Kind.CONCAT:
            self.joins.append((name, op, flows))
        if op.kind is Kind.STATISTIC:
            self.pins.append((name, f"{op.target} counts its channels"))
        follow = [param.name for param in op.params if param.out is not None]
        if op.layer and follow:
            self.passes.append((op.layer, name, follow[0]))

    def _flowing(self, op: Op, flows: list[Read], channels: int) -> Numbers:
        """The labels of a result; what meets in one channel becomes one label."""
        labels = np.full(channels, _ABSENT)
        for read in flows:
            index = read.index.array.reshape(channels, read.fan)
            theirs = np.where(index >= 0, self.of[read.value][index], _ABSENT)
            for column in theirs.T:
                self._same(labels, column)
                labels = np.where(labels == _ABSENT, column, labels)
        return labels

    def _label(self, op: Op) -> str:
        """A layer if masks can be given for it, else a name in words."""
        return op.layer if op.layer in self.linear and op.linear else f"%{op.result}"

    def _read(self, op: Op, read: Read) -> None:
        if read.access is Access.FLOW:
            return
        labels = self.of[read.value][read.index.array] if read.access is Access.SET else self.of[read.value]
        if op.linear and op.layer in self.linear:
            self.reads.append((op.layer, read.value, labels))
        elif op.kind is Kind.SINK:
            self.pins.append((read.value, "an output of the network"))
        elif self.program.values[op.result].dtype != "int":
            self.pins.append((read.value, f"taken whole by {_words(op, self.program)}"))

    def _share_modules(self) -> None:
        """A module that is used twice has one mask: its channels at both uses are the same."""
        first: dict[tuple[str, str], tuple[str, Numbers]] = {}
        made = [(layer, value, self.of[value], "made") for layer, value in self.births]
        passed = [(weight, value, self.of[value], "passed") for _, value, weight in self.passes]
        read = [(layer, value, labels, "read") for layer, value, labels in self.reads]
        for shared, value, labels, side in [*made, *passed, *read]:
            before, theirs = first.setdefault((shared, side), (value, labels))
            if len(theirs) == len(labels):
                self._same(theirs, labels)
                self.values.add_edge(before, value)

    # -- results --------------------------------------------------------------------------------------------------

    def _layers(self) -> dict[str, Layer]:
        uses: dict[str, list[Op]] = {}
        for op in self.program.ops:
            if op.linear and op.layer in self.linear:
                uses.setdefault(op.layer, []).append(op)
        readers = self.program.uses()

        def norm(op: Op) -> str:
            return next((user.layer for user, _ in readers[op.result] if user.target == "aten.batch_norm.default"), "")

        return {name: layer_of(name, ops, self.program, norm(ops[0])) for name, ops in uses.items()}

    def _segments(self) -> tuple[Segment, ...]:
        order = {name: position for position, name in enumerate(self.of)}
        parts = [sorted(part, key=order.__getitem__) for part in nx.connected_components(self.values)]
        parts.sort(key=lambda part: order[part[0]])
        return tuple(self._segment(part) for part in parts)

    def _segment(self, values: list[str]) -> Segment:
        here = set(values)
        roots: dict[int, int] = {}
        for value in values:
            for label in self.of[value].tolist():
                if label != _ABSENT:
                    roots.setdefault(self._root(label), len(roots))

        def local(labels: Iterable[int]) -> Channels:
            return tuple(None if label == _ABSENT else roots[self._root(label)] for label in labels)

        producers = {n: local(self.of[v].tolist()) for n, v in self.births if v in here and n in self.linear}
        through = {n: local(self.of[v].tolist()) for n, v, _ in self.passes if v in here}
        consumers = {n: local(labels.tolist()) for n, v, labels in self.reads if v in here}
        joins = tuple(self._join(op, flows, local) for name, op, flows in self.joins if name in here)
        pins = tuple(dict.fromkeys(why for value, why in self.pins if value in here))
        name = next(iter(producers), next((n for n, v in self.births if v in here), f"%{values[0]}"))
        spans = dict.fromkeys(_set(local(labels.tolist())) for value, labels in self.spans if value in here)
        return Segment(
            name,
            len(roots),
            producers,
            consumers,
            through,
            joins,
            bool(pins),
            pins,
            tuple(span for span in spans if span),
            bool(self.ordered & here),
        )

    def _join(self, op: Op, flows: list[Read], local: Any) -> Join:
        behind = [
            np.where(read.index.array >= 0, self.of[read.value][read.index.array], _ABSENT)[:: read.fan]
            for read in flows
        ]
        return Join(
            op.target,
            op.layer,
            op.source,
            tuple(self.arrivals[read.value] for read in flows),
            tuple(local(labels.tolist()) for labels in behind),
        )


def _set(channels: Channels) -> tuple[int, ...]:
    return tuple(sorted({channel for channel in channels if channel is not None}))


def _words(op: Op, program: Program) -> str:
    if op.target == "alias" and program.producer(op.reads[0].value).kind is Kind.SOURCE:
        return f"input {op.reads[0].value}"
    return f"{op.target} ({op.layer})" if op.layer else op.target


def others_of(program: Program) -> dict[str, Layer]:
    """What multiplies by weights beside the layers that masks can be given for, by the name of its weight."""
    named = _maskable(program)
    uses: dict[str, list[Op]] = {}
    for op in program.ops:
        if multiplies(op) and not (op.linear and op.layer in named):
            uses.setdefault(op.args[1].name, []).append(op)
    return {name: layer_of(name, ops, program) for name, ops in uses.items()}


def multiplies(op: Op) -> bool:
    """Whether an op is a conv or a linear layer, also one whose channels the compiler does not follow."""
    weighted = len(op.args) > 2 and isinstance(op.args[0], Read) and isinstance(op.args[1], Param)
    return weighted and (op.linear or op.target.startswith(("aten.conv", "aten.linear.")))


def _maskable(program: Program) -> frozenset[str]:
    """Modules whose name stands for one weight, so that a mask by name says which channels are meant."""
    weights: dict[str, set[str]] = {}
    for op in program.ops:
        if op.linear and op.layer:
            weights.setdefault(op.layer, set()).add(weight_param(op).name)
    return frozenset(layer for layer, names in weights.items() if len(names) == 1)


def layer_of(name: str, ops: list[Op], program: Program, norm: str = "") -> Layer:
    """The layer that some ops with one weight are, with all its logical channels.

    Args:
        name: the layer's.
        ops: its uses.
        program: where they stand.
        norm: the batch norm behind it.
    """
    op = ops[0]
    kind = op.target.split(".")[1]
    inputs, outputs, groups = _sizes(op, program)
    assert program.dialect is not None  # of a lowered model
    window = program.dialect.window(op, program) or Window((), (), (), ())
    return Layer(
        name,
        kind,
        inputs,
        outputs,
        groups,
        window.kernel,
        window.stride,
        window.padding,
        window.dilation,
        isinstance(op.args[2], Param),
        sum(_positions(use, program) for use in ops),
        _others(op.reads[0].value, program),
        _others(op.result, program),
        len(ops),
        norm,
    )


def _sizes(op: Op, program: Program) -> tuple[int, int, int]:
    """Logical inputs, outputs and groups."""
    if op.linear:
        operand, result = (program.values[name].live.channels for name in (op.reads[0].value, op.result))
        return operand, result, op.groups if op.kind is Kind.GROUPED else operand if op.kind is Kind.MAP else 1
    transposed = op.target.startswith("aten.conv_transpose")
    groups = 1 if op.target.startswith("aten.linear.") else int(op.args[6])
    first, second = program.weights[op.args[1].name].shape[:2]
    return (first, second * groups, groups) if transposed else (second * groups, first, groups)


def _positions(op: Op, program: Program) -> int:
    transposed = op.target.startswith("aten.conv_transpose")
    value = program.values[op.reads[0].value if transposed else op.result]
    if value.layout is not None:
        return value.channel_bytes // getattr(torch, value.dtype).itemsize // max(1, program.batch)
    inputs, outputs, _ = _sizes(op, program)
    return prod(program.traced(value.name)) // (inputs if transposed else outputs) // max(1, program.batch)


def _others(name: str, program: Program) -> tuple[int, ...]:
    """Sizes of the axes that are neither the channels nor, in front, the batch."""
    axis = program.values[name].axis
    return tuple(size for place, size in enumerate(program.traced(name)) if place not in (0, axis))
