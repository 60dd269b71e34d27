"""Noticing that a weight has changed since the passes looked at its values.

Dynamo compiles a function anew when a weight's size or type changes, not when its values do: to it they are inputs.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten  # pyright: ignore[reportPrivateUsage]

from chanopt.backend.options import Check

_WHOLE = 4096  # entries of a weight up to which all of them are compared
_SMALL = 1 << 18  # entries of all weights together up to which all are compared: a tenth of a millisecond
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def _identity(weights: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """What weights are, their values apart: objects, addresses, strides, versions. Every call of a compiled model asks.

    An inference tensor has no version.
    """
    counted = itertools.filterfalse(Tensor.is_inference, weights)
    return (
        list(map(id, weights)),
        list(map(Tensor.data_ptr, weights)),
        list(map(Tensor.stride, weights)),
        list(map(operator.attrgetter("_version"), counted)),
    )


@dataclass(frozen=True, slots=True)
class _Packed:
    """Entries of several weights of one type in one tensor: one comparison for many small weights.

    Attributes:
        picks: the weight's number, and the positions of the entries in its memory; None for all of them.
        bits: the entries as integers, so that NaN equals itself.
    """

    picks: tuple[tuple[int, Tensor | None], ...]
    bits: Tensor

    @classmethod
    def of(cls, picks: Sequence[tuple[int, Tensor | None]], weights: Sequence[Tensor]) -> _Packed:
        """The entries as they are now."""
        return cls(tuple(picks), _pack(picks, weights).clone())  # of a lone weight it is a view

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether all are what they were."""
        return torch.equal(self.bits, _pack(self.picks, weights))


@dataclass(frozen=True, slots=True)
class _Large:
    """All entries of one weight, compared where they lie."""

    number: int
    bits: Tensor

    @classmethod
    def of(cls, number: int, weight: Tensor) -> _Large:
        """The entries as they are now."""
        return cls(number, _in_place(weight, _widest(weight)).clone())

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether all are what they were."""
        return torch.equal(self.bits, _in_place(weights[self.number], self.bits.dtype))


class Watch:
    """Weights as they were at one time.

    Objects, version counters, addresses and strides are compared always; values as ``check`` says, and all of them
    for tensors made under ``torch.inference_mode``, which have no version counter. No memory of a weight is held: as
    long as its storage lives, nobody else is given its address. (A reference to the tensor itself would keep
    ``torch.utils.swap_tensors`` from working.)

    Args:
        weights: the weights.
        check: which values are compared; "auto" is resolved by the options.
        gone: called when the memory of a weight has been given back: nothing will ever equal what was seen.
    """

    def __init__(self, weights: Sequence[Tensor], check: Check, gone: Callable[[], None] | None = None) -> None:
        called = None if gone is None else lambda _: gone()
        self._identity = _identity(weights)
        self._storages = [weakref.ref(weight.untyped_storage(), called) for weight in weights]
        with torch.no_grad():
            self._values = _values(weights, check)

    @property
    def ids(self) -> frozenset[int]:
        """The ids of the weights."""
        return frozenset(self._identity[0])

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether nothing has changed."""
        if _identity(weights) != self._identity or any(storage() is None for storage in self._storages):
            return False
        with torch.no_grad():
            return all(values.holds(weights) for values in self._values)


def _values(weights: Sequence[Tensor], check: Check) -> list[_Packed | _Large]:
    """The entries to compare: small weights and samples together by type, large ones one by one."""
    total = sum(weight.numel() for weight in weights)
    together: dict[tuple[Any, Any], list[tuple[int, Tensor | None]]] = {}
    large: list[_Large] = []
    generator = torch.Generator().manual_seed(0)
    for number, weight in enumerate(weights):
        small = weight.numel() <= _WHOLE
        whole = weight.is_inference() or check == "all" or (check == "sample" and (small or total <= _SMALL))
        if weight.numel() == 0 or not (whole or check == "sample"):
            continue
        if whole and not small and weight.device.type == "cpu" and _is_dense(weight):
            large.append(_Large.of(number, weight))
            continue
        pick = None if whole else _sample(weight, generator).to(weight.device)
        together.setdefault((weight.dtype, weight.device), []).append((number, pick))
    return [*(_Packed.of(picks, weights) for picks in together.values()), *large]


def _pack(picks: Sequence[tuple[int, Tensor | None]], weights: Sequence[Tensor]) -> Tensor:
    """The entries of weights of one type, as bits."""
    taken = [weights[number] if pick is None else _picked(weights[number], pick) for number, pick in picks]
    packed = flatten(taken)
    return packed.view(_BITS[packed.itemsize])


def _picked(weight: Tensor, positions: Tensor) -> Tensor:
    reach = 1 + sum((size - 1) * step for size, step in zip(weight.shape, weight.stride(), strict=True))
    return weight.as_strided((reach,), (1,)).index_select(0, positions)


def _sample(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Positions in memory of at least one entry at every index of every axis: every filter, every input channel.

    As many as the longest axis has indices. Each axis is gone through in an order of its own, so that the entries lie
    on no diagonal.
    """
    count = max(weight.shape)
    positions = torch.zeros(count, dtype=torch.int64)
    for size, step in zip(weight.shape, weight.stride(), strict=True):
        order = torch.randperm(size, generator=generator)
        positions += step * order.repeat(-(-count // size))[:count]
    return positions


def _is_dense(weight: Tensor) -> bool:
    """Whether the entries fill their memory, in whatever order, as in a channels-last weight."""
    expected = 1
    for step, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True


def _widest(weight: Tensor) -> torch.dtype:
    """The integers to compare a dense weight as: the wider, the fewer."""
    sizes = (weight.numel() * weight.itemsize, weight.storage_offset() * weight.itemsize)
    return torch.int64 if all(size % 8 == 0 for size in sizes) else _BITS[weight.itemsize]


def _in_place(weight: Tensor, bits: torch.dtype) -> Tensor:
    """A dense weight's memory as integers: a view."""
    return weight.as_strided((weight.numel(),), (1,)).view(bits)
