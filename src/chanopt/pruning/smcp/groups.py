"""Which channels are pruned together, and what would be cut off if a group were pruned whole.

A *group* is the channels of a segment that the same layers make and read: a segment without concats is one group, in
a dense block every operand of the concat is one. Within a group channels are ranked, and only the number that stays
is chosen. The groups of SMCP's paper (section 3.1) are the segments.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
from torch import nn

from chanopt.api import Captured, lower
from chanopt.errors import AllocationError
from chanopt.ir import Kind, Program
from chanopt.pruning.structure import Channels, Segment, Structure, discover

__all__ = ["Groups", "PruningGroup", "discover_groups", "input_groups", "output_groups"]

Ports = Mapping[str, tuple[tuple[int, ...], ...]]
"""Per layer, for every channel of the group the layer's channels that are it."""


@dataclass(frozen=True, slots=True)
class PruningGroup:
    """Channels that the same layers make and read.

    Attributes:
        name: the segment's name, and the number of the group in it if there are several.
        channels: how many.
        producers, consumers: layers that make and read them.
        through: depthwise convs, batch norms and others that pass them on.
        kept: why all channels must stay, or "" where they may go.
        cut: whether without all of them nothing of the input would reach the output.
        segment: the segment's place in the structure.
    """

    name: str
    channels: int
    producers: Ports
    consumers: Ports
    through: Ports
    kept: str = ""
    cut: bool = False
    segment: int = 0

    @property
    def prunable(self) -> bool:
        """Whether channels may go."""
        return not self.kept


@dataclass(frozen=True)
class Groups:
    """The groups of a model.

    Attributes:
        structure: layers and segments.
        groups: in order of execution.
        norms: per layer, the batch norms that take its output as it is.
        flow: which value is made of which, as a graph; nodes have a `layer` if masks can be given for it.
    """

    structure: Structure
    groups: tuple[PruningGroup, ...]
    norms: Mapping[str, tuple[str, ...]]
    flow: nx.DiGraph[str] = field(repr=False, compare=False)

    def input_sizes(self) -> dict[str, tuple[int, ...]]:
        """Per layer, the sizes of its input without batch and channels."""
        return {name: layer.input_size for name, layer in self.structure.layers.items()}

    def connected(self, gone: Collection[int]) -> bool:
        """Whether something of the input reaches the output where these groups are pruned whole."""
        dead = self._dead(gone)
        alive = [node for node in self.flow if self.flow.nodes[node]["layer"] not in dead]
        graph = self.flow.subgraph(alive)
        ends = {kind: [n for n in graph if graph.nodes[n]["kind"] is kind] for kind in (Kind.SOURCE, Kind.SINK)}
        return any(nx.has_path(graph, start, end) for start in ends[Kind.SOURCE] for end in ends[Kind.SINK])

    def cut_in(self, gone: Iterable[int]) -> tuple[int, ...] | None:
        """Of groups that are pruned whole, a least set that already cuts the network; None if they do not."""
        left = sorted(gone)
        if self.connected(left):
            return None
        for group in list(left):
            fewer = [other for other in left if other != group]
            if not self.connected(fewer):
                left = fewer
        return tuple(left)

    def protect(self, patterns: Sequence[str]) -> Groups:
        """The groups with those that touch the given layers kept whole: their inputs, and what they make.

        Args:
            patterns: names of layers, or regular expressions that match a whole name.

        Raises:
            AllocationError: a pattern that matches no layer.
        """
        named = {name for pattern in patterns for name in self._matching(pattern)}
        groups: list[PruningGroup] = []
        for group in self.groups:
            touching = sorted(named & {*group.consumers, *group.producers, *group.through})
            why = group.kept or (f"{', '.join(touching)} must not be pruned" if touching else "")
            groups.append(replace(group, kept=why))
        return replace(self, groups=tuple(groups))

    def _matching(self, pattern: str) -> list[str]:
        layers = list(self.structure.layers)
        found = [name for name in layers if name == pattern]
        found = found or [name for name in layers if re.fullmatch(pattern, name)]
        if not found:
            near = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.3) or layers[:3]
            raise AllocationError(
                f"expected the name of a layer or a regular expression that matches one, found {pattern!r}; "
                f"nearest: {', '.join(near)}"
            )
        return found

    def _dead(self, gone: Collection[int]) -> set[str]:
        """Layers that read nothing but channels of these groups."""
        missing = set(gone)
        alive = {name for n, group in enumerate(self.groups) if n not in missing for name in group.consumers}
        return {name for n in missing for name in self.groups[n].consumers} - alive


def discover_groups(
    model: nn.Module | Captured | Program,
    example_inputs: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Groups:
    """The groups of a model, of what was captured of one, or of a program.

    Raises:
        CaptureError, ChanoptError: as :func:`chanopt.lower`.
    """
    program = model if isinstance(model, Program) else lower(model, example_inputs, kwargs)
    structure = discover(program)
    plain = tuple(
        group for number, segment in enumerate(structure.segments) for group in _split(segment, number, structure)
    )
    groups = Groups(structure, _distinct(plain), _norms(program), _flow(program))
    cuts = {number for number in range(len(plain)) if not groups.connected([number])}
    marked = tuple(replace(group, cut=number in cuts) for number, group in enumerate(groups.groups))
    return replace(groups, groups=marked)


def input_groups(structure: Structure) -> tuple[tuple[str, ...], ...]:
    """Layers that share an input, and so must drop the same of it; heads are groups of one."""
    return tuple(tuple(segment.consumers) for segment in structure.segments if segment.consumers)


def output_groups(structure: Structure) -> tuple[tuple[str, ...], ...]:
    """Layers whose outputs meet, the mirror image; tails are groups of one."""
    return tuple(tuple(segment.producers) for segment in structure.segments if segment.producers)


def _split(segment: Segment, number: int, structure: Structure) -> list[PruningGroup]:
    """A segment's groups: its channels by who makes, reads and passes them."""
    makers, readers, passers = (
        _ports(side, segment.channels) for side in (segment.producers, segment.consumers, segment.through)
    )
    sides = (makers, readers, passers)
    members: dict[tuple[tuple[tuple[str, int], ...], ...], list[int]] = {}
    for channel in range(segment.channels):
        signature = tuple(
            tuple((name, len(ports[channel])) for name, ports in side.items() if ports[channel]) for side in sides
        )
        members.setdefault(signature, []).append(channel)
    why = _why_kept(segment, structure)
    return [
        PruningGroup(
            segment.name if len(members) == 1 else f"{segment.name}[{place}]",
            len(channels),
            _part(makers, channels),
            _part(readers, channels),
            _part(passers, channels),
            why or ("" if signature[1] else "no layer reads them"),
            segment=number,
        )
        for place, (signature, channels) in enumerate(members.items())
    ]


def _distinct(groups: Sequence[PruningGroup]) -> tuple[PruningGroup, ...]:
    """Groups of different names: a name that stands for several gets a number."""
    count = Counter(group.name for group in groups)
    seen: Counter[str] = Counter()
    named: list[PruningGroup] = []
    for group in groups:
        seen[group.name] += 1
        name = f"{group.name}#{seen[group.name]}" if count[group.name] > 1 else group.name
        named.append(replace(group, name=name))
    return tuple(named)


def _ports(side: Mapping[str, Channels], channels: int) -> dict[str, list[list[int]]]:
    table: dict[str, list[list[int]]] = {name: [[] for _ in range(channels)] for name in side}
    for name, numbers in side.items():
        for port, channel in enumerate(numbers):
            if channel is not None:
                table[name][channel].append(port)
    return table


def _part(side: Mapping[str, list[list[int]]], channels: Sequence[int]) -> dict[str, tuple[tuple[int, ...], ...]]:
    return {
        name: tuple(tuple(ports[channel]) for channel in channels)
        for name, ports in side.items()
        if any(ports[channel] for channel in channels)
    }


def _why_kept(segment: Segment, structure: Structure) -> str:
    if segment.pinned:
        return "; ".join(segment.pins)
    around = {*segment.producers, *segment.consumers, *segment.through} & set(structure.layers)
    grouped = sorted(name for name in around if _is_grouped(name, structure))
    return f"{', '.join(grouped)} works in groups" if grouped else ""


def _is_grouped(name: str, structure: Structure) -> bool:
    layer = structure.layers[name]
    return layer.groups > 1 and not layer.depthwise


def _norms(program: Program) -> dict[str, tuple[str, ...]]:
    uses = program.uses()
    return {
        op.layer: tuple(
            user.layer for user, _ in uses[op.result] if user.layer and ".batch_norm." in f".{user.target}."
        )
        for op in program.ops
        if op.linear and op.layer
    }


def _flow(program: Program) -> nx.DiGraph[str]:
    graph: nx.DiGraph[str] = nx.DiGraph()
    for op in program.ops:
        graph.add_node(op.result, layer=op.layer if op.linear else None, kind=op.kind)
        # A size that is read off a tensor carries nothing of what the tensor holds.
        tensors = [read.value for read in op.reads if program.values[read.value].dtype != "int"]
        graph.add_edges_from((value, op.result) for value in tensors)
    return graph
