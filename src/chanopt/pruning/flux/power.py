"""The tutorial's models of power and area on bitstream hardware: dot products, and generators of the weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from chanopt.pruning.flux.counting import Dots, dots

__all__ = ["area_consumption", "dp_area", "dp_power", "lfsr_area", "lfsr_power", "power_consumption"]


def dp_power(count: float) -> float:
    """Power of a dot product of so many nonzero weights."""
    return 0.2624 * count + 1.5944


def dp_area(count: float) -> float:
    """Area of a dot product of so many nonzero weights."""
    return 14.717 * count + 56.324


def lfsr_power(count: float) -> float:
    """Power of so many generators."""
    return 10.89 * count


def lfsr_area(count: float) -> float:
    """Area of so many generators."""
    return 354.31 * count


def power_consumption(model: nn.Module, size: tuple[int, ...], *, exact: bool = False) -> float:
    """Power of a model; see :func:`area_consumption`."""
    return _consumption(model, size, dp_power, lfsr_power, exact)


def area_consumption(model: nn.Module, size: tuple[int, ...], *, exact: bool = False) -> float:
    """Area of a model.

    Args:
        model: in eval mode.
        size: sizes of the input, with the batch.
        exact: by default as in the tutorial, which counts a generator for every weight and bias that is *zero*;
            exactly, for every one that is not.
    """
    return _consumption(model, size, dp_area, lfsr_area, exact)


def _consumption(
    model: nn.Module, size: tuple[int, ...], dot: Callable[[float], float], lfsr: Callable[[float], float], exact: bool
) -> float:
    return sum(_dot_cost(layer, dot) + lfsr(_generators(layer, exact)) for layer in dots(model, size)[0])


def _dot_cost(layer: Dots, cost: Callable[[float], float]) -> float:
    return sum(cost(count) for count in (layer.rows != 0).sum(1).tolist()) * layer.positions


def _generators(layer: Dots, exact: bool) -> int:
    tensors = [layer.rows, *([] if layer.bias is None else [layer.bias])]
    return sum(int(((tensor != 0) if exact else (tensor == 0)).sum()) for tensor in tensors)
