"""What the weights of linear ops say: which entries are zero, and their sums over the kernel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from chanopt.ir import Op, Param, Program

_USED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def weight_param(op: Op) -> Param:
    """The weight of a linear op (``args[1]``)."""
    weight = op.args[1]
    assert isinstance(weight, Param)  # the definition of ``Op.linear``
    return weight


def bias_values(op: Op, program: Program) -> npt.NDArray[np.float64]:
    """Shape (logical result channels,): the bias of a linear op, zeros where it has none."""
    channels = program.values[op.result].live.channels
    if not isinstance(op.args[2], Param):
        return np.zeros(channels)
    return program.weights[op.args[2].name].detach().double().cpu().numpy()


def matrix(op: Op, program: Program) -> torch.Tensor:
    """The weight as (result channels, operand channels per group, kernel); kernel flattened, a view."""
    param = weight_param(op)
    tensor = program.weights[param.name].detach()
    assert param.out is not None
    if param.inn is None:
        return tensor.movedim(param.out, 0).reshape(tensor.shape[param.out], 1, -1)
    tensor = tensor.movedim((param.out, param.inn), (0, 1))
    return tensor.reshape(tensor.shape[0], tensor.shape[1], -1)


def used(op: Op, program: Program) -> npt.NDArray[np.bool_]:
    """Shape (result channels, operand channels per group): whether any entry of the kernel is not zero."""
    param = weight_param(op)
    tensor = program.weights[param.name]
    known: dict[tuple[int | None, int | None], npt.NDArray[np.bool_]] | None = _USED.get(tensor)
    if known is None:
        known = _USED[tensor] = {}
    key = (param.out, param.inn)
    if key not in known:
        known[key] = (matrix(op, program) != 0).any(2).cpu().numpy()
    return known[key]


def kernel_sums(op: Op, program: Program) -> npt.NDArray[np.float64]:
    """Shape (result channels, operand channels per group): the sum of the weight over the kernel."""
    return matrix(op, program).double().sum(2).cpu().numpy()
