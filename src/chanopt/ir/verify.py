"""The rules of the IR, checked one by one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from chanopt.errors import IRError
from chanopt.ir.fusing import Fusing
from chanopt.ir.program import Access, How, Kind, Op, Param, Program, Read, Value
from chanopt.ir.reads import flow_back


def verify(program: Program) -> None:
    """Check a program.

    Rules:
        1. SSA: every value is made by exactly one op, and only after that is it read.
        2. There is exactly one sink, and it is last.
        3. A value with a channel axis has a layout with as many logical channels as its shape says; others none.
        4. Sources and barriers make all logical channels in their logical order.
        5. A FLOW read names, for every logical result channel, ``fan`` channels of the operand (or none).
        6. Everything a read takes is live in the operand's layout; ALL reads take all channels.
        7. A result that exists in blocks has whole blocks; inside one the order is the logical one.
        8. A grouped mix has as many channels in every group that is left, groups in order.
        9. Every parameter has a tensor (if the program has any) with as many entries as the channels it follows.
        10. An inlined op stands beside a fused conv whose kernel can do it (asked if there are weights and a dialect).

    Raises:
        IRError: the rule, the op, its layer and source line.
    """
    made: set[str] = set()
    for op in program.ops:
        for problem in _problems(op, program, made):
            raise IRError(
                f"{problem}\n  in op: {op.target} -> %{op.result} (layer {op.layer or '-'})\n  from: {op.source or '-'}"
            )
        made.add(op.result)
    for op in _astray(program):
        raise IRError(f"rule 10: expected a fused conv beside the inlined op {op.label()}, found none that can do it")
    sinks = [op for op in program.ops if op.kind is Kind.SINK]
    if len(sinks) != 1 or program.ops[-1] is not sinks[0]:
        raise IRError(f"rule 2: expected exactly one sink at the end, found {len(sinks)}")


def _astray(program: Program) -> Iterator[Op]:
    inlined = [op for op in program.ops if op.how is How.INLINED]
    if not inlined or program.dialect is None or not program.weights:
        return
    fusing = Fusing(program)
    done = {op.result for conv in program.ops if conv.how is How.FUSED for op in fusing.inlined(conv).ops}
    yield from (op for op in inlined if op.result not in done)


def _problems(op: Op, program: Program, made: set[str]) -> Iterator[str]:
    yield from _ssa(op, program, made)
    if op.kind is not Kind.SINK:
        yield from _result(op, program.values[op.result])
    for read in op.reads:
        yield from _read(op, read, program)
    if op.kind is Kind.GROUPED:
        yield from _groups(op, program)
    for param in op.params:
        yield from _param(op, param, program)


def _ssa(op: Op, program: Program, made: set[str]) -> Iterator[str]:
    if op.result in made:
        yield f"rule 1: expected %{op.result} to be made once, found it made twice"
    if op.kind is not Kind.SINK and op.result not in program.values:
        yield f"rule 1: expected %{op.result} among the values, found no such value"
    for read in op.reads:
        if read.value not in made:
            yield f"rule 1: expected %{read.value} to be made before it is read, found it made later or never"


def _result(op: Op, value: Value) -> Iterator[str]:
    if (value.axis is None) != (value.layout is None):
        yield f"rule 3: expected %{value.name} to have a channel axis and a layout or neither"
    if value.axis is None or value.layout is None:
        return
    if not 0 <= value.axis < len(value.shape):
        yield (
            f"rule 3: expected the channel axis of %{value.name} within its {len(value.shape)} dimensions, "
            f"found {value.axis}"
        )
    elif value.shape[value.axis] != value.layout.channels:
        yield (
            f"rule 3: expected {value.shape[value.axis]} channels in %{value.name}, "
            f"found a layout of {value.layout.channels}"
        )
    if op.kind in (Kind.SOURCE, Kind.BARRIER) and not value.layout.is_identity:
        yield f"rule 4: expected all channels of %{value.name} in order, found {value.layout.live}"
    if op.block > 1:
        yield from _blocks(value, op.block)


def _blocks(value: Value, block: int) -> Iterator[str]:
    live = value.live.live.array
    whole = len(live) % block == 0
    if not whole or not np.array_equal(live.reshape(-1, block) - live[::block, None], _ramp(live, block)):
        yield f"rule 7: expected whole blocks of {block} channels in %{value.name}, found {value.live.live}"


def _ramp(live: np.ndarray, block: int) -> np.ndarray:
    return np.broadcast_to(np.arange(block), (len(live) // block, block))


def _read(op: Op, read: Read, program: Program) -> Iterator[str]:
    operand = program.values.get(read.value)
    if operand is None or (operand.layout is None and read.access is Access.ALL):
        return
    if operand.layout is None:
        yield f"rule 5: expected %{read.value} to have channels, found none"
        return
    wanted = read.index
    if read.access is Access.ALL:
        if len(operand.layout) != operand.layout.channels:
            yield f"rule 6: expected all channels of %{read.value} to be live, found {operand.layout.live}"
        return
    if read.access is Access.FLOW:
        result = program.values[op.result].live
        if len(read.index) != result.channels * read.fan:
            yield (
                f"rule 5: expected {result.channels * read.fan} entries in the read of %{read.value}, "
                f"found {len(read.index)}"
            )
            return
        wanted = flow_back(read, result.live)
    outside = len(wanted) and not (0 <= int(wanted.array.min()) <= int(wanted.array.max()) < operand.layout.channels)
    if outside:
        yield f"rule 5: expected channels of %{read.value} below {operand.layout.channels}, found {wanted}"
    elif not operand.layout.mask()[wanted.array].all():
        yield (
            f"rule 6: expected only live channels of %{read.value} to be read, found {wanted} in {operand.layout.live}"
        )


def _groups(op: Op, program: Program) -> Iterator[str]:
    read = op.reads[0]
    for channels, total, what in (
        (program.values[op.result].live.live.array, program.values[op.result].live.channels, "result"),
        (read.index.array, program.values[read.value].live.channels, "operand"),
    ):
        counts = np.bincount(channels * op.groups // total, minlength=op.groups)
        if len(set(counts[counts > 0].tolist())) > 1 or (np.diff(channels * op.groups // total) < 0).any():
            yield f"rule 8: expected equal groups in order in the {what} of {op.label()}, found {counts.tolist()}"


def _param(op: Op, param: Param, program: Program) -> Iterator[str]:
    if not program.weights:
        return
    if param.name not in program.weights:
        yield f"rule 9: expected a tensor for @{param.name}, found none"
        return
    shape = program.weights[param.name].shape
    if param.out is not None and shape[param.out] != program.values[op.result].live.channels:
        yield (
            f"rule 9: expected {program.values[op.result].live.channels} entries along dimension {param.out} "
            f"of @{param.name}, found {tuple(shape)}"
        )
    if param.inn is None:
        return
    channels = program.values[op.reads[0].value].live.channels // op.groups
    if shape[param.inn] != channels:
        yield f"rule 9: expected {channels} entries along dimension {param.inn} of @{param.name}, found {tuple(shape)}"
