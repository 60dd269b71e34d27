"""Round the channels of every tensor up to whole groups, where the device reads groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from chanopt.analysis.demand import rounded
from chanopt.analysis.labels import is_rigid
from chanopt.ir import Access, IndexMap, Kind, Layout, Op, Program, flow_back
from chanopt.pass_infra import Pass
from chanopt.target import Target

Lives = dict[str, IndexMap]


@dataclass(frozen=True)
class AlignChannels(Pass):
    """On a GPU, channels last, keep a few dead channels so that counts are multiples of a group.

    Tensor cores, 16-byte loads and ``chanopt::gather_conv2d`` want groups of 8 channels. What is kept is computed as it
    was and read by nobody; it lies behind the rest, so that ranges stay ranges.

    Cases:
        1. a value gets the first channels that nobody needs, and with it whatever it is computed from;
        2. a value that has too few of them, or whose channels may not change, is left alone.

    Attributes:
        multiple: channels in a group.

    Before and after::

        %a {0:5} = mix conv(%x{0:3})          %a {0:8} = mix conv(%x{0:3})
    """

    multiple: int = 8

    name: ClassVar[str] = "align_channels"

    def apply(self, program: Program) -> Program:
        """Round value after value, results before what they are made of."""
        if Target.parse(program.target).device != "cuda" or not program.channels_last:
            return program
        makers = {op.result: op for op in program.ops}
        live = {name: value.layout.live for name, value in program.values.items() if value.layout is not None}
        for op in reversed(program.ops):
            if op.result in live and len(program.values[op.result].shape) == 4:
                live = self._aligned(op, program, live, makers)
        changed = {
            name: replace(value, layout=Layout(value.live.channels, live[name]))
            for name, value in program.values.items()
            if name in live and value.live.live != live[name]
        }
        return program.evolve(values=changed) if changed else program

    def _aligned(self, op: Op, program: Program, live: Lives, makers: Mapping[str, Op]) -> Lives:
        missing = -len(live[op.result]) % self.multiple
        spare = np.setdiff1d(np.flatnonzero(_makes(op, program)), live[op.result].array)
        if not missing or len(spare) < missing:
            return live
        grown = _grown(op.result, spare[:missing], program, live, makers)
        fits = grown is not None and len(grown[op.result]) % self.multiple == 0
        return grown if fits and grown is not None else live


def _makes(op: Op, program: Program) -> np.ndarray:
    """Shape (channels,): what an op can make; a concat has lost operands of which nothing was needed."""
    made = np.ones(program.values[op.result].live.channels, np.bool_)
    flows = [read.index.array[: len(made)] >= 0 for read in op.reads if read.access is Access.FLOW and read.fan == 1]
    if op.kind is Kind.CONCAT:
        return np.logical_or.reduce(flows)
    return np.logical_and.reduce([made, *flows])


def _grown(value: str, added: np.ndarray, program: Program, live: Lives, makers: Mapping[str, Op]) -> Lives | None:
    """Every value with what the wider one needs; None where an op cannot give it."""
    grown, queue = dict(live), [(value, added)]
    while queue:
        name, wanted = queue.pop()
        op = makers[name]
        mask = np.zeros(program.values[name].live.channels, np.bool_)
        mask[grown[name].array] = True
        mask[wanted] = True
        mask = rounded(op, mask)
        mask[grown[name].array] = False
        new = np.flatnonzero(mask)
        if not len(new):
            continue
        if is_rigid(op) or not _makes(op, program)[new].all():
            return None
        grown[name] = IndexMap(np.concatenate([grown[name].array, new]))
        flows = (read for read in op.reads if read.access is Access.FLOW)
        queue.extend((read.value, flow_back(read, IndexMap(new)).array) for read in flows)
    return grown
