"""Round the channels of every tensor up to whole groups, where the device reads groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from chanopt.analysis.demand import Mask
from chanopt.analysis.widening import Lives, can_make, widened
from chanopt.ir import IndexMap, Layout, Op, Program
from chanopt.pass_infra import Pass
from chanopt.target import GROUP, Target


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

    multiple: int = GROUP

    name: ClassVar[str] = "align_channels"

    def apply(self, program: Program) -> Program:
        """Round value after value, results before what they are made of."""
        if not Target.parse(program.target).fuses(channels_last=program.channels_last):
            return program
        makers = {op.result: op for op in program.ops}
        live: Lives = {name: value.layout.live for name, value in program.values.items() if value.layout is not None}
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
        spare = np.setdiff1d(np.flatnonzero(can_make(op, program)), live[op.result].array)
        if not missing or len(spare) < missing:
            return live

        def behind(value: str, mask: Mask) -> IndexMap:
            before = live[value].array
            return IndexMap(np.concatenate([before, np.setdiff1d(np.flatnonzero(mask), before)]))

        grown = widened(program, makers, live, op.result, IndexMap(spare[:missing]), behind)
        return live if grown is None or len(grown[op.result]) % self.multiple else grown
