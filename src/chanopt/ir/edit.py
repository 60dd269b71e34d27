"""Editing a program's parameters without touching what another op uses."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from chanopt.ir.program import Op, Param, Program


class WeightEdits:
    """New tensors for the parameters of ops, gathered while a pass walks a program.

    A parameter used by one op keeps its name. One that several ops use gets a new name for the op that changes it.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.tensors: dict[str, torch.Tensor] = dict(program.weights)
        self._users = Counter(param.name for op in program.ops for param in op.params)

    def set_weight(self, op: Op, tensor: torch.Tensor) -> Op:
        """Give a linear op another weight, of the same shape."""
        param = op.args[1]
        assert isinstance(param, Param)  # the definition of ``Op.linear``
        return self._with(op, 1, replace(param, name=self._store(param.name, tensor)))

    def set_bias(self, op: Op, values: npt.NDArray[np.float64]) -> Op:
        """Give a linear op another bias, shape (logical result channels,); one that had none gets one."""
        weight, bias = op.args[1], op.args[2]
        assert isinstance(weight, Param)
        like = self.tensors[weight.name]
        tensor = torch.tensor(values).to(like.dtype).to(like.device)
        if isinstance(bias, Param):
            return self._with(op, 2, replace(bias, name=self._store(bias.name, tensor)))
        stem = weight.name.removesuffix("weight")
        name = f"{stem}bias" if stem != weight.name else f"{weight.name}_bias"
        return self._with(op, 2, Param(self.add(name, as_trained(tensor, like)), out=0))

    def add(self, name: str, tensor: torch.Tensor) -> str:
        """A new parameter; returns its name, with a number added if that is taken."""
        count, unique = 1, name
        while unique in self.tensors:
            count, unique = count + 1, f"{name}_{count}"
        self.tensors[unique] = tensor
        self._users[unique] += 1
        return unique

    def _store(self, name: str, tensor: torch.Tensor) -> str:
        if self._users[name] > 1:
            self._users[name] -= 1
            return self.add(name, as_trained(tensor, self.tensors[name]))
        self.tensors[name] = as_trained(tensor, self.tensors[name])
        return name

    @staticmethod
    def _with(op: Op, position: int, arg: Param) -> Op:
        return replace(op, args=(*op.args[:position], arg, *op.args[position + 1 :]))


def is_frozen(tensor: torch.Tensor | None) -> bool:
    """Whether a tensor is a parameter that the user has taken out of training."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def as_trained(tensor: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """A tensor that takes the place of another: frozen, if that was."""
    return nn.Parameter(tensor, requires_grad=False) if is_frozen(old) else tensor
