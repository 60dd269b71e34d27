"""Tables about a network: how sparse its weights are, and what its layers cost, as Distiller counts both.

A layer's multiply-accumulates are ``volume(output) * input channels / groups * kernel``, those of a linear layer the
entries of its weight; biases are not counted. The weights of a network are its parameters of two and four dimensions.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chanopt.errors import ScheduleError
from chanopt.pruning.distiller.groups import magnitudes
from chanopt.pruning.distiller.scheduler import CompressionScheduler
from chanopt.pruning.modes import in_eval

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class WeightSparsity:
    """How sparse one weight is; sparsities in percent of the structures, 0 where there are none of a kind.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        entries: how many there are.
        nonzero: how many are not zero.
        cols: input columns of a linear layer that are zero.
        rows: output rows of a linear layer that are zero.
        channels: input channels of a conv.
        kernels: kernels of a conv (rows of a linear layer).
        filters: filters of a conv.
        fine: entries.
        std: standard deviation.
        mean: mean.
        abs_mean: mean absolute value.
    """

    name: str
    shape: tuple[int, ...]
    entries: int
    nonzero: int
    cols: float
    rows: float
    channels: float
    kernels: float
    filters: float
    fine: float
    std: float
    mean: float
    abs_mean: float


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one layer costs, for the inputs given.

    Attributes:
        name: of the module.
        kind: its class.
        kernel: kernel sizes.
        inputs: shape of its input.
        outputs: shape of its output.
        weights: entries of its weight.
        macs: multiply-accumulates.
    """

    name: str
    kind: str
    kernel: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weights: int
    macs: int


def weights_sparsity(model: nn.Module, dims: Sequence[int] = (2, 4)) -> list[WeightSparsity]:
    """A row for every weight and bias of so many dimensions."""
    return [
        _sparsity(name, tensor.detach())
        for name, tensor in model.named_parameters()
        if tensor.dim() in dims and ("weight" in name or "bias" in name)
    ]


def masks_sparsity(scheduler: CompressionScheduler, dims: Sequence[int] = (2, 4)) -> dict[str, float]:
    """By parameter name, the percentage of entries that its mask drops."""
    return {
        name: 0.0 if scheduler.masks[name].mask is None else 100.0 * _zero_part(scheduler.masks[name].mask)
        for name, parameter in scheduler.parameters.items()
        if parameter.dim() in dims
    }


def total_weights(model: nn.Module) -> tuple[int, int]:
    """(entries, entries that are not zero) of all weights."""
    rows = weights_sparsity(model)
    return sum(row.entries for row in rows), sum(row.nonzero for row in rows)


def _zero_part(mask: Tensor | None) -> float:
    assert mask is not None
    return float((mask == 0).double().mean())


def _sparsity(name: str, weight: Tensor) -> WeightSparsity:
    matrix, conv = weight.dim() == 2, weight.dim() == 4
    nonzero = int(torch.count_nonzero(weight))
    return WeightSparsity(
        name,
        tuple(weight.shape),
        weight.numel(),
        nonzero,
        _zero_structures(weight, "Cols") if matrix else 0.0,
        _zero_structures(weight, "Rows") if matrix else 0.0,
        _zero_structures(weight, "Channels") if conv else 0.0,
        _zero_structures(weight, "2D" if conv else "Rows") if conv or matrix else 0.0,
        _zero_structures(weight, "Filters") if conv else 0.0,
        100.0 * (1 - nonzero / weight.numel()),
        float(weight.std()),
        float(weight.mean()),
        float(weight.abs().mean()),
    )


def _zero_structures(weight: Tensor, group: str) -> float:
    return 100.0 * float((magnitudes(weight, group, "Max") == 0).double().mean())


def layer_costs(model: nn.Module, inputs: tuple[Any, ...]) -> list[LayerCost]:
    """A row for every conv and linear layer that runs, in order; a layer that runs twice has one row."""
    rows: dict[str, LayerCost] = {}
    handles = [
        module.register_forward_hook(partial(_note, rows, name))
        for name, module in model.named_modules()
        if isinstance(module, (*_CONVS, nn.Linear))
    ]
    try:
        with in_eval(model), torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(rows.values())


def _note(rows: dict[str, LayerCost], name: str, module: nn.Module, args: Any, output: Any) -> None:
    rows.setdefault(name, _cost(name, module, tuple(args[0].shape), tuple(output.shape)))


def _cost(name: str, module: nn.Module, operand: tuple[int, ...], output: tuple[int, ...]) -> LayerCost:
    weight = module.get_parameter("weight")
    kernel = tuple(weight.shape[2:])
    macs = weight.numel() if isinstance(module, nn.Linear) else prod(output) * prod(weight.shape[1:])
    return LayerCost(name, type(module).__name__, kernel, operand, output, weight.numel(), macs)


def total_macs(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Multiply-accumulates of all convs and linear layers, for the inputs given."""
    return sum(row.macs for row in layer_costs(model, inputs))


# -- text -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[WeightSparsity | LayerCost]) -> str:
    """Rows as a text table.

    Raises:
        ScheduleError: there are none.
    """
    if not rows:
        raise ScheduleError("expected rows to print, found none: the model has no conv or linear layer")
    heads = [item.name for item in fields(rows[0])]
    lines = [heads, *([_cell(value) for value in astuple(row)] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "-"
    return f"{value:.5f}" if isinstance(value, float) else str(value)


def write_csv(rows: Iterable[WeightSparsity | LayerCost | Mapping[str, Any]], path: str | Path) -> None:
    """Write rows as CSV, with a header."""
    data = [dict(row) if isinstance(row, Mapping) else asdict(row) for row in rows]
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(data[0]) if data else [])
        writer.writeheader()
        writer.writerows(data)
