"""Widening: giving a value more live channels than are needed, and all it is computed from with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from chanopt.analysis.demand import Mask, rounded
from chanopt.analysis.labels import is_rigid
from chanopt.ir import Access, IndexMap, Kind, Op, Program, Read, flow_back

Lives = Mapping[str, IndexMap]
Arrange = Callable[[str, Mask], IndexMap]
"""From a value and its live channels, shape (channels,), to these in the order in which they are to lie."""


def widened(
    program: Program, makers: Mapping[str, Op], live: Lives, value: str, channels: IndexMap, arrange: Arrange
) -> dict[str, IndexMap] | None:
    """The live channels of every value once one of them has these channels too; None where an op cannot give them.

    Args:
        program: the program, for the logical channels of its values.
        makers: the op that makes each value.
        live: the live channels of every value, in physical order.
        value: the value that is widened.
        channels: what it gets, besides what it has.
        arrange: called for every value that changes.
    """
    grown = dict(live)
    queue = [(value, channels)]
    while queue:
        name, wanted = queue.pop()
        op = makers[name]
        mask = np.zeros(program.values[name].live.channels, np.bool_)
        mask[grown[name].array] = True
        before = int(mask.sum())
        mask[wanted.array] = True
        mask = rounded(op, mask)
        if int(mask.sum()) == before:
            continue
        if is_rigid(op) or not can_make(op, program)[mask].all():
            return None
        grown[name] = arrange(name, mask)
        flows = (read for read in op.reads if read.access is Access.FLOW)
        queue.extend((read.value, flow_back(read, grown[name])) for read in flows)
    return grown


def can_make(op: Op, program: Program) -> Mask:
    """Shape (channels,): the result channels that an op can make; of a concat, operands nobody needs are gone."""
    made = np.ones(program.values[op.result].live.channels, np.bool_)
    there = [_present(read, len(made)) for read in op.reads if read.access is Access.FLOW]
    together = np.stack([made, *there])
    return np.any(together[1:], axis=0) if op.kind is Kind.CONCAT else np.all(together, axis=0)


def _present(read: Read, channels: int) -> Mask:
    return np.all(read.index.array.reshape(channels, read.fan) >= 0, axis=1)
