"""The ATen dialect: what a program's targets mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from chanopt.codegen import emitter
from chanopt.codegen.operators import real_args, resolve
from chanopt.ir import (
    Access,
    Arg,
    Kind,
    Marker,
    Op,
    Param,
    Program,
    Read,
    Window,
)

aten = torch.ops.aten
Numbers = npt.NDArray[np.float64]


class AtenDialect:
    """Programs over ATen operators.

    Attributes:
        hints: the sizes that symbolic sizes, and values that are sizes, had when the model was traced.
    """

    def __init__(self, hints: Mapping[str, int] | None = None) -> None:
        self.hints = dict(hints or {})

    def emit(self, program: Program) -> fx.GraphModule:
        """Build a GraphModule of ordinary ATen ops, with the channels cut and parameters under their names."""
        return emitter.emit(program)

    def evaluate(self, op: Op, program: Program, operands: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run one op with all logical channels.

        Args:
            op: any op but a source or a sink.
            program: the program it stands in, for its parameters.
            operands: a tensor (or a size) per value it reads.
        """
        if op.target == "alias":
            return _logical_operand(op.reads[0], program, operands)
        channels = program.values[op.result].layout

        def real(arg: Any) -> Any:
            if isinstance(arg, Read):
                return operands[arg.value]
            if isinstance(arg, Param):
                return program.weights[arg.name]
            if arg is Marker.GROUPS:
                return op.groups if op.groups > 1 else program.values[op.reads[0].value].live.channels
            if arg is Marker.CHANNELS:
                return channels.channels if channels else 0
            return arg

        args, kwargs = real_args(op, real)
        return resolve(op.target)(*args, **kwargs)

    def is_product(self, op: Op) -> bool:
        """Whether a zero in one operand makes the result zero."""
        return op.target == "aten.mul.Tensor"

    def is_neutral(self, op: Op, operand: int, values: Numbers) -> bool:
        """Whether these constants in the given operand of a binary op leave the other operand unchanged."""
        if op.target not in _NEUTRAL or (operand == 0 and op.target not in _COMMUTATIVE) or len(op.args) != 2:
            return False
        return bool((values == _NEUTRAL[op.target]).all()) and (operand == 1 or not op.kwargs)

    def zero_factors(self, op: Op, program: Program) -> npt.NDArray[np.bool_] | None:
        """Shape (channels,): result channels that a zero in a parameter makes independent of the operands."""
        made = self.affine(op, program)
        return None if made is None else made[0] == 0

    def affine(self, op: Op, program: Program) -> tuple[Numbers, Numbers] | None:
        """(scale, shift) per channel, if the op is ``x * scale + shift`` with ``x`` its first operand."""
        rule = _AFFINE.get(op.target)
        if rule is None or op.kind is not Kind.MAP or len(op.reads) != 1 or op.args[0] is not op.reads[0]:
            return None
        channels = program.values[op.result].live.channels
        operands = [_per_channel(arg, channels, program) for arg in op.args[1:]]
        made = rule(operands, dict(op.kwargs))
        return None if made is None else (np.broadcast_to(made[0], channels), np.broadcast_to(made[1], channels))

    def window(self, op: Op, program: Program) -> Window | None:
        """How a conv moves over its operand; None for another op."""
        return _window(op, program)

    def activation(self, op: Op) -> str:
        """What the kernels call this activation; "" for another op."""
        given = tuple(arg for arg in op.args if not isinstance(arg, Read))
        return "" if op.kwargs else _ACTIVATIONS.get((op.target, given), "")

    def is_sum(self, op: Op) -> bool:
        """Whether the result is the sum of two operands."""
        return op.target == "aten.add.Tensor" and len(op.args) == 2 and not op.kwargs


def _window(op: Op, program: Program) -> Window | None:
    if not op.target.startswith("aten.conv"):
        return None
    weight = op.args[1]
    kernel = tuple(program.weights[weight.name].shape[2:])
    transposed = op.target.startswith("aten.conv_transpose")
    stride, padding, dilation = op.args[3], op.args[4], _each(op.args[7 if transposed else 5], kernel)
    if padding == "same":
        extra = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        half = tuple(total // 2 for total in extra)
        return Window(kernel, _each(stride, kernel), half, dilation, any(total % 2 for total in extra))
    sides = _each(0 if padding == "valid" else padding, kernel)
    return Window(kernel, _each(stride, kernel), sides, dilation, transposed=transposed)


def _each(given: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A number for each dimension, of one for all or of one for each."""
    numbers = tuple(given) if isinstance(given, tuple) else (given,)
    return numbers * len(kernel) if len(numbers) == 1 else numbers


def _logical_operand(read: Read, program: Program, operands: Mapping[str, torch.Tensor]) -> torch.Tensor:
    operand, axis = operands[read.value], program.values[read.value].axis
    if read.access is Access.ALL or axis is None:
        return operand
    return operand.index_select(axis, torch.from_numpy(read.index.array.copy()))


Affine = Callable[[list[Any], Mapping[str, Any]], "tuple[Numbers | float, Numbers | float] | None"]


def _per_channel(arg: Arg, channels: int, program: Program) -> Any:
    """A parameter or a number as float64 per channel (or one for all); anything else as it is, unknown ones None."""
    if not isinstance(arg, Param):
        return arg
    tensor = program.weights[arg.name].detach()
    if tensor.is_complex():
        return None
    if tensor.numel() not in (1, channels) or (tensor.numel() != 1 and arg.out is None):
        return None
    return tensor.double().cpu().numpy().reshape(-1)


def _batch_norm(operands: list[Any], _: Mapping[str, Any]) -> tuple[Numbers, Numbers] | None:
    weight, bias, mean, variance, _training, _momentum, eps, *_rest = operands
    if mean is None or variance is None:
        return None
    scale = (1.0 if weight is None else weight) / np.sqrt(variance + eps)
    return scale, (0.0 if bias is None else bias) - mean * scale


def _arithmetic(make: Callable[[Any, Any], tuple[Any, Any]]) -> Affine:
    def rule(operands: list[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
        other = operands[0]
        if other is None or not isinstance(other, int | float | np.ndarray) or kwargs.get("rounding_mode"):
            return None
        return make(other, kwargs.get("alpha", 1))

    return rule


_ADD = _arithmetic(lambda other, alpha: (1.0, other * alpha))
_SUB = _arithmetic(lambda other, alpha: (1.0, -other * alpha))
_MUL = _arithmetic(lambda other, _: (other, 0.0))


def _div(operands: list[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
    zero = isinstance(operands[0], int | float | np.ndarray) and bool(np.any(np.asarray(operands[0]) == 0))
    return None if zero else _arithmetic(lambda other, _: (1.0 / other, 0.0))(operands, kwargs)


_ACTIVATIONS: dict[tuple[str, tuple[Arg, ...]], str] = {
    ("aten.relu.default", ()): "relu",
    ("aten.relu6.default", ()): "relu6",
    ("aten.hardtanh.default", (0.0, 6.0)): "relu6",
    ("aten.silu.default", ()): "silu",
    ("aten.hardswish.default", ()): "hardswish",
    ("aten.sigmoid.default", ()): "sigmoid",
}
"""By target and arguments."""
_NEUTRAL = {"aten.add.Tensor": 0.0, "aten.sub.Tensor": 0.0, "aten.mul.Tensor": 1.0, "aten.div.Tensor": 1.0}
_COMMUTATIVE = frozenset({"aten.add.Tensor", "aten.mul.Tensor"})
_AFFINE: dict[str, Affine] = {
    "aten.batch_norm.default": _batch_norm,
    "aten.add.Tensor": _ADD,
    "aten.sub.Tensor": _SUB,
    "aten.mul.Tensor": _MUL,
    "aten.div.Tensor": _div,
}
