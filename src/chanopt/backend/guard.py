"""Noticing that a weight has changed since the passes looked at its values.

Dynamo compiles a function anew when a weight's size or type changes, not when its values do: to it they are inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chanopt.backend.options import Check

_WHOLE = 4096  # entries of a weight up to which all of them are compared
_TAKEN = 1024  # entries that are compared of a larger one
_SMALL = 1 << 18  # entries of all weights together up to which all are compared: a tenth of a millisecond
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a weight was.

    Its memory is held, so that it is not given to another, but the weight itself is not: whoever has a watch drops it
    when a weight has gone. An inference tensor has no version.
    """

    ident: int
    held: Tensor
    version: int | None
    address: int
    stride: tuple[int, ...]


class Watch:
    """Weights as they were at one time.

    Objects, version counters, addresses and strides are compared always; values as ``check`` says, and all of them
    for tensors made under ``torch.inference_mode``, which have no version counter.
    """

    def __init__(self, weights: Sequence[Tensor], check: Check) -> None:
        self._seen = tuple(_seen(weight) for weight in weights)
        views = _views(self._seen, check)
        self._groups = [group for size in _BITS if (group := [view for view in views if view.itemsize == size])]
        self._values = [_packed(group) for group in self._groups]

    @property
    def ids(self) -> frozenset[int]:
        """The ids of the weights."""
        return frozenset(seen.ident for seen in self._seen)

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether nothing has changed."""
        for seen, weight in zip(self._seen, weights, strict=True):
            if id(weight) != seen.ident or weight.data_ptr() != seen.address:
                return False
            if seen.version is not None and weight._version != seen.version:
                return False
            if weight.stride() != seen.stride:
                return False
        return all(
            torch.equal(values, _packed(group)) for values, group in zip(self._values, self._groups, strict=True)
        )


def _seen(weight: Tensor) -> _Seen:
    version = None if weight.is_inference() else weight._version
    return _Seen(id(weight), weight.detach(), version, weight.data_ptr(), weight.stride())


def _views(weights: Sequence[_Seen], check: Check) -> list[Tensor]:
    """The entries to compare, as bits, so that NaN equals itself."""
    total = sum(seen.held.numel() for seen in weights)
    found: list[Tensor] = []
    for seen in weights:
        flat = _flat_bits(seen.held)
        if seen.version is None or check == "all" or (check == "sample" and total <= _SMALL):
            found.append(flat)
        elif check == "sample":
            found.append(_some(flat))
    return [view for view in found if view.numel()]


def _flat_bits(tensor: Tensor) -> Tensor:
    """A one-dimensional view of all memory between a tensor's first and last entry.

    A copy in the tensor's own order would not show later writes.
    """
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    reach = 1 + sum((size - 1) * stride for size, stride in zip(real.shape, real.stride(), strict=True))
    return real.as_strided((reach if real.numel() else 0,), (1,)).view(_BITS[real.itemsize])


def _some(flat: Tensor) -> Tensor:
    """Entries at an odd distance, so that those of convs with an even number of entries a channel sweep its inside."""
    if flat.numel() <= _WHOLE:
        return flat
    return flat[:: (flat.numel() // _TAKEN) | 1]


def _packed(views: Sequence[Tensor]) -> Tensor:
    return torch.cat([*views])
