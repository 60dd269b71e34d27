"""Run pools over a channels-last copy where that is faster than pooling channel by channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from chanopt.ir import Kind, Op, Program, Read, Value
from chanopt.pass_infra import Pass

_FASTER = {
    "aten.max_pool2d.default": frozenset({"float32", "float64"}),
    "aten.avg_pool2d.default": frozenset({"float32"}),
}
"""Pools, and the element types in which the copies pay (benchmarks/pools.py measures both)."""


@dataclass(frozen=True)
class PoolChannelsLast(Pass):
    """On a CPU, pool in channels-last order: eager PyTorch vectorises a pool over channels there, and not over pixels.

    Cases:
        1. a max or average pool over the last two axes of a contiguous tensor with at least ``least_channels`` live
           channels gets a channels-last copy before it and a contiguous one after it.

    Other devices, programs that are channels last already, and Inductor, which makes pools of its own, are left alone.

    Before and after::

        %p = map max_pool2d(%x, ...)        %a = map clone(%x, memory_format=torch.channels_last)
                                            %b = map max_pool2d(%a, ...)
                                            %p = map clone(%b, memory_format=torch.contiguous_format)

    Attributes:
        least_channels: fewer live channels than this are not worth two copies.
    """

    least_channels: int = 16

    name: ClassVar[str] = "pool_channels_last"

    def apply(self, program: Program) -> Program:
        """Wrap every such pool."""
        if program.target != "cpu" or program.channels_last:
            return program
        values: dict[str, Value] = {}
        ops = [new for op in program.ops for new in self._wrapped(op, program, values)]
        return program.evolve(ops=ops, values=values) if values else program

    def _wrapped(self, op: Op, program: Program, values: dict[str, Value]) -> Iterator[Op]:
        if not self._pays(op, program):
            yield op
            return
        read, result = op.reads[0], program.values[op.result]
        operand = program.values[read.value]
        before = replace(operand, name=f"{op.result}_in", layout=result.layout)
        pooled = replace(result, name=f"{op.result}_out")
        values |= {before.name: before, pooled.name: pooled}
        yield _clone(op, read, before.name, torch.channels_last)
        yield replace(op.map_args(lambda arg: _plain(read, before.name) if arg is read else arg), result=pooled.name)
        yield _clone(op, _plain(read, pooled.name), op.result, torch.contiguous_format)

    def _pays(self, op: Op, program: Program) -> bool:
        if op.kind is not Kind.MAP or op.target not in _FASTER:
            return False
        result, operand = program.values[op.result], program.values[op.reads[0].value]
        last = program.producer(operand.name).kwargs == (("memory_format", torch.channels_last),)
        plain = op.reads[0].index.is_identity(result.live.channels) and len(result.shape) == 4
        return plain and not last and result.dtype in _FASTER[op.target] and len(result.live) >= self.least_channels


def _plain(read: Read, value: str) -> Read:
    return replace(read, value=value)


def _clone(op: Op, read: Read, result: str, memory_format: torch.memory_format) -> Op:
    kwargs = (("memory_format", memory_format),)
    return Op(Kind.MAP, "aten.clone.default", (read,), kwargs, result, layer=op.layer, source=op.source)
