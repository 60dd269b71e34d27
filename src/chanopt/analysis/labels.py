"""Labels: which channels of different values are the same channel, as far as order goes.

Channels that flow into one another carry one label, through maps, joins, concats, slices and shuffles. A label stands
at most once in a value (or once per block in a flattened one), so an order of labels orders every value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chanopt.ir import Access, IndexMap, Kind, Op, Program, Read

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Labelling:
    """The labels of a program.

    Attributes:
        of: per value with channels, shape (channels,): the label of every logical channel.
        loose: (op result, operand position) of reads through which labels do not pass: the two sides have orders of
            their own, because one order could not serve both (``x + x[:, perm]``) or the op fixes its order.
        rigid: values that stay in logical order.
        crossed: values whose channels carry one label per block, where their blocks meet channels with labels of
            their own (a depthwise conv with two filters a channel, before an addition): no order of labels reaches
            past that join.
    """

    of: Mapping[str, Labels]
    loose: frozenset[tuple[str, int]]
    rigid: frozenset[str]
    crossed: frozenset[str]


def is_rigid(op: Op) -> bool:
    """Whether an op can only take and give its channels in logical order (groups, pixel shuffle)."""
    return op.groups > 1 or any(read.fan > 1 for read in op.reads)


def label(program: Program, rigid: Collection[str] = ()) -> Labelling:
    """Label every channel of a program; the values of ``rigid`` are to stay in logical order, whatever makes them."""
    fixed = frozenset(rigid) | {op.result for op in program.ops if is_rigid(op)}
    labeller = _Labeller(program, fixed)
    for op in program.ops:
        if op.kind is not Kind.SINK and program.values[op.result].layout is not None:
            labeller.op(op)
    return Labelling(labeller.of, frozenset(labeller.loose), fixed, frozenset(labeller.crossed))


def uncrossed(program: Program, labelling: Labelling) -> Labelling:
    """The labels with every block that is crossed rigid instead, so that labels meet where channels do."""
    while labelling.crossed:
        labelling = label(program, labelling.rigid | labelling.crossed)
    return labelling


class _Labeller:
    def __init__(self, program: Program, rigid: frozenset[str]) -> None:
        self.program, self.rigid = program, rigid
        self.of: dict[str, Labels] = {}
        self.loose: set[tuple[str, int]] = set()
        self.family: dict[str, set[str]] = {}
        self.block: dict[str, int] = {}
        self.spread: dict[str, frozenset[str]] = {}
        self.crossed: set[str] = set()
        self.parted: set[str] = set()
        self.count = 0

    def fresh(self, count: int) -> Labels:
        self.count += count
        return np.arange(self.count - count, self.count)

    def op(self, op: Op) -> None:
        if op.kind in (Kind.CONCAT, Kind.SPLIT):  # each operand's channels are a block of their own there
            self.parted.add(op.result)
        channels = self.program.values[op.result].live.channels
        flows = [(k, read) for k, read in enumerate(op.reads) if read.access is Access.FLOW]
        if not flows or op.result in self.rigid:
            self.loose.update((op.result, position) for position, _ in flows)
            self._begin(op.result, self.fresh(channels))
        elif op.kind is Kind.CONCAT:
            self._concat(op, flows, channels)
        else:
            self._join(op, flows, channels)

    def _begin(self, value: str, labels: Labels, block: int = 1, spread: frozenset[str] = frozenset()) -> None:
        self.of[value] = labels
        self.block[value] = block
        self.spread[value] = spread
        self.family[value] = {value}

    def _joined(self, value: str, operand: str) -> None:
        """One family: values whose labels have been made equal."""
        if self.family[value] is not self.family[operand]:
            self.family[value] |= self.family[operand]
            for member in self.family[operand]:
                self.family[member] = self.family[value]

    def _join(self, op: Op, flows: list[tuple[int, Read]], channels: int) -> None:
        (position, first), *others = flows
        labels, block = self.of[first.value][first.index.array], op.block * self.block[first.value]
        if _fits(labels, block):
            spread = self.spread[first.value] | ({op.result} if op.block > 1 else set())
            self._begin(op.result, labels, block, spread)
            self._joined(op.result, first.value)
        else:
            self.loose.add((op.result, position))
            self._begin(op.result, self.fresh(channels))
        for position, read in others:
            if self.block[op.result] != self.block[read.value]:
                self.crossed |= self.spread[op.result] | self.spread[read.value]
            if not self._same(op.result, read):
                self.loose.add((op.result, position))

    def _same(self, result: str, read: Read) -> bool:
        """Make the labels of another operand equal to the result's, if they can be."""
        theirs, ours = self.of[read.value][read.index.array], self.of[result]
        if self.family[result] is self.family[read.value]:
            return np.array_equal(theirs, ours)
        if self._rename(read.value, theirs, result, ours) or self._rename(result, ours, read.value, theirs):
            self._joined(result, read.value)
            return True
        return False

    def _rename(self, value: str, old: Labels, other: str, new: Labels) -> bool:
        """Give the family of a value the labels of another, in whose blocks it then moves, if all of it can."""
        block, spread = self.block[other], self.spread[other]
        if len(np.unique(old)) != len(old):
            return False
        renamed = np.arange(self.count)
        renamed[old] = new
        labels = {member: renamed[self.of[member]] for member in self.family[value]}
        blocks = {member: self.block[member] * block for member in self.family[value]}
        if block > 1 and any(member in self.parted or not _fits(labels[member], blocks[member]) for member in labels):
            return False
        self.of |= labels
        self.block |= blocks
        self.spread |= {member: self.spread[member] | spread for member in labels}
        return True

    def _concat(self, op: Op, flows: list[tuple[int, Read]], channels: int) -> None:
        labels = np.full(channels, -1)
        passing: list[Read] = []
        for position, read in flows:
            here = read.index.array >= 0
            block = self.of[read.value][read.index.array[here]]
            if len(np.unique(block)) != len(block) or np.isin(block, labels).any():
                self.loose.add((op.result, position))
                self.crossed |= self.spread[read.value]
                block = self.fresh(len(block))
            else:
                passing.append(read)
            labels[here] = block
        labels[labels < 0] = self.fresh(int((labels < 0).sum()))
        self._begin(op.result, labels)
        for read in passing:
            self._joined(op.result, read.value)


def _fits(labels: Labels, block: int) -> bool:
    """Whether labels stand once each, or fill one block each where channels have been spread out."""
    if len(labels) % block:
        return False
    heads = labels[::block]
    return len(np.unique(heads)) == len(heads) and bool((labels.reshape(-1, block) == heads[:, None]).all())


def unique_in_order(labels: Labels) -> IndexMap:
    """The distinct labels in order of first appearance."""
    _, first = np.unique(labels, return_index=True)
    return IndexMap(labels[np.sort(first)])
