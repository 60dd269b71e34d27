"""What a chain of shape ops (view, permute, slice, flip, ...) does to channels, found by running it on element numbers.

No pattern is matched: the chain is run once on a tensor whose elements are their own addresses, and the channel of
every element of the result is read off. A channel shuffle written as view, transpose, view comes out as a permutation,
a flatten as blocks, a slice as a range, whatever the spelling.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from chanopt.ir import IndexMap

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rearranged:
    """How the result of a rearrangement lies over the channels of its operand.

    Attributes:
        axis: the result's channel axis.
        index: the operand channel of each result channel.
        block: result channels per operand channel, when each is spread out (49 after flattening 7x7), else 1.
        pure: whether nothing but channels moved, so that reading the operand by ``index`` is all there is to do.
    """

    axis: int
    index: IndexMap
    block: int
    pure: bool


def addresses(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of the given shape whose elements are numbered 0, 1, 2, ... in row-major order."""
    return torch.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)


def classify(numbers: torch.Tensor, shape: tuple[int, ...], axis: int, allowed: Collection[int]) -> Rearranged | None:
    """Read off what a rearrangement did to the channels.

    Args:
        numbers: the chain's result on ``addresses(shape)``.
        shape: the operand's sizes.
        axis: the operand's channel axis.
        allowed: axes of the result that may carry channels (a symbolic one, the batch, may not).

    Returns:
        None when no axis of the result carries the channels alone.
    """
    if numbers.ndim == 0 or numbers.numel() == 0:
        return None
    array = numbers.numpy()
    stride = int(np.prod(shape[axis + 1 :], dtype=np.int64))
    channel = (array // stride) % shape[axis]
    rest = array // (stride * shape[axis]) * stride + array % stride
    for candidate in _candidates(array.shape, shape, axis):
        if candidate not in allowed:
            continue
        found = _along(channel, rest, candidate, shape, axis)
        if found is not None:
            return found
    return None


def _candidates(result: tuple[int, ...], shape: tuple[int, ...], axis: int) -> list[int]:
    """Result axes, likeliest first: the same place, then the same size; a lone channel is an axis of size one."""

    def likelihood(k: int) -> tuple[bool, bool, int]:
        resized = result[k] != shape[axis]
        return (resized, k != axis, k) if shape[axis] == 1 else (k != axis, resized, k)

    return sorted(range(len(result)), key=likelihood)


def _along(channel: Numbers, rest: Numbers, axis: int, shape: tuple[int, ...], old: int) -> Rearranged | None:
    lines = np.moveaxis(channel, axis, 0).reshape(channel.shape[axis], -1)
    if (lines != lines[:, :1]).any():
        return None
    index = lines[:, 0]
    others = np.moveaxis(rest, axis, 0).reshape(rest.shape[axis], -1)
    if (others == others[:1]).all():
        in_place = axis == old and np.array_equal(np.delete(rest.shape, axis), np.delete(shape, old))
        pure = bool(in_place and np.array_equal(others[0], np.arange(others.shape[1])))
        return Rearranged(axis, IndexMap(index), 1, pure)
    block = _block(index, others)
    return None if block is None else Rearranged(axis, IndexMap(index), block, False)


def _block(index: Numbers, others: Numbers) -> int | None:
    """The length of the equal runs in which every channel is spread out the same way, if there is one."""
    changes = np.flatnonzero(np.diff(index)) + 1
    block = int(changes[0]) if len(changes) else len(index)
    if len(index) % block or (np.diff(index.reshape(-1, block), axis=1) != 0).any():
        return None
    spread = others.reshape(-1, block, others.shape[1])
    return block if (spread == spread[:1]).all() else None
