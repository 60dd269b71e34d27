"""Fold batch norm and other per-channel affine maps into the linear op before them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from chanopt.analysis.weights import bias_values, weight_param
from chanopt.ir import Access, Kind, Op, Program
from chanopt.ir.edit import WeightEdits
from chanopt.pass_infra import Pass, Property


def foldable(program: Program) -> dict[str, Op]:
    """Affine maps by the result of the linear op that can take them over, which nobody else reads."""
    uses = program.uses()
    makers = {op.result: op for op in program.ops if op.linear}
    found: dict[str, Op] = {}
    for op in program.ops:
        read = op.reads[0] if op.kind is Kind.MAP and len(op.reads) == 1 else None
        if read is None or read.value not in makers or len(uses[read.value]) != 1 or read.access is not Access.FLOW:
            continue
        operand, result = program.values[read.value], program.values[op.result]
        in_place = operand.shape == result.shape and operand.layout == result.layout and operand.axis == result.axis
        straight = read.index.is_identity(result.live.channels)
        if in_place and straight and operand.dtype == result.dtype and _affine(op, program) is not None:
            found[read.value] = op
    return found


def _affine(op: Op, program: Program) -> tuple[np.ndarray, np.ndarray] | None:
    made = program.dialect.affine(op, program) if program.dialect is not None else None
    return made if made is not None and all(np.isfinite(part).all() for part in made) else None


def _still_foldable(program: Program) -> str | None:
    left = foldable(program)
    return f"{next(iter(left.values())).label()} that still is" if left else None


AFFINE_FOLDED = Property("no affine map is left that its producer could take over", _still_foldable, "FoldAffine")


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Scale and shift weights instead of activations, where that is exact.

    Cases:
        1. batch norm after a conv, transposed conv, linear or depthwise conv that nobody else reads;
        2. multiplication, division, addition or subtraction of a number or a per-channel parameter, likewise.

    A batch norm that follows anything else (a concat, an activation, an input) stays, and is cut with its channels.

    Before and after::

        %a = mix conv(%x, @w, none)              %b = mix conv(%x, @w * s, @w_bias)
        %b = map batch_norm(%a, ...)             (nothing)
    """

    name: ClassVar[str] = "fold_affine"
    ensures: ClassVar[tuple[Property, ...]] = (AFFINE_FOLDED,)

    def apply(self, program: Program) -> Program:
        """Fold until nothing is left to fold."""
        while folds := foldable(program):
            program = _fold(program, folds)
        return program


def _fold(program: Program, folds: dict[str, Op]) -> Program:
    edits = WeightEdits(program)
    gone = {op.result: operand for operand, op in folds.items()}
    ops: list[Op] = []
    for op in program.ops:
        if op.result in gone:
            continue
        if op.result in folds:
            op = _scaled(op, folds[op.result], program, edits)
        ops.append(op)
    return program.evolve(ops=ops, weights=edits.tensors)


def _scaled(op: Op, affine: Op, program: Program, edits: WeightEdits) -> Op:
    """The linear op with the map's scale and shift taken in, making the map's result."""
    made = _affine(affine, program)
    assert made is not None  # ``foldable`` asked
    scale, shift = made
    param = weight_param(op)
    assert param.out is not None
    weight = edits.tensors[param.name].detach()
    sizes = [1] * weight.ndim
    sizes[param.out] = -1
    factor = torch.tensor(scale).to(weight.device).reshape(sizes)
    bias = bias_values(op, program) * scale + shift
    op = edits.set_weight(op, (weight.double() * factor).to(weight.dtype))
    op = edits.set_bias(op, bias)
    return replace(op, result=affine.result)
