"""Demand: which channels of every value some reader needs (backwards; design: one fact per value, not per segment)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chanopt.analysis.weights import used
from chanopt.ir import Access, IndexMap, Kind, Op, Program, Read, flow_back

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Demand:
    """What is needed of a program.

    Attributes:
        live: per value with channels, shape (channels,): which are needed, rounded up to what the op can make.
        needed: names of the values that are needed at all.
        sets: per op result and operand, the channels that a SET read takes.
        padding: per value, channels kept only because the op that makes or reads them cannot do without.
    """

    live: Mapping[str, Mask]
    needed: frozenset[str]
    sets: Mapping[tuple[str, str], IndexMap]
    padding: Mapping[str, Mask]


def demand(program: Program) -> Demand:
    """Compute the demand of every value."""
    return _Backwards(program).run()


class _Backwards:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.live: dict[str, Mask] = {
            value.name: np.zeros(value.layout.channels, np.bool_)
            for value in program.values.values()
            if value.layout is not None
        }
        self.padding: dict[str, Mask] = {name: mask.copy() for name, mask in self.live.items()}
        self.needed: set[str] = set()
        self.sets: dict[tuple[str, str], IndexMap] = {}

    def run(self) -> Demand:
        for op in reversed(self.program.ops):
            if op.kind is Kind.SINK or op.kind is Kind.SOURCE or op.result in self.needed:
                self._op(op)
        return Demand(self.live, frozenset(self.needed), self.sets, self.padding)

    def _op(self, op: Op) -> None:
        if op.result in self.live:
            self._round_up(op)
        for read in op.reads:
            if self.program.values[read.value].layout is None:
                self.needed.add(read.value)
            else:
                self._read(op, read)

    def _round_up(self, op: Op) -> None:
        """Grow what is needed of a result to what the op can make: whole blocks, whole groups, everything."""
        asked = self.live[op.result]
        made = rounded(op, asked)
        self.padding[op.result] |= made & ~asked
        self.live[op.result] = made

    def _read(self, op: Op, read: Read) -> None:
        channels = self._channels(op, read)
        if not len(channels):
            return
        self.needed.add(read.value)
        self.live[read.value][channels.array] = True

    def _channels(self, op: Op, read: Read) -> IndexMap:
        operand = self.program.values[read.value].live
        if read.access is Access.ALL:
            return IndexMap.identity(operand.channels)
        if read.access is Access.FLOW:
            return flow_back(read, IndexMap(np.flatnonzero(self.live[op.result])))
        taken = self._taken(op, read) if op.linear else read.index
        self.sets[op.result, read.value] = taken
        return taken

    def _taken(self, op: Op, read: Read) -> IndexMap:
        rows = self.live[op.result]
        table = used(op, self.program)
        if op.kind is Kind.GROUPED:
            return self._grouped(op, read, table, rows)
        present = np.zeros(self.program.values[read.value].live.channels, np.bool_)
        present[read.index.array] = True
        taken = table[rows].any(0) & present
        if not taken.any():  # a layer needs an input to have a batch and a size: one channel, if possible a live one
            pool = present & self.live[read.value] if (present & self.live[read.value]).any() else present
            taken[np.flatnonzero(pool)[0]] = True
            self.padding[read.value] |= taken & ~self.live[read.value]
        return IndexMap(np.flatnonzero(taken))

    def _grouped(self, op: Op, read: Read, table: Mask, rows: Mask) -> IndexMap:
        """Per group the channels that any row needs, filled up to the same number in every group that is left."""
        groups = table.reshape(op.groups, -1, table.shape[1])
        alive = rows.reshape(op.groups, -1)
        wanted = (groups & alive[:, :, None]).any(1)
        present = np.zeros(wanted.size, np.bool_)
        present[read.index.array] = True
        filled = _even(wanted & present.reshape(wanted.shape), np.any(alive, axis=1), present.reshape(wanted.shape))
        extra = np.zeros(wanted.size, np.bool_)
        extra[:] = (filled & ~wanted).reshape(-1)
        self.padding[read.value] |= extra & ~self.live[read.value]
        return IndexMap(np.flatnonzero(filled))


def rounded(op: Op, asked: Mask) -> Mask:
    """The least set of result channels that an op can make which contains the asked ones."""
    if op.kind in (Kind.SOURCE, Kind.BARRIER):
        return np.ones_like(asked)
    if op.kind is Kind.GROUPED:
        table = asked.reshape(op.groups, -1)
        return _even(table, np.any(table, axis=1), np.ones_like(table)).reshape(-1)
    size = len(asked) // op.groups if op.kind is Kind.STATISTIC else op.block
    return np.repeat(asked.reshape(-1, size).any(1), size) if size > 1 else asked


def _even(wanted: Mask, alive: Mask, allowed: Mask) -> Mask:
    """Fill every group that is alive up to the same number of channels, the lowest ones first."""
    most = max(1, int(wanted.sum(1).max(initial=0)))
    filled = wanted.copy()
    for group in np.flatnonzero(alive):
        spare = np.flatnonzero(allowed[group] & ~filled[group])
        filled[group, spare[: most - int(filled[group].sum())]] = True
    filled[~alive] = False
    return filled
