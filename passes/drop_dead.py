"""Drop channels and ops that nobody needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from chanopt.analysis.demand import Demand, demand
from chanopt.ir import Access, IndexMap, Kind, Layout, Op, Program, Read, Value
from chanopt.pass_infra import Pass, Property


def _dead(program: Program) -> str | None:
    wanted = demand(program)
    for value in program.values.values():
        if value.layout is None:
            continue
        dead = value.layout.mask() & ~wanted.live[value.name]
        if dead.any():
            return f"channels {IndexMap(np.flatnonzero(dead))} of %{value.name}, which nobody needs"
    return None


ONLY_DEMANDED = Property("only demanded channels are live", _dead, "DropDead")


@dataclass(frozen=True)
class DropDead(Pass):
    """Cut every value to the channels that some reader needs, and drop ops without any.

    Cases:
        1. a channel without a reader leaves the layout of its value (per value: a residual chain shrinks along its
           way);
        2. a mix takes only the columns in which a live row has a weight;
        3. a concat loses operands that give nothing;
        4. an op whose result nobody needs goes.

    Every read then takes just what its result needs: where a value needs less than its operand has, the read is a
    range or a gather. Whether that is worth a copy is for OrderChannels to say.

    Before and after::

        %a : [b, 64*, 8, 8] = mix conv(%x{0:64})            %a : [b, 64*, 8, 8] {0:20,31} = mix conv(%x{0:64})
        %y : [b, 10*, 8, 8] = mix conv(%a{0:64})            %y : [b, 10*, 8, 8] = mix conv(%a{0:20,31})
    """

    name: ClassVar[str] = "drop_dead"
    ensures: ClassVar[tuple[Property, ...]] = (ONLY_DEMANDED,)

    def apply(self, program: Program) -> Program:
        """Cut; the same program if nothing is dead."""
        wanted = demand(program)
        ops = [_cut_reads(op, wanted) for op in program.ops if _is_needed(op, wanted)]
        values = {op.result: _cut_value(program.values[op.result], wanted) for op in ops if op.result}
        if len(ops) == len(program.ops) and all(values[name] == program.values[name] for name in values):
            same = all(new == old for new, old in zip(ops, program.ops, strict=True))
            return program if same else program.evolve(ops=ops, values=values)
        return program.evolve(ops=ops, values=values)


def _is_needed(op: Op, wanted: Demand) -> bool:
    return op.kind in (Kind.SOURCE, Kind.SINK) or op.result in wanted.needed


def _cut_value(value: Value, wanted: Demand) -> Value:
    if value.layout is None:
        return value
    keep = wanted.live[value.name][value.layout.live.array]
    if keep.all():
        return value
    return replace(value, layout=Layout(value.layout.channels, IndexMap(value.layout.live.array[keep])))


def _cut_reads(op: Op, wanted: Demand) -> Op:
    def cut(arg: Any) -> Any:
        if not isinstance(arg, Read) or arg.access is not Access.SET:
            return arg
        taken = wanted.sets.get((op.result, arg.value), arg.index)
        return arg if taken == arg.index else replace(arg, index=taken)

    op = op.map_args(cut)
    if op.kind is not Kind.CONCAT:
        return op
    operands = tuple(read for read in op.reads if _gives(read, op, wanted))
    return op if len(operands) == len(op.reads) else replace(op, args=(operands, *op.args[1:]))


def _gives(read: Read, op: Op, wanted: Demand) -> bool:
    return bool((read.index.array[wanted.live[op.result]] >= 0).any())
