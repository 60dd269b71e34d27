"""Which convs have several ways to come by their channels (chanopt.target)."""

from __future__ import annotations

from chanopt.ir import Access, Kind, Op, Program, Window


def image_conv(op: Op, program: Program) -> Window | None:
    """The window of a conv that reads a set of an image's channels, in one group; None for another op."""
    if op.kind is not Kind.MIX or not op.linear or op.reads[0].access is not Access.SET:
        return None
    operand = program.values[op.reads[0].value]
    window = program.dialect.window(op, program) if program.dialect is not None and program.weights else None
    if window is None or window.lopsided or window.transposed or len(operand.shape) != 4 or operand.axis != 1:
        return None
    return window
