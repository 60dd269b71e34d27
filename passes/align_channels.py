"""Round the channels of tensors up to counts that the device is quick at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from chanopt.analysis.convs import image_conv
from chanopt.analysis.demand import Mask
from chanopt.analysis.widening import Lives, can_make, widened
from chanopt.ir import Access, Fusing, IndexMap, Kind, Layout, Op, Program, Read, flow_back
from chanopt.pass_infra import Pass, PassResult
from chanopt.target import Gains, Grain, Target

IntArray = npt.NDArray[np.int64]
_NONE: IntArray = np.empty(0, np.int64)

ROUNDED = "rounded"
"""Key of this pass's notes: by value, the channels that it got."""


@dataclass(frozen=True)
class AlignChannels(Pass):
    """Keep a few dead channels where the device is quicker with them (:func:`chanopt.target.grain`).

    What is kept is computed as it was and read by nobody. It lies behind the rest, or in front, so that ranges stay
    ranges.

    Cases:
        1. a value gets some channels that nobody needs, and with it whatever it is computed from, if a conv that gains
           by it is among those: first the channels beside the range that an addition takes of an operand;
        2. where a device has additions take operands whole, a value gets all of those;
        3. where convs gather while they load, a concat that only they read takes its operands as they lie, if it would
           gather from one, or shares one with other concats, and becomes no more than twice as wide: a gather and a
           concat copy its channels twice, and concats of what lies alike can be one memory;
        4. a value that has too few of them, would grow too much, or whose channels may not change, is left alone, and
           so is one that an op reads as it lies, if that op would have to copy the first channels of more.

    Before and after (a GPU, channels last)::

        %a {0:5} = mix conv(%x{0:3})          %a {0:8} = mix conv(%x{0:3})
    """

    name: ClassVar[str] = "align_channels"

    def apply(self, program: Program) -> PassResult:
        """Round value after value, results before what they are made of."""
        target = Target.parse(program.target)
        grain = target.grain(channels_last=program.channels_last, batch=program.batch)
        rounding = None if grain is None else _Rounding(program, grain)
        if rounding is None or not rounding.worthwhile:
            return PassResult(program, modified=False)
        live: Lives = {name: value.layout.live for name, value in program.values.items() if value.layout is not None}
        before: Lives = {}
        while live is not before:  # one value that has grown may let another
            before = live
            for op in reversed(program.ops):
                if op.result in live and len(program.values[op.result].shape) == 4:
                    live = rounding.of(op, rounding.concatenated(op, live))
        changed = {
            name: replace(value, layout=Layout(value.live.channels, live[name]))
            for name, value in program.values.items()
            if name in live and value.live.live != live[name]
        }
        if not changed:
            return PassResult(program, modified=False)
        added = {name: np.setdiff1d(live[name].array, program.values[name].live.live.array) for name in changed}
        return PassResult(program.evolve(values=changed), modified=True, notes={ROUNDED: added})


class _Rounding:
    """Rounding the values of a program to a grain."""

    def __init__(self, program: Program, grain: Grain) -> None:
        self.program = program
        self.grain = grain
        self.makers: Mapping[str, Op] = {op.result: op for op in program.ops}
        self.uses = program.uses()
        self.gaining = {op.result for op in program.ops if self._gains(op)}
        self.fed: set[str] = set(self.gaining)
        """Values that are made, channel by channel, of what gains."""
        for op in program.ops:
            if any(read.access is Access.FLOW and read.value in self.fed for read in op.reads):
                self.fed.add(op.result)

        self.gathered: set[str] = self._gathered() if grain.whole_concats else set()
        """Concats that only convs' kernels read, or concats of this kind."""
        self.joined = Counter(read.value for op in program.ops if op.kind is Kind.CONCAT for read in op.reads)
        """How many concats a value goes into."""

    @property
    def worthwhile(self) -> bool:
        """Whether the program has anything that is quicker for it."""
        return bool(self.fed) or self.grain.whole_joins

    def of(self, op: Op, live: Lives) -> Lives:
        """The live channels of every value once an op's result has a round count, if that is worth it."""
        # Both are asked of all that grows when that is known, but most answers can be had for less: the readers of the
        # result itself, at least, do not grow with it.
        if not (self.grain.whole_joins or op.result in self.fed) or not self._takes_a_part(op.result, live, set()):
            return live
        count = len(live[op.result])
        near = self._beside(op, live, far=False) if self.grain.whole_joins else (_NONE, _NONE)
        cut = np.concatenate(near)
        if not len(cut) and not count % self.grain.multiple:
            return live
        front, behind = near if len(cut) else self._beside(op, live, far=True)
        spare = can_make(op, self.program)
        spare[live[op.result].array] = False
        ranked = np.concatenate([behind, front[::-1], np.flatnonzero(spare)])
        ranked = ranked[np.sort(np.unique(ranked, return_index=True)[1])]
        ranked = ranked[spare[ranked]]
        whole = count + int(spare[cut].sum())
        missing = whole - count + -whole % self.grain.multiple
        if not missing or missing > self.grain.growth * count or len(ranked) < missing:
            return live
        chosen = ranked[:missing]

        def arrange(value: str, mask: Mask) -> IndexMap:
            before = live[value].array
            new = np.setdiff1d(np.flatnonzero(mask), before)
            # Other channels than the result's, or such as must stay together.
            if self.makers[value].block > 1 or not np.isin(new, chosen).all():
                return IndexMap(np.concatenate([before, new]))
            first = front[np.isin(front, new)]
            rest = chosen[np.isin(chosen, new) & ~np.isin(chosen, first)]
            return IndexMap(np.concatenate([first, before, rest]))

        grown = widened(self.program, self.makers, live, op.result, IndexMap(chosen), arrange)
        if grown is None or len(grown[op.result]) % self.grain.multiple:
            return live
        changed = [name for name in grown if grown[name] is not live[name]]
        return grown if self._pays(changed, live, grown, joins=len(cut) > 0) else live

    def _gathered(self) -> set[str]:
        fusing = Fusing(self.program)
        convs = [op for op in self.program.ops if image_conv(op, self.program) is not None]
        first = [next(iter(fusing.beside(op).before), op) for op in convs]
        reads = {(op.reads[0].value, op.result) for op in first}
        found: set[str] = set()
        for op in reversed(self.program.ops):
            users = [user.result for user, _ in self.uses[op.result]] if op.kind is Kind.CONCAT else []
            if users and all((op.result, user) in reads or user in found for user in users):
                found.add(op.result)
        return found

    def concatenated(self, op: Op, live: Lives) -> Lives:
        """The live channels of every value once a concat takes its operands as they lie, if that is worth it."""
        if op.result not in self.gathered:
            return live
        gathers = any(len(self._positions(op, read, live).runs()) > 1 for read in op.reads)
        made = np.concatenate([self._carried(read, live) for read in op.reads])
        before = live[op.result].array
        if not (gathers or self._shares(op)) or np.array_equal(made, before):
            return live
        if not len(before) <= len(made) <= 2 * len(before) or not np.isin(before, made).all():
            return live
        return {**live, op.result: IndexMap(made)}

    def _shares(self, op: Op) -> bool:
        """Whether a concat joins, or is, what other concats join too: what lies alike can lie in one memory."""
        return op.result in self.joined or any(self.joined[read.value] > 1 for read in op.reads)

    def _beside(self, op: Op, live: Lives, *, far: bool) -> tuple[IntArray, IntArray]:
        """The result channels made of what lies in front of, and behind, a range that a join takes.

        With these it takes a longer range; with others it would have to gather. Looked for in the op itself and, while
        all of an operand is taken, channel by channel, in what makes that: through maps, and joins too if `far`.
        """
        front, behind = [_NONE], [_NONE]
        seen, queue = {op.result}, [op]
        while queue:
            op = queue.pop()
            for read in op.reads if op.kind in (Kind.MAP, Kind.JOIN) else ():
                if read.access is not Access.FLOW or not read.index.is_identity(len(read.index)) or read.value in seen:
                    continue
                seen.add(read.value)
                stored, runs = live[read.value].array, self._positions(op, read, live).runs()
                if runs == [(0, len(stored))]:
                    if far or op.kind is Kind.MAP:
                        queue.append(self.makers[read.value])
                elif len(runs) == 1:
                    front.append(stored[: runs[0][0]])
                    behind.append(stored[runs[0][1] :])
        return np.concatenate(front), np.concatenate(behind)

    def _positions(self, op: Op, read: Read, live: Lives) -> IndexMap:
        """Where the channels lie that an op reads."""
        return self._layout(read.value, live).positions(flow_back(read, live[op.result]))

    def _carried(self, read: Read, live: Lives) -> IntArray:
        """The result channels that the live channels of an operand become, in the order in which those lie."""
        made = np.flatnonzero(np.isin(read.index.array, live[read.value].array))
        positions = self._layout(read.value, live).positions(IndexMap(read.index.array[made]))
        return made[np.argsort(positions.array, kind="stable")]

    def _layout(self, value: str, live: Lives) -> Layout:
        return Layout(self.program.values[value].live.channels, live[value])

    def _pays(self, changed: Sequence[str], live: Lives, grown: Lives, *, joins: bool) -> bool:
        """Whether what has grown gains by it (`joins`: an addition does), and nothing that reads it loses."""
        if self.grain.gains is Gains.ALL:
            return True
        gains = joins or any(name in self.gaining and not len(grown[name]) % self.grain.multiple for name in changed)
        bounded = all(len(grown[name]) - len(live[name]) <= self.grain.growth * len(live[name]) for name in changed)
        apart = all(self._takes_a_part(name, live, set(changed)) for name in changed)
        gathers = any(self._gathers(self.makers[name], live, grown) for name in changed)
        return gains and bounded and apart and not gathers

    def _gathers(self, op: Op, live: Lives, grown: Lives) -> bool:
        """Whether an op takes in several ranges what it took in one."""
        flows = [read for read in op.reads if read.access is Access.FLOW]
        before, after = ([len(self._positions(op, read, lives).runs()) for read in flows] for lives in (live, grown))
        return op.kind is Kind.CONCAT or any(new > old == 1 for old, new in zip(before, after, strict=True))

    def _gains(self, op: Op) -> bool:
        """Whether an op is a conv that is quicker with a round count."""
        if self.grain.gains is Gains.ALL:
            return bool(op.result)
        window = self.program.dialect.window(op, self.program) if self.program.dialect is not None else None
        if window is None or window.transposed:
            return False
        pointwise = all(size == 1 for size in window.kernel)
        if self.grain.gains is Gains.DEPTHWISE:
            return op.kind is Kind.MAP and not pointwise
        return op.kind is Kind.MIX and pointwise

    def _takes_a_part(self, name: str, live: Lives, changed: set[str]) -> bool:
        """Whether no reader that does not grow with a value is slower for reading only its first channels."""
        return self.grain.gains is Gains.ALL or all(
            op.result in changed
            or _channels(op, read, live) < len(live[name])
            or (self.grain.slices and image_conv(op, self.program) is not None)
            for op, read in self.uses[name]
        )


def _channels(op: Op, read: Read, live: Lives) -> int:
    """How many channels of a value an op reads."""
    if read.access is Access.SET:
        return len(read.index)
    whole = read.access is Access.ALL or op.result not in live
    return len(live[read.value]) if whole else len(flow_back(read, live[op.result]))
