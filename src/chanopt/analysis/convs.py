"""The shape of a two-dimensional conv, in numbers."""

from __future__ import annotations

from typing import Any

from chanopt.analysis.weights import weight_param
from chanopt.ir import Op, Program

Pair = tuple[int, int]

_POSITIONS = {"stride": (3, 1), "padding": (4, 0), "dilation": (5, 1)}
"""Of ``aten.conv2d.default(input, weight, bias, stride, padding, dilation, groups)``: where, and the default."""


def geometry(op: Op, program: Program) -> tuple[Pair, Pair, Pair, Pair, Pair] | None:
    """(kernel, stride, padding, dilation, size of the operand) of a conv on images; None for another op.

    Sizes that are left open count as they were when the model was traced.
    """
    operand = program.values[op.reads[0].value]
    if op.target != "aten.conv2d.default" or len(operand.shape) != 4 or operand.axis != 1:
        return None
    hints = program.dialect.hints if program.dialect is not None else {}
    sizes = [hints.get(size) if isinstance(size, str) else size for size in operand.shape[2:]]
    named: dict[str, Any] = dict(op.kwargs)
    given = {
        name: op.args[place] if place < len(op.args) else named.get(name, default)
        for name, (place, default) in _POSITIONS.items()
    }
    numbers = [_pair(given[name]) for name in _POSITIONS]
    if None in sizes or None in numbers:
        return None
    height, width = program.weights[weight_param(op).name].shape[2:]
    return (height, width), *numbers, (sizes[0], sizes[1])  # type: ignore[return-value]


def _pair(value: Any) -> Pair | None:
    """(height, width) of one or two integers, as ATen takes them; None if they are not numbers."""
    items = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(item, int) for item in items) or len(items) not in (1, 2):
        return None
    return items[0], items[-1]
