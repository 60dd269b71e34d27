"""What a read is physically: all of a tensor, a range of it, or a gather."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from chanopt.ir.index_map import IndexMap
from chanopt.ir.program import Access, How, Kind, Op, Program, Read


class Form(enum.Enum):
    """The physical form of a read."""

    WHOLE = "whole"
    RANGE = "range"
    GATHER = "gather"
    FUSED = "fused"  # several ranges, which the op, or the conv that does it, reads itself: no copy


@dataclass(frozen=True, slots=True)
class PhysicalRead:
    """Positions of the operand that are read, in reading order.

    Attributes:
        channels: the logical channels, in the same order (what the columns of a weight follow).
        positions: their physical positions.
        form: all of the tensor as it lies, one range of it, a gather, or ranges that the op reads without a copy.
    """

    channels: IndexMap
    positions: IndexMap
    form: Form


def logical_read(op: Op, read: Read, program: Program) -> IndexMap:
    """The logical operand channels that ``op`` takes, before the operand's order is considered."""
    value = program.values[read.value]
    if read.access is Access.ALL or value.layout is None:
        return IndexMap.identity(value.layout.channels if value.layout else 0)
    if read.access is Access.SET:
        return read.index
    wanted = program.values[op.result].live.live
    return flow_back(read, wanted)


def flow_back(read: Read, wanted: IndexMap) -> IndexMap:
    """The operand channels behind the given result channels, in order, absent ones left out."""
    table = read.index.array.reshape(-1, read.fan)
    found = table[wanted.array].reshape(-1)
    return IndexMap(found[found >= 0])


def physical_read(op: Op, read: Read, program: Program) -> PhysicalRead:
    """How ``op`` takes an operand: the channels in reading order and the form of the read.

    A mix takes its channels in whatever order they lie, so that a set which fills a range is a range.
    """
    layout = program.values[read.value].live
    wanted = logical_read(op, read, program)
    positions = layout.positions(wanted)
    if read.access is Access.SET and op.kind is not Kind.GROUPED:
        order = np.argsort(positions.array, kind="stable")
        wanted, positions = IndexMap(wanted.array[order]), IndexMap(positions.array[order])
    if op.block > 1:  # a channel that is spread out, or multiplied by a depthwise conv, is read once
        wanted, positions = IndexMap(wanted.array[:: op.block]), IndexMap(positions.array[:: op.block])
    form = _form(positions, len(layout))
    itself = op.how is How.INLINED or (read.access is Access.SET and op.how in (How.RUNS, How.FUSED))
    if form is Form.GATHER and itself:
        form = Form.FUSED
    return PhysicalRead(wanted, positions, form)


def physical_reads(op: Op, program: Program) -> list[tuple[Read, PhysicalRead]]:
    """Every channelled read of an op with its form; those of a concat piece by piece, in the result's order."""
    if op.kind is not Kind.CONCAT:
        channelled = (read for read in op.reads if program.values[read.value].layout is not None)
        return [(read, physical_read(op, read, program)) for read in channelled]
    return list(_pieces(op, program))


def _pieces(op: Op, program: Program) -> Iterator[tuple[Read, PhysicalRead]]:
    """A concat's operands as maximal stretches of the result that come from one operand."""
    live, reads = program.values[op.result].live.live.array, op.reads
    origin = np.full(len(live), -1)
    for number, read in enumerate(reads):
        origin[read.index.array[live] >= 0] = number
    cuts = np.flatnonzero(np.diff(origin)) + 1
    for stretch in np.split(live, cuts):
        if not len(stretch):
            continue
        read = reads[int(origin[np.flatnonzero(live == stretch[0])[0]])]
        layout = program.values[read.value].live
        wanted = IndexMap(read.index.array[stretch])
        positions = layout.positions(wanted)
        yield read, PhysicalRead(wanted, positions, _form(positions, len(layout)))


def _form(positions: IndexMap, size: int) -> Form:
    if positions.is_identity(size):
        return Form.WHOLE
    return Form.RANGE if len(positions) and positions.is_range() else Form.GATHER
