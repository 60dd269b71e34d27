"""Masks given by name: which channels of a layer are kept."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from chanopt.analysis.weights import weight_param
from chanopt.errors import MaskError
from chanopt.ir import Kind, Op, Param, Program
from chanopt.ir.edit import as_trained


@dataclass(frozen=True)
class Mask:
    """Which channels of one layer are kept.

    The masked layer computes with zero weights for the input channels that are not kept, and gives zero in the output
    channels that are not kept.

    Attributes:
        inputs: kept input channels, or None for all.
        outputs: kept output channels, or None for all.
    """

    inputs: Collection[int] | None = None
    outputs: Collection[int] | None = None


def apply_masks(program: Program, masks: Any, modules: Iterable[str]) -> Program:
    """The program of the masked model.

    Args:
        program: as lowered.
        masks: by module name.
        modules: all module names of the model, for messages.

    Raises:
        MaskError: no such module, a module that is neither conv nor linear, or a channel out of range.
    """
    named = isinstance(masks, Mapping) and all(isinstance(name, str) for name in masks)
    if not named or not all(isinstance(mask, Mask) for mask in masks.values()):
        raise MaskError("expected masks as {module name: chanopt.Mask(inputs=..., outputs=...)}, found something else")
    layers: dict[str, list[Op]] = {}
    for op in program.ops:
        if op.linear:
            layers.setdefault(op.layer, []).append(op)
    weights = dict(program.weights)
    for name, mask in masks.items():
        if name not in layers:
            raise MaskError(_unknown(name, set(modules), set(layers)))
        if len({weight_param(op).name for op in layers[name]}) > 1:
            raise MaskError(
                f"expected a module with one weight for a mask, found that {name!r} has several; zero them by hand"
            )
        for op in layers[name][:1]:  # a module that is used twice has one weight
            _zero(op, program, mask, weights)
    return program.evolve(weights=weights)


def _unknown(name: str, modules: set[str], layers: set[str]) -> str:
    if name in modules:
        return f"expected a conv or linear layer for a mask, found {name!r}, which is neither or is not used in forward"
    near = difflib.get_close_matches(name, sorted(layers), n=3, cutoff=0.3) or sorted(layers)[:3]
    return f"expected the name of a layer for a mask, found {name!r}; nearest names: {', '.join(map(repr, near))}"


def _zero(op: Op, program: Program, mask: Mask, weights: dict[str, torch.Tensor]) -> None:
    param = weight_param(op)
    assert param.out is not None
    result = program.values[op.result].live.channels
    operand = program.values[op.reads[0].value].live.channels
    tensor = weights[param.name].detach().clone(memory_format=torch.preserve_format)
    if mask.outputs is not None:
        dead = _dropped(mask.outputs, result, f"output channels of {op.layer}")
        tensor.index_fill_(param.out, dead, 0)
        if isinstance(op.args[2], Param):
            bias = weights[op.args[2].name]
            weights[op.args[2].name] = as_trained(bias.detach().clone().index_fill_(0, dead, 0), bias)
    if mask.inputs is not None:
        _zero_inputs(op, param, tensor, _dropped(mask.inputs, operand, f"input channels of {op.layer}"))
    weights[param.name] = as_trained(tensor, weights[param.name])


def _zero_inputs(op: Op, param: Param, tensor: torch.Tensor, dead: torch.Tensor) -> None:
    assert param.out is not None
    if op.kind is Kind.MAP:  # depthwise: row o reads input index[o]
        rows = torch.isin(torch.from_numpy(op.reads[0].index.array.copy()), dead).nonzero().reshape(-1)
        tensor.index_fill_(param.out, rows, 0)
        return
    assert param.inn is not None
    width, height = tensor.shape[param.inn], tensor.shape[param.out] // op.groups
    for group in range(op.groups):
        columns = dead[(dead >= group * width) & (dead < (group + 1) * width)] - group * width
        tensor.narrow(param.out, group * height, height).index_fill_(param.inn, columns, 0)


def _dropped(kept: Collection[int], channels: int, what: str) -> torch.Tensor:
    keep = _indices(kept, what)
    wrong = sorted(c for c in keep if not 0 <= c < channels)
    if wrong:
        raise MaskError(f"expected kept {what} within 0..{channels - 1}, found {wrong[:8]}")
    return torch.tensor([c for c in range(channels) if c not in keep], dtype=torch.int64)


def _indices(kept: Collection[int], what: str) -> set[int]:
    """Channel numbers as integers; a mask of booleans is not a list of numbers."""
    try:
        given = kept.tolist() if isinstance(kept, torch.Tensor) else list(kept)
        if any(isinstance(channel, bool) for channel in given):
            raise TypeError("booleans")
        return {operator.index(channel) for channel in given}
    except TypeError as error:
        raise MaskError(
            f"expected kept {what} as channel numbers, found {type(kept).__name__} of {error}; "
            "of a boolean mask give mask.nonzero().flatten()"
        ) from error
