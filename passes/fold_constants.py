"""Move constant channels out of activations and into biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from chanopt.analysis.constants import Values, constants
from chanopt.analysis.demand import Demand, demand
from chanopt.analysis.weights import bias_values, kernel_sums, used, weight_param
from chanopt.ir import Access, IndexMap, Kind, Op, Param, Program, Read, flow_back
from chanopt.ir.edit import WeightEdits
from chanopt.pass_infra import Pass, Property


def carriers(program: Program, known: Mapping[str, Values]) -> dict[str, int]:
    """Per value, the constant channel that carries all its constants for the readers that see a border.

    The one of greatest magnitude, for the sake of rounding; one per value, so that its readers share it.
    """
    chosen: dict[str, int] = {}
    for op in program.ops:
        if not (op.linear and op.border and op.kind is Kind.MIX):
            continue
        read = op.reads[0]
        magnitude = np.nan_to_num(np.abs(known[read.value]))
        magnitude[~_taken(op, read, program)] = 0.0
        if read.value not in chosen and magnitude.any():
            chosen[read.value] = int(magnitude.argmax())
    return chosen


def _taken(op: Op, read: Read, program: Program) -> np.ndarray:
    """Shape (operand channels,): which the op has a weight for that is not zero."""
    taken = np.zeros(program.values[read.value].live.channels, np.bool_)
    columns = used(op, program)
    if op.kind is Kind.GROUPED:
        taken[:] = columns.reshape(op.groups, -1, columns.shape[1]).any(1).reshape(-1)
    else:
        taken[:] = columns.any(0)
    return taken


def _unfolded(program: Program) -> str | None:
    known = constants(program)
    held = carriers(program, known)
    for op in program.ops:
        if op.linear and op.kind is not Kind.MAP and len(_to_fold(op, program, known, held)):
            return f"constant channels {_to_fold(op, program, known, held)} read by {op.label()}"
    return None


def _to_fold(op: Op, program: Program, known: Mapping[str, Values], held: Mapping[str, int]) -> IndexMap:
    """The constant operand channels that a mix still has weights for, less the carrier."""
    read = op.reads[0]
    values = known[read.value]
    foldable = ~np.isnan(values) & _taken(op, read, program)
    if op.border and op.kind is Kind.GROUPED:
        foldable &= values == 0
    if op.border and read.value in held:
        foldable[held[read.value]] = False
    return IndexMap(np.flatnonzero(foldable))


CONSTANTS_FOLDED = Property("constant channels have no weights but the carriers'", _unfolded, "FoldConstants")


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Give the part that constant channels play to the biases of who reads them.

    Cases:
        1. a mix that sees no border: ``bias += sum_c k_c W[:, c]``, the columns become zero;
        2. a mix that zero-pads, k_c = 0: the column becomes zero;
        3. a mix that zero-pads, k_c not 0: one constant channel c0 carries all,
           ``W[:, c0] = sum_c k_c W[:, c] / k_c0``, exact at the border and for every height and width; readers of a
           value share its carrier;
        4. an operand of a join whose every needed channel is constant becomes a parameter (a dead branch goes);
        5. adding a parameter that is zero everywhere goes.

    Before and after::

        %y = mix conv(%x{0:64}, @w, @b)    # channel 3 of %x is the constant 0.5
        %y = mix conv(%x{0:64}, @w, @b)    # @w[:, 3] = 0, @b has 0.5 * w[:, 3]
    """

    name: ClassVar[str] = "fold_constants"
    ensures: ClassVar[tuple[Property, ...]] = (CONSTANTS_FOLDED,)

    def apply(self, program: Program) -> Program:
        """Fold until nothing is left to fold: what one fold makes unneeded may leave only constants elsewhere."""
        while True:
            known = constants(program)
            folded = _Folding(program, known).run() if _any_constant(known) else program
            if folded is program:
                return program
            program = folded


def _any_constant(known: Mapping[str, Values]) -> bool:
    return any(not np.isnan(values).all() for values in known.values())


class _Folding:
    def __init__(self, program: Program, known: Mapping[str, Values]) -> None:
        self.program, self.known = program, known
        self.held = carriers(program, known)
        self.wanted: Demand = demand(program)
        self.edits = WeightEdits(program)
        self.renamed: dict[str, str] = {}

    def run(self) -> Program:
        ops = [op for op in map(self.op, self.program.ops) if op is not None]
        if not self.renamed and all(new is old for new, old in zip(ops, self.program.ops, strict=True)):
            return self.program
        ops = [op.map_args(self._rename) for op in ops]
        return self.program.evolve(ops=ops, weights=self.edits.tensors)

    def _rename(self, arg: object) -> object:
        if isinstance(arg, Read) and arg.value in self.renamed:
            return replace(arg, value=self.renamed[arg.value])
        return arg

    def op(self, op: Op) -> Op | None:
        if op.linear and op.kind is not Kind.MAP:
            return self.mix(op)
        return self.join(op) if op.kind is Kind.JOIN else op

    def mix(self, op: Op) -> Op:
        gone = _to_fold(op, self.program, self.known, self.held)
        if not len(gone):
            return op
        values = np.nan_to_num(self.known[op.reads[0].value])
        bias = bias_values(op, self.program)
        if not op.border:
            bias = bias + _contribution(op, self.program, values, gone)
            op = self.edits.set_bias(op, bias)
        carrier = self.held.get(op.reads[0].value) if op.border and op.kind is Kind.MIX else None
        return self.edits.set_weight(op, _without(op, self.edits.tensors, values, gone, carrier))

    def join(self, op: Op) -> Op | None:
        """Cases 4 and 5."""
        flows = [read for read in op.reads if read.access is Access.FLOW]
        for read in flows:
            others = [other for other in flows if other is not read]
            if self._settled(op, read) and any(self._full(op, other) for other in others):
                return self._with_parameter(op, read, others)
        return op

    def _settled(self, op: Op, read: Read) -> bool:
        live = IndexMap(np.flatnonzero(self.wanted.live[op.result]))
        return len(live) > 0 and not np.isnan(self.known[read.value][flow_back(read, live).array]).any()

    def _full(self, op: Op, read: Read) -> bool:
        return self.program.values[read.value].shape == self.program.values[op.result].shape

    def _with_parameter(self, op: Op, read: Read, others: list[Read]) -> Op | None:
        result = self.program.values[op.result]
        values = np.nan_to_num(self.known[read.value][read.index.array])
        live = self.wanted.live[op.result]
        neutral = self._neutral(op, read, values[live], others)
        if neutral is not None:
            self.renamed[op.result] = neutral
            return None
        assert result.axis is not None
        shape = [-1] + [1] * (len(result.shape) - 1 - result.axis)
        tensor = torch.from_numpy(values).to(getattr(torch, self.program.values[read.value].dtype)).reshape(shape)
        name = self.edits.add(f"{op.layer}.constant".lstrip("."), tensor)
        made = op.map_args(lambda arg: Param(name, out=0, buffer=True) if arg is read else arg)
        return replace(made, kind=Kind.MAP) if len(others) == 1 else made

    def _neutral(self, op: Op, read: Read, values: Values, others: list[Read]) -> str | None:
        """The other operand, if joining it with these constants changes nothing."""
        if len(others) != 1 or not others[0].index.is_identity(self.program.values[op.result].live.channels):
            return None
        dialect = self.program.dialect
        if (
            dialect is None
            or others[0].value in self.renamed
            or not dialect.is_neutral(op, op.reads.index(read), values)
        ):
            return None
        same = self.program.values[others[0].value].dtype == self.program.values[op.result].dtype
        return others[0].value if same and self._full(op, others[0]) else None


def _contribution(op: Op, program: Program, values: Values, gone: IndexMap) -> Values:
    """Shape (result channels,): what the given constant channels add to every pixel."""
    kept = np.zeros_like(values)
    kept[gone.array] = values[gone.array]
    sums = kernel_sums(op, program)
    rows, width = sums.shape
    start = np.arange(rows) * op.groups // rows * width
    return (kept[start[:, None] + np.arange(width)] * sums).sum(1)


def _without(
    op: Op, tensors: Mapping[str, torch.Tensor], values: Values, gone: IndexMap, carrier: int | None
) -> torch.Tensor:
    """The weight with the columns of the given channels zero, their part moved to the carrier's column."""
    param = weight_param(op)
    assert param.out is not None
    assert param.inn is not None
    weight = tensors[param.name].detach().clone(memory_format=torch.preserve_format)
    lanes = weight.movedim((param.out, param.inn), (0, 1))
    if op.kind is Kind.GROUPED:
        height, width = len(lanes) // op.groups, lanes.shape[1]
        for channel in gone:
            group = channel // width
            lanes[group * height : (group + 1) * height, channel % width] = 0
        return weight
    columns = torch.from_numpy(gone.array.copy())
    if carrier is not None and values[carrier] != 0:
        ratio = torch.from_numpy(values[gone.array] / values[carrier]).to(weight.device)
        moved = torch.tensordot(lanes[:, columns].double(), ratio, dims=([1], [0]))
        lanes[:, carrier] += moved.to(weight.dtype)
    lanes[:, columns] = 0
    return weight
