"""Which layers must be pruned alike for a network to be thinned, and what to say where they are not.

Filters of layers whose outputs are added must be the same ones, and input channels of layers that read one value must
be the same ones; Distiller stops there with an exception from deep inside torch, or adds channels that do not belong
together and says nothing. Here the disagreement is found, named and mended beforehand; and since chanopt cuts
networks whose masks disagree exactly, it need not be mended at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import networkx as nx

from chanopt.errors import ScheduleError
from chanopt.ir import IndexMap
from chanopt.pruning.structure import Channels, Join, Segment, Structure

Side = Literal["filters", "channels"]

_MOST = 12  # layers that a message lists


@dataclass(frozen=True, slots=True)
class Kept:
    """What one layer keeps.

    Attributes:
        layer: its name.
        of: how many channels it has on this side.
        keep: which it keeps, in its own numbering; None where that is not known yet.
        pruner: who says so, by name; empty where nobody prunes it.
    """

    layer: str
    of: int
    keep: tuple[int, ...] | None
    pruner: str = ""

    def __str__(self) -> str:
        who = f" (pruner {self.pruner})" if self.pruner else ""
        if self.keep is None:
            return f"{self.layer} keeps what {self.pruner} will choose of {self.of}"
        shown = f": {IndexMap(self.keep)}" if 0 < len(self.keep) < self.of else ""
        return f"{self.layer} keeps {len(self.keep)} of {self.of}{shown}{who}"


@dataclass(frozen=True, slots=True)
class Conflict:
    """Layers that must keep the same channels and do not, or need not.

    Attributes:
        side: whether their filters (outputs) or their input channels disagree.
        segment: the segment they share.
        layers: what each keeps.
        join: where the channels meet; None where layers read one value.
        remedy: the lines of YAML that make them agree; empty where none do.
    """

    side: Side
    segment: str
    layers: tuple[Kept, ...]
    join: Join | None
    remedy: str = ""

    def __str__(self) -> str:
        lines = [self._where(), *self._sides()]
        if len(self.layers) > _MOST:
            lines.append(f"  ... and {len(self.layers) - _MOST} more")
        if self.remedy:
            lines += ["to prune them alike, let them follow one leader:", self.remedy]
        else:
            lines.append(
                "no leader can have them pruned alike: the same numbers are not the same channels in all of them"
            )
        return "\n".join(lines)

    def _where(self) -> str:
        if self.join is None:
            return (
                f"expected the layers that read the channels of {self.segment} to keep the same input channels, found:"
            )
        place = f" of {self.join.layer}" if self.join.layer else ""
        source = f", at {self.join.source}" if self.join.source else ""
        return f"expected the layers whose filters meet at {self.join.op}{place}{source} to keep the same ones, found:"

    def _sides(self) -> list[str]:
        """What each layer keeps, in the order in which they arrive at the join."""
        if self.join is None:
            return [f"  {kept}" for kept in self.layers[:_MOST]]
        kept = {entry.layer: entry for entry in self.layers}
        told: list[str] = []
        for number, operand in enumerate(self.join.operands):
            told += [f"  operand {number}: {kept.pop(layer)}" for layer in operand if layer in kept]
        return (told + [f"  further on: {entry}" for entry in kept.values()])[:_MOST]


class DisagreementError(ScheduleError):
    """Layers that have to keep the same channels do not; ``conflicts`` tells which."""

    def __init__(self, conflicts: Iterable[Conflict]) -> None:
        self.conflicts = tuple(conflicts)
        told = "\n".join(map(str, self.conflicts))
        super().__init__(
            f'{told}\nor go on without constraint: on_conflict="unconstrained" leaves the channels on which they '
            "disagree in the network, masked; chanopt.optimize then computes exactly what the masked network does, "
            "without the channels that none of these layers keeps"
        )


def coupled(segment: Segment, side: Side) -> list[tuple[str, ...]]:
    """The layers of a segment that must keep the same channels, in order of execution; lone layers, too.

    Args:
        segment: layers that share channels.
        side: ``filters``: layers that make the same channels. ``channels``: layers that read the same ones.
    """
    layers = segment.producers if side == "filters" else segment.consumers
    graph: nx.Graph[tuple[str, str | int]] = nx.Graph()
    for name, channels in layers.items():
        graph.add_edges_from((("layer", name), ("channel", c)) for c in channels if c is not None)
    groups = [{name for kind, name in part if kind == "layer"} for part in nx.connected_components(graph)]
    order = list(layers)
    found = [tuple(name for name in order if name in group) for group in groups]
    return sorted(found, key=lambda group: order.index(group[0]))


def alike(segment: Segment, side: Side, layers: Iterable[str]) -> bool:
    """Whether the same numbers are the same channels in all these layers, so that one mask serves them all.

    Readers of a concat and of one of its operands are as little alike as a conv and a linear layer behind a flatten.
    """
    table = segment.producers if side == "filters" else segment.consumers
    return len({table[name] for name in layers}) <= 1


def join_of(segment: Segment, layers: Iterable[str]) -> Join | None:
    """The first join at which channels of at least two of these layers meet, or one of them with others."""
    wanted = set(layers)
    arriving = [(join, [wanted & set(operand) for operand in join.operands]) for join in segment.joins]
    for join, found in arriving:
        if sum(map(bool, found)) > 1 and len(set().union(*found)) > 1:
            return join
    return next((join for join, found in arriving if any(found)), None)


def zero_channels(mapping: Channels, dead: Iterable[int]) -> set[int]:
    """The segment's channels all of whose counterparts in a layer are dead.

    Args:
        mapping: the segment's channel of each of the layer's.
        dead: the layer's channels that are dead.
    """
    gone = set(dead)
    alive = {channel for number, channel in enumerate(mapping) if number not in gone}
    return {channel for channel in mapping if channel is not None} - alive


def conflicts_of(structure: Structure, side: Side, dead: Mapping[str, Iterable[int]]) -> list[Conflict]:
    """Where layers that are coupled have dropped different channels.

    Args:
        structure: of the network.
        side: which side of the layers was pruned.
        dead: by layer, the channels on that side that it has dropped.
    """
    return [
        _conflict(structure, segment, side, group, dead)
        for segment in structure.segments
        for group in coupled(segment, side)
        if not segment.pinned and _disagree(segment, side, group, dead)
    ]


def _disagree(segment: Segment, side: Side, group: tuple[str, ...], dead: Mapping[str, Iterable[int]]) -> bool:
    layers = segment.producers if side == "filters" else segment.consumers
    gone = {name: zero_channels(layers[name], dead.get(name, ())) for name in group}
    wanted = set().union(*gone.values())
    return any(wanted & set(layers[name]) - gone[name] for name in group)


def _conflict(
    structure: Structure, segment: Segment, side: Side, group: tuple[str, ...], dead: Mapping[str, Iterable[int]]
) -> Conflict:
    kept = tuple(_kept(structure, side, name, dead.get(name, ())) for name in group)
    names = ", ".join(f"{name}.weight" for name in group)
    remedy = f"    group_dependency: Leader\n    weights: [{names}]" if alike(segment, side, group) else ""
    return Conflict(side, segment.name, kept, join_of(segment, group) if side == "filters" else None, remedy)


def _kept(structure: Structure, side: Side, name: str, dead: Iterable[int]) -> Kept:
    layer, gone = structure.layers[name], set(dead)
    count = layer.out_channels if side == "filters" else layer.in_channels
    return Kept(name, count, tuple(channel for channel in range(count) if channel not in gone))
