"""Choose, for every conv that reads some channels of a tensor, how it comes by them on the target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import ClassVar

import numpy as np
import torch

from chanopt.analysis.convs import image_conv
from chanopt.analysis.weights import weight_param
from chanopt.ir import Beside, Fusing, How, IndexMap, Op, Param, Program, Read, physical_read
from chanopt.pass_infra import Pass, PassResult
from chanopt.target import ConvRead, Realization, Target

READS = "reads"
"""Key of this pass's notes: a tuple of :class:`Realized`."""

_HOW = {Realization.GEMM: How.PRODUCT, Realization.RUNS: How.RUNS, Realization.FUSED: How.FUSED}
_WIDER = (Realization.COVER, Realization.DENSE)


@dataclass(frozen=True, slots=True)
class Realized:
    """How a conv comes by its channels, and what the ways it has were said to cost.

    Attributes:
        result: the value that it makes.
        layer: the user's module.
        way: the one that was chosen.
        seconds: predicted, or measured, by way.
    """

    result: str
    layer: str
    way: Realization
    seconds: Mapping[Realization, float]


@dataclass(frozen=True)
class RealizeReads(Pass):
    """Let every conv read in the way that costs least on the target (chanopt.target).

    Cases:
        1. a 1x1 conv becomes a matrix product over the strided range, or a sum of such products over a few ranges,
           where the device would copy the range before a conv;
        2. on a GPU, channels last, a conv becomes ``chanopt::gather_conv2d``, which gathers while it loads, and with it
           what stands right before (a batch norm, or that and an activation) and right after (a sum, an activation);
        3. where copying costs more than multiplying with zeros, the read is widened to the shortest range that covers
           it, or to all of the tensor, with zero columns in the weight (on a CPU only where costs are measured).

    Ties, and gains below ``margin``, leave the plain way: a view of a range, or a gather.

    Attributes:
        margin: share of the plain way's cost that another way must save.

    Before and after (a CPU, channels last)::

        %b = mix conv2d(%a{4:36}, @w<0,1>, ...)      %b = mix conv2d(%a{4:36}, @w<0,1>, ...) how=product
    """

    margin: float = 0.03

    name: ClassVar[str] = "realize_reads"

    def apply(self, program: Program) -> PassResult:
        """Decide conv by conv; a gather that several share is divided among them."""
        target = replace(Target.parse(program.target), cost=program.costs)
        reads = _Reads(program, target)
        found = {op.result: read for op in program.ops if (read := reads.of(op)) is not None}
        target.prepare(list(found.values()))
        shared = Counter(reads.gathered(op) for op in program.ops if op.result in found)
        weights: dict[str, torch.Tensor] = {}
        notes: list[Realized] = []
        new: dict[str, Op] = {}
        for op in program.ops:
            if op.result not in found:
                continue
            read = replace(found[op.result], sharing=shared[reads.gathered(op)])
            chosen = self._chosen(op, read, target)
            notes.append(chosen)
            new[op.result] = _realized(op, chosen.way, program, weights)
            if chosen.way is Realization.FUSED:
                new |= {other.result: replace(other, how=How.INLINED) for other in reads.beside(op).ops}
        ops = [new.get(op.result, op) for op in program.ops]
        changed = any(after is not before for after, before in zip(ops, program.ops, strict=True))
        after = program.evolve(ops=ops, weights=weights) if changed else program
        return PassResult(after, changed, notes={READS: tuple(notes)})

    def _chosen(self, op: Op, read: ConvRead, target: Target) -> Realized:
        costs = {way: target.seconds(read, way) for way in target.ways(read)}
        plain = next(iter(costs))
        best = min(costs, key=lambda way: costs[way])
        gains = costs[best] < (1 - self.margin) * costs[plain]
        return Realized(op.result, op.label(), best if gains else plain, costs)


class _Reads:
    """The convs of a program that have a choice."""

    def __init__(self, program: Program, target: Target) -> None:
        self.program = program
        self.target = target
        self.fuses = target.fuses(channels_last=program.channels_last)

    @cached_property
    def fusing(self) -> Fusing:
        """What stands beside convs."""
        return Fusing(self.program)

    def beside(self, op: Op) -> Beside:
        """What a kernel that gathers does with a conv."""
        return self.fusing.beside(op) if self.fuses else Beside()

    def gathered(self, op: Op) -> tuple[str, IndexMap]:
        """Which positions of which value a conv takes, or what its kernel does before it: two alike share a gather."""
        value, positions, _ = self.fusing.gathered(op, self.beside(op).before)
        return value, positions

    def of(self, op: Op) -> ConvRead | None:
        """The conv of an op, if it reads a part of a tensor, or a kernel can do what comes before it; else None."""
        program, window = self.program, image_conv(op, self.program)
        if window is None or op.how is not How.OWN:
            return None
        beside = self.beside(op)
        value, positions = self.gathered(op)
        stored, made = len(program.values[value].live), len(program.values[op.result].live)
        if not made or not len(positions) or (len(positions) == stored and not beside.before):
            return None
        # Inductor makes one pass of several, and lays the operands of a CPU's convs out channels last.
        compiled = self.target.compiler == "inductor"
        last = program.channels_last or (compiled and self.target.device == "cpu")
        before, after = (min(len(ops), 1) if compiled else len(ops) for ops in (beside.before, beside.after))
        itemsize = program.weights[weight_param(op).name].element_size()
        runs = IndexMap(np.sort(positions.array)).runs()
        shape = (window.kernel, window.stride, window.padding, window.dilation, program.traced(value)[2:])
        return ConvRead(stored, tuple(runs), made, *shape, program.batch, itemsize, last, before=before, after=after)


def _realized(op: Op, way: Realization, program: Program, weights: dict[str, torch.Tensor]) -> Op:
    if way in _HOW:
        return replace(op, how=_HOW[way])
    return _widened(op, way, program, weights) if way in _WIDER else op


def _widened(op: Op, way: Realization, program: Program, weights: dict[str, torch.Tensor]) -> Op:
    """The op reading more channels, with zeros in its weight for those it did not read."""
    read, param = op.reads[0], weight_param(op)
    layout = program.values[read.value].live
    positions = physical_read(op, read, program).positions.array
    first, last = (0, len(layout)) if way is Realization.DENSE else (positions.min(), positions.max() + 1)
    wide = IndexMap(layout.live.array[first:last])
    tensor = program.weights[param.name]
    assert param.inn is not None  # the weight of a mix
    unread = torch.ones(tensor.shape[param.inn], dtype=torch.bool, device=tensor.device)
    unread[torch.from_numpy(read.index.array.copy()).to(tensor.device)] = False
    name = param.name
    if sum(other.name == name for user in program.ops for other in user.params) > 1:  # the others keep theirs
        taken = {*program.weights, *weights}
        name = next(new for number in count() if (new := f"{name}_covering{number or ''}") not in taken)
    weights[name] = tensor.detach().index_fill(param.inn, unread.nonzero().flatten(), 0)
    new: dict[int, Read | Param] = {id(read): replace(read, index=wide), id(param): replace(param, name=name)}
    return op.map_args(lambda arg: new.get(id(arg), arg))
