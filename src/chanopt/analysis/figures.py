"""Counting: reads, copies, bytes, multiplications and parameters of a program, from the program alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chanopt.analysis.weights import weight_param
from chanopt.ir import Form, Kind, Op, Param, Program, physical_read, physical_reads


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a program, for one inference of the example inputs.

    Attributes:
        slices: reads of a proper range (views).
        gathers: ops with a read that is not one range.
        copies: reads that materialise memory.
        gathered_channels: channels in those.
        copied_bytes: bytes in those.
        macs: multiply-accumulates of linear ops (convolutions and linear layers; borders counted as full).
        parameters: entries of all parameters that are used (buffers not counted).
        channels: live channels over all values.
    """

    slices: int
    gathers: int
    copies: int
    gathered_channels: int
    copied_bytes: int
    macs: int
    parameters: int
    channels: int


def figures(program: Program) -> Figures:
    """Count a program."""
    slices = gathers = 0
    copies: dict[tuple[str, object], int] = {}
    sizes: dict[tuple[str, object], int] = {}
    for op in program.ops:
        forms = physical_reads(op, program)
        slices += sum(physical.form is Form.RANGE for _, physical in forms)
        gathers += any(physical.form is Form.GATHER for _, physical in forms)
        for read, physical in forms:
            if physical.form is Form.GATHER and len(physical.positions):
                key = (
                    read.value,
                    physical.positions,
                )  # one gather of the same channels serves all its readers
                copies[key] = len(physical.positions)
                sizes[key] = len(physical.positions) * program.values[read.value].channel_bytes
    return Figures(
        slices,
        gathers,
        len(copies),
        sum(copies.values()),
        sum(sizes.values()),
        sum(macs(op, program) for op in program.ops if op.linear),
        parameters(program),
        sum(len(value.layout) for value in program.values.values() if value.layout is not None),
    )


def macs(op: Op, program: Program) -> int:
    """Multiply-accumulates of a linear op."""
    result, read = program.values[op.result], op.reads[0]
    weight = weight_param(op)
    shape = program.weights[weight.name].shape
    kernel = int(np.prod([size for axis, size in enumerate(shape) if axis not in (weight.out, weight.inn)]))
    itemsize = max(1, program.weights[weight.name].element_size())
    pixels = result.channel_bytes // itemsize
    if op.target.startswith("aten.conv_transpose"):
        operand = program.values[read.value]
        pixels = operand.channel_bytes // itemsize
    columns = len(physical_read(op, read, program).channels) // _groups(op, program) if weight.inn is not None else 1
    kernel = kernel if weight.inn is not None else int(np.prod(shape)) // shape[weight.out or 0]
    return len(result.live) * columns * kernel * pixels


def _groups(op: Op, program: Program) -> int:
    if op.kind is not Kind.GROUPED:
        return 1
    live = program.values[op.result].live
    return max(1, len(np.unique(live.live.array * op.groups // live.channels)))


def parameters(program: Program) -> int:
    """Entries of the parameters after cutting; a parameter cut alike for several ops counts once."""
    sizes: dict[tuple[object, ...], int] = {}
    for op in program.ops:
        for param in op.params:
            key, size = _cut_size(op, param, program)
            if not param.buffer:
                sizes[key] = size
    return sum(sizes.values())


def _cut_size(op: Op, param: Param, program: Program) -> tuple[tuple[object, ...], int]:
    shape = list(program.weights[param.name].shape)
    rows = columns = None
    if param.out is not None:
        rows = program.values[op.result].live.live
        shape[param.out] = len(rows)
    if param.inn is not None:
        columns = physical_read(op, op.reads[0], program).channels
        shape[param.inn] = len(columns) // _groups(op, program)
    return (param.name, param.out, param.inn, rows, columns), int(np.prod(shape, dtype=np.int64))
