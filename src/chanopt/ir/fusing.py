"""Which ops the kernel of a fused conv does besides: what stands right before the conv, and right after it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from chanopt.ir.index_map import IndexMap
from chanopt.ir.program import How, Kind, Op, Program, Read
from chanopt.ir.reads import Form, physical_read


@dataclass(frozen=True, slots=True)
class Beside:
    """Ops that one kernel does with a conv, ``act(conv(pre_act(x * scale + shift)) + residual)``; in execution order.

    Attributes:
        before: nothing, or what is affine in every channel, or that and an activation.
        after: nothing, a sum, an activation, or a sum and an activation.
    """

    before: tuple[Op, ...] = ()
    after: tuple[Op, ...] = ()

    @property
    def ops(self) -> tuple[Op, ...]:
        """All of them."""
        return self.before + self.after


class Fusing:
    """Finds the ops beside the convs of one program. No op stands beside two convs.

    Raises:
        IRError: the program has no dialect.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.dialect = program.known_dialect
        self.makers = {op.result: op for op in program.ops}
        self.places = {op.result: place for place, op in enumerate(program.ops)}
        self.uses = program.uses()

    def beside(self, conv: Op) -> Beside:
        """What a kernel can do with this conv: values that nobody else reads are not written."""
        return Beside(self._before(conv), self._after(conv))

    def inlined(self, conv: Op) -> Beside:
        """What of it is marked as done by the kernel (``How.INLINED``)."""
        found = self.beside(conv)
        before = found.before if all(op.how is How.INLINED for op in found.before) else ()
        return Beside(before, tuple(takewhile(lambda op: op.how is How.INLINED, found.after)))

    def gathered(self, conv: Op, before: tuple[Op, ...]) -> tuple[str, IndexMap, IndexMap]:
        """(the value that the kernel reads, its positions, the logical channels that they become), column by column."""
        physical = physical_read(conv, conv.reads[0], self.program)
        value, positions = conv.reads[0].value, physical.positions
        for op in reversed(before):
            below = physical_read(op, op.reads[0], self.program).positions
            value, positions = op.reads[0].value, below[positions]
        return value, positions, physical.channels

    def _before(self, conv: Op) -> tuple[Op, ...]:
        last = self._made_for(conv)
        if last is None:
            return ()
        if self._is_affine(last):
            return (last,)
        first = self._made_for(last) if self._activates(last) else None
        return (first, last) if first is not None and self._is_affine(first) else ()

    def _made_for(self, reader: Op) -> Op | None:
        """What makes the first operand of an op, if that is for this op alone."""
        value = reader.reads[0].value
        return self.makers[value] if len(self.uses[value]) == 1 else None

    def _after(self, conv: Op) -> tuple[Op, ...]:
        found: list[Op] = []
        value = conv.result
        op = self._only_reader(value)
        if op is not None and self._adds(op, conv):
            found.append(op)
            value = op.result
            op = self._only_reader(value)
        if op is not None and self._activates(op) and self._is_whole(op, op.reads[0]):
            found.append(op)
        return tuple(found)

    def _only_reader(self, value: str) -> Op | None:
        users = self.uses[value]
        return users[0][0] if len(users) == 1 else None

    def _adds(self, op: Op, conv: Op) -> bool:
        """Whether an op adds to a conv what is there before it: of two convs in a sum, the later has the sum.

        Sizes that are alike in the example are alike for other images too, but for those of 1: these may broadcast.
        """
        if not self.dialect.is_sum(op) or len(op.reads) != 2 or 1 in self.program.values[op.result].shape[2:]:
            return False
        made, values = self.program.values[op.result], [self.program.values[read.value] for read in op.reads]
        alike = all((value.shape, value.dtype, value.axis) == (made.shape, made.dtype, made.axis) for value in values)
        earlier = all(self.places[value.name] <= self.places[conv.result] for value in values)
        return alike and earlier and all(self._is_whole(op, read) for read in op.reads)

    def _activates(self, op: Op) -> bool:
        return bool(self.dialect.activation(op)) and self._is_straight(op)

    def _is_affine(self, op: Op) -> bool:
        made = self.dialect.affine(op, self.program) if self._is_straight(op) else None
        return made is not None and all(np.isfinite(numbers).all() for numbers in made)

    def _is_straight(self, op: Op) -> bool:
        """Whether channel i of an image comes from channel i of one like it."""
        if op.kind is not Kind.MAP or len(op.reads) != 1 or op.block > 1:
            return False
        made, read = self.program.values[op.result], self.program.values[op.reads[0].value]
        alike = (made.shape, made.dtype, made.axis) == (read.shape, read.dtype, read.axis)
        return alike and len(made.shape) == 4 and made.axis == 1 and op.reads[0].index.is_identity(read.live.channels)

    def _is_whole(self, op: Op, read: Read) -> bool:
        return physical_read(op, read, self.program).form is Form.WHOLE
