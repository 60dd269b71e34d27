"""Constants: which channels have one value everywhere, whatever the input (forwards).

A channel whose producer has a zero row is its bias at every pixel, and stays a constant through batch norm,
activations, pools and joins of constants. No rule per operator is needed: a map is run on constant planes, and what
comes out uniform is constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from chanopt.analysis.weights import bias_values, kernel_sums, used
from chanopt.errors import IRError
from chanopt.ir import Access, Kind, Op, Program, Read

_Known = TypeVar("_Known", np.bool_, np.float64)
Values = npt.NDArray[np.float64]
"""Shape (logical channels,): the constant, or NaN where the channel is not one."""


def constants(program: Program) -> Mapping[str, Values]:
    """The constant of every channel of every value that has channels."""
    return _Forwards(program).run()


class _Forwards:
    def __init__(self, program: Program) -> None:
        if program.dialect is None:
            raise IRError("expected a program with a dialect, found one parsed from text alone; see Program.bind")
        self.program, self.dialect = program, program.dialect
        self.known: dict[str, Values] = {}

    def run(self) -> Mapping[str, Values]:
        for op in self.program.ops:
            if op.kind is not Kind.SINK and self.program.values[op.result].layout is not None:
                self.known[op.result] = self._op(op)
        return self.known

    def _op(self, op: Op) -> Values:
        nothing = np.full(self.program.values[op.result].live.channels, np.nan)
        if op.kind in (Kind.SOURCE, Kind.BARRIER, Kind.STATISTIC):
            return nothing
        if op.linear:
            return self._linear(op)
        if op.kind is Kind.CONCAT or op.target == "alias":
            return self._moved(op, nothing)
        return self._flowing(op, nothing)

    def _linear(self, op: Op) -> Values:
        operand = self.known[op.reads[0].value]
        table = used(op, self.program)
        unknown = np.isnan(operand) | ((operand != 0) if op.border else False)
        rows = ~(table & _by_column(op, unknown, table.shape)).any(1)
        result = np.full(len(table), np.nan)
        if not rows.any():
            return result
        result[rows] = bias_values(op, self.program)[rows]
        if not op.border and table[rows].any():
            sums = kernel_sums(op, self.program)[rows]
            factors = np.broadcast_to(_by_column(op, np.nan_to_num(operand), table.shape), table.shape)
            result[rows] += (factors[rows] * sums).sum(1)
        return result

    def _moved(self, op: Op, result: Values) -> Values:
        for read in op.reads:
            here = read.index.array >= 0
            result[here] = self.known[read.value][read.index.array[here]]
        return result

    def _flowing(self, op: Op, result: Values) -> Values:
        """Maps, joins and reindexings: run them on planes of constants and keep what comes out uniform."""
        flows = [read for read in op.reads if read.access is Access.FLOW]
        candidates = np.ones(len(result), np.bool_)
        for read in flows:
            candidates &= ~np.isnan(_behind(self.known[read.value], read)).any(1)
        if op.border:  # an average over a padded window is uniform only where there is nothing to average
            candidates &= np.all([(_behind(self.known[read.value], read) == 0).all(1) for read in flows], axis=0)
        others = [read for read in op.reads if read.access is not Access.FLOW]
        if any(self.program.values[read.value].dtype != "int" for read in others):
            candidates[:] = False  # another operand, of unknown value, takes part (a size does not)
        candidates |= self._absorbed(op, flows)
        if candidates.any():
            flat, eps = self._run(op, len(result), smaller=False)
            keep = candidates & _uniform(flat, eps)
            if keep.any():
                keep &= self._sizeless(op, flat, eps)
            result[keep] = flat[keep, 0]
        return result

    def _run(self, op: Op, channels: int, *, smaller: bool) -> tuple[Values, float]:
        """Shape (channels, the rest): the op's result on planes of constants, and the rounding of its type."""
        planes = {read.value: self._plane(read, smaller=smaller) for read in op.reads}
        made = self.dialect.evaluate(op, self.program, planes)
        axis = self.program.values[op.result].axis
        assert axis is not None
        flat = made.movedim(axis, 0).reshape(channels, -1).double().cpu().numpy()
        return flat, torch.finfo(made.dtype).eps if made.is_floating_point() else 0.0

    def _sizeless(self, op: Op, flat: Values, eps: float) -> npt.NDArray[np.bool_]:
        """Which channels have the same constant in a batch and an image of half the size: a sum over pixels has not.

        An op that cannot run at other sizes has its sizes written into it, and is never called at others.
        """
        try:
            other, _ = self._run(op, len(flat), smaller=True)
        except (RuntimeError, ValueError, IndexError):
            return np.ones(len(flat), np.bool_)
        if not other.size:
            return np.ones(len(flat), np.bool_)
        return _uniform(np.stack([flat[:, 0], other[:, 0]], axis=1), eps) & _uniform(other, eps)

    def _absorbed(self, op: Op, flows: list[Read]) -> npt.NDArray[np.bool_]:
        """Result channels that are constant because a factor is zero: of an operand, or of a parameter."""
        size = self.program.values[op.result].live.channels
        mask = np.zeros(size, np.bool_)
        params = self.dialect.zero_factors(op, self.program)
        if params is not None:
            mask |= params
        if self.dialect.is_product(op):
            for read in flows:
                mask |= (_behind(self.known[read.value], read) == 0).all(1)
        return mask

    def _plane(self, read: Read, *, smaller: bool) -> torch.Tensor:
        """The operand with its constants at every pixel, and ones in the channels that are not constant."""
        value = self.program.values[read.value]
        if value.dtype == "int":
            hint = self.dialect.hints[value.name]
            return torch.tensor(max(1, hint // 2) if smaller else hint)
        sizes = list(self.program.traced(value.name))
        if smaller:
            sizes = [size if axis == value.axis else max(1, size // 2) for axis, size in enumerate(sizes)]
        dtype = getattr(torch, value.dtype)
        if value.layout is None or value.axis is None:
            return torch.ones(sizes, dtype=dtype)
        filled = np.nan_to_num(self.known[read.value], nan=1.0)
        shape = [1] * len(sizes)
        shape[value.axis] = -1
        return torch.from_numpy(filled).to(dtype).reshape(shape).expand(sizes).contiguous()


def _behind(known: Values, read: Read) -> Values:
    """Shape (result channels, fan): the constants of the operand channels behind each result channel."""
    index = read.index.array
    return np.where(index >= 0, known[index], np.nan).reshape(-1, read.fan)


def _by_column(op: Op, channels: npt.NDArray[_Known], shape: tuple[int, ...]) -> npt.NDArray[_Known]:
    """What is known of the operand's channels for each weight column.

    Returns:
        Shape (result channels, operand channels per group), or one that broadcasts to it.
    """
    rows, width = shape
    if op.kind is Kind.MAP:
        return channels[op.reads[0].index.array].reshape(rows, 1)
    by_group = channels.reshape(op.groups, width)
    return by_group if op.groups == 1 else np.repeat(by_group, rows // op.groups, axis=0)


def _uniform(flat: Values, eps: float) -> npt.NDArray[np.bool_]:
    least, most = flat.min(1), flat.max(1)
    with np.errstate(invalid="ignore"):  # of infinite ones, which are no constants
        return np.isfinite(least) & (most - least <= 16 * eps * np.abs(most))
