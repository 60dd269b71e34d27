"""Structures of a weight tensor: what is one filter, channel, kernel, row, column or block, and how large it is.

The words are Distiller's, whose schedules this package runs: a conv weight has shape (filters, channels, kernel...),
filter f is ``W[f]`` and makes output channel f, channel c is ``W[:, c]`` and reads input channel c. ``Rows`` and
``Cols`` are the rows and columns of a matrix in the regularizers and threshold pruners, while the ranking pruners
call the columns of a linear layer's weight its ``Rows`` or ``Channels``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from chanopt.errors import ScheduleError

Norm = Literal["L1", "L2", "Max"]

GROUPS = ("2D", "3D", "4D", "Filters", "Channels", "Rows", "Cols")
"""The structures a weight can be taken apart into; ``3D`` and ``Filters`` are one thing."""

_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "L1": lambda parts: parts.abs().sum(1),
    "L2": lambda parts: parts.square().sum(1).sqrt(),
    "Max": lambda parts: parts.abs().amax(1),
}
_CRITERIA: dict[str, tuple[Norm, bool]] = {
    "L1": ("L1", False),
    "L2": ("L2", False),
    "Max": ("Max", False),
    "Mean_Abs": ("L1", True),
    "Mean_L1": ("L1", True),
    "Mean_L2": ("L2", True),
}
_ROUNDINGS: dict[str, Callable[[float], int]] = {"floor": math.floor, "ceil": math.ceil, "round": round}


def parts(weight: Tensor, group: str) -> Tensor:
    """Shape (structures, entries of one): a weight taken apart; entries keep their order.

    Raises:
        ScheduleError: there is no such structure, or not in a weight of this shape.
    """
    _require_fitting(weight, group)
    if group in ("Filters", "3D", "Rows"):
        return weight.flatten(1)
    if group in ("Channels", "Cols"):
        return weight.transpose(0, 1).flatten(1)
    return weight.flatten(2).flatten(0, 1) if group == "2D" else weight.reshape(1, -1)


def expand(keep: Tensor, weight: Tensor, group: str) -> Tensor:
    """A mask of the weight's shape and dtype from one number a structure (shape (structures,))."""
    _require_fitting(weight, group)
    keep = keep.to(weight)
    ones = (1,) * (weight.dim() - 2)
    if group in ("Filters", "3D", "Rows"):
        shape = (-1, 1, *ones)
    elif group in ("Channels", "Cols"):
        shape = (1, -1, *ones)
    else:
        shape = (*weight.shape[:2], *ones) if group == "2D" else (1, 1, *ones)
    return keep.reshape(shape).expand_as(weight).clone()


def _require_fitting(weight: Tensor, group: str) -> None:
    if group not in GROUPS:
        raise ScheduleError(f"expected one of the structures {', '.join(GROUPS)}, found {group!r}")
    least, most = {"2D": (4, 4), "4D": (4, 4), "Rows": (2, 2), "Cols": (2, 2), "Channels": (2, 5)}.get(group, (3, 5))
    if not least <= weight.dim() <= most:
        dims = str(least) if least == most else f"{least} to {most}"
        raise ScheduleError(
            f"expected a weight of {dims} dimensions for structures {group!r}, found shape {tuple(weight.shape)}"
        )


def magnitudes(weight: Tensor, group: str, norm: Norm = "L1", *, mean: bool = False) -> Tensor:
    """Shape (structures,): the norm of each structure, if ``mean`` over its number of entries."""
    return norms(parts(weight.detach(), group), norm, mean=mean)


def norms(pieces: Tensor, norm: Norm, *, mean: bool = False) -> Tensor:
    """Shape (structures,) of pieces (structures, entries): the norm of each, if ``mean`` over its number of entries."""
    found = _NORMS[norm](pieces)
    return found / pieces.shape[1] if mean else found


def prune_count(total: int, fraction: float, group_size: int = 1, rounding: str = "floor") -> int:
    """How many of ``total`` structures a fraction prunes: ``floor(fraction * total)``, in whole groups.

    Never all of them, unless the fraction is 1.

    Raises:
        ScheduleError: the groups do not fit, or there is no such rounding.
    """
    if rounding not in _ROUNDINGS:
        raise ScheduleError(f"expected rounding_fn to be one of {', '.join(_ROUNDINGS)}, found {rounding!r}")
    if group_size < 1 or total % group_size:
        raise ScheduleError(f"expected group_size to divide the {total} structures, found {group_size}")
    whole = _ROUNDINGS[rounding]
    count = int(whole(whole(fraction * total) / group_size) * group_size)
    return total - group_size if count >= total and fraction < 1 else min(count, total)


def keep_largest(sizes: Tensor, dropped: int) -> Tensor:
    """Shape of ``sizes``, boolean: all but the ``dropped`` smallest; of equal ones the first goes first.

    Distiller keeps what is *greater than* the largest of the dropped ones and so loses every structure that is as
    large: four equal filters at 50 % all go. Here exactly as many go as were asked for. Only what is zero and so
    gone already (see :func:`without_zeros`) goes as a whole.
    """
    keep = torch.ones(sizes.numel(), dtype=torch.bool, device=sizes.device)
    keep[torch.sort(sizes.flatten(), stable=True).indices[:dropped]] = False
    return keep.view_as(sizes)


def without_zeros(keep: Tensor, sizes: Tensor) -> Tensor:
    """What is kept, without what is zero: another pruner has dropped it, and its mask may end before this one's."""
    return keep & (sizes > 0)


def over_threshold(weight: Tensor, group: str, threshold: float, criterion: str) -> Tensor:
    """Shape (structures,), boolean: which structures are larger than a threshold.

    Args:
        weight: the tensor.
        group: its structures.
        threshold: what a structure must exceed.
        criterion: ``Max``, ``L1``, ``L2``, or their means over the entries, ``Mean_Abs`` (= ``Mean_L1``), ``Mean_L2``.

    Raises:
        ScheduleError: there is no such criterion, or no such structure in this weight.
    """
    if criterion not in _CRITERIA:
        raise ScheduleError(f"expected threshold_criteria to be one of {', '.join(_CRITERIA)}, found {criterion!r}")
    norm, mean = _CRITERIA[criterion]
    return magnitudes(weight, group, norm, mean=mean) > threshold


def entries_over(weight: Tensor, threshold: float) -> Tensor:
    """A mask of the weight's shape and dtype: 1 where the absolute value exceeds the threshold."""
    return (weight.detach().abs() > threshold).to(weight)


def entries_at_level(weight: Tensor, fraction: float) -> Tensor | None:
    """A mask that drops the ``int(fraction * entries)`` smallest entries and those that are zero; None if none."""
    dropped, sizes = int(fraction * weight.numel()), weight.detach().abs()
    return without_zeros(keep_largest(sizes, dropped), sizes).to(weight) if dropped else None


def blocks(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Shape (filter blocks, channel blocks, kernel, entries of one): a conv weight in blocks.

    Args:
        weight: shape (filters, channels, kernel...).
        shape: ``[repetitions, depth, 1, 1]``: a block is ``depth`` neighbouring channels of ``repetitions``
            neighbouring filters, at one position of the kernel.

    Raises:
        ScheduleError: a block of another form, or one that does not divide the tensor.
    """
    repetitions, depth = _block(weight, shape)
    filters, channels = weight.shape[:2]
    split = weight.reshape(filters // repetitions, repetitions, channels // depth, depth, -1)
    return split.permute(0, 2, 4, 1, 3).flatten(3)


def expand_blocks(keep: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask of the weight's shape from one number a block (shape as of :func:`blocks` without the last axis)."""
    repetitions, depth = _block(weight, shape)
    wide = keep.to(weight).repeat_interleave(repetitions, 0).repeat_interleave(depth, 1)
    return wide.reshape(weight.shape).contiguous()


def _block(weight: Tensor, shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 4 or any(size < 1 for size in shape) or tuple(shape[2:]) != (1, 1):
        raise ScheduleError(f"expected block_shape as [repetitions, depth, 1, 1], found {list(shape)}")
    if weight.dim() != 4 or weight.shape[0] % shape[0] or weight.shape[1] % shape[1]:
        raise ScheduleError(
            f"expected blocks {list(shape)} to divide a conv weight exactly, found shape {tuple(weight.shape)}"
        )
    return shape[0], shape[1]
