"""From a list of channels to what a kernel reads: groups rounded out, weights beside them with zeros in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chanopt.kernels.call import KernelError

GROUP = 8
"""Channels that a channels-last kernel loads at once: 16 bytes of float16 (float32 could do with 4)."""
# A channels-last kernel reads its gathered channels in blocks of so many: their number is rounded up to a multiple.
BLOCK = 32
# Rounding to twice the block lets larger tiles be used; taken where it adds no more than an eighth.
_WIDE_BLOCK, _WIDE_COST = 64, 8


@dataclass(frozen=True, slots=True)
class Packed:
    """A gather as `chanopt::gather_conv2d` takes it: ``conv2d(x[:, index], w) == gather_conv2d(x, weight, groups)``.

    Attributes:
        groups: int32, (K / group,), on the device of the weight.
        group: channels in a group.
        weight: (O, K, kh, kw) channels last, zero in the columns that only fill groups up.
        scale, shift: float32, (K,), or None; zero for the columns that fill up.
    """

    groups: Tensor
    group: int
    weight: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None


def round_out(index: Sequence[int], group: int) -> tuple[list[int], list[int]]:
    """The groups that a list of channels touches, ascending, and where each channel lies among the gathered ones.

    >>> round_out([3, 4, 17], 8)
    ([0, 2], [3, 4, 9])
    """
    groups = sorted({channel // group for channel in index})
    place = {number: slot for slot, number in enumerate(groups)}
    return groups, [place[channel // group] * group + channel % group for channel in index]


def rounded(channels: int) -> int:
    """The number of gathered channels that a kernel wants for at least so many.

    >>> [rounded(n) for n in (8, 40, 96, 500, 512)]
    [32, 64, 96, 512, 512]
    """
    wide = -(-channels // _WIDE_BLOCK) * _WIDE_BLOCK
    return wide if (wide - channels) * _WIDE_COST <= channels else -(-channels // BLOCK) * BLOCK


def pack(
    index: Sequence[int],
    weight: Tensor,
    channels: int,
    *,
    group: int = 8,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Packed:
    """Round a conv's channels out to groups and lay its weight out for the kernels.

    Args:
        index: the channels of `x` that column j of the weight reads, in any order.
        weight: (O, len(index), kh, kw).
        channels: C of `x`.
        group: channels in a group: 8 for channels last (4 suffices in float32), 1 for NCHW.
        scale: (len(index),), the prologue's, by column of the weight.
        shift: likewise.

    Raises:
        KernelError: a channel is out of range, or sizes do not agree.
    """
    _check(index, weight.shape[1], channels, group)
    if scale is not None and len(set(index)) < len(index):
        raise KernelError("expected every channel of a gather with a prologue once, found one twice")
    groups, places = round_out(index, group) if group > 1 else (list(index), list(range(len(index))))
    # Filled up with a group that is read anyway, whose weights are zero: no mask is needed in the kernel.
    groups += [groups[-1]] * ((rounded(len(groups) * group) - len(groups) * group) // group)
    count = len(groups) * group
    at = torch.tensor(places, device=weight.device)
    wide = torch.zeros((weight.shape[0], count, *weight.shape[2:]), dtype=weight.dtype, device=weight.device)
    wide = wide.index_add(1, at, weight.detach()).contiguous(memory_format=torch.channels_last)
    return Packed(
        groups=torch.tensor(groups, dtype=torch.int32, device=weight.device),
        group=group,
        weight=wide,
        scale=_spread(scale, at, count, weight),
        shift=_spread(shift, at, count, weight),
    )


def pack_depthwise(
    index: Sequence[int],
    weight: Tensor,
    channels: int,
    *,
    group: int = 8,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Packed, list[int]]:
    """Round a depthwise conv's channels out to groups; its result has the filling channels too.

    Args:
        index: the channel of `x` that filter j reads; every channel once, in any order.
        weight: (len(index), 1, kh, kw).
        channels: C of `x`.
        group: channels in a group.
        scale: (len(index),), the prologue's.
        shift: likewise.

    Returns:
        The gather, and where in its result the channels of `index` lie. The rest of the result is 0 (before bias and
        activation). The weight's memory is ordered (kh, kw, K), so that a tap's channels lie side by side.

    Raises:
        KernelError: a channel is out of range or twice in the list, or sizes do not agree.
    """
    _check(index, weight.shape[0], channels, group)
    if len(set(index)) < len(index):
        raise KernelError("expected every channel of a depthwise gather once, found one twice")
    groups, places = round_out(index, group)
    count = len(groups) * group
    at = torch.tensor(places, device=weight.device)
    wide = weight.new_zeros((*weight.shape[2:], count, 1))
    wide[:, :, at] = weight.detach().permute(2, 3, 0, 1)
    packed = Packed(
        groups=torch.tensor(groups, dtype=torch.int32, device=weight.device),
        group=group,
        weight=wide.permute(2, 3, 0, 1),
        scale=_spread(scale, at, count, weight),
        shift=_spread(shift, at, count, weight),
    )
    return packed, places


def _spread(vector: Tensor | None, at: Tensor, count: int, like: Tensor) -> Tensor | None:
    """A prologue's numbers at their columns; float32 even where the weight is in half precision."""
    if vector is None:
        return None
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    return torch.zeros(count, dtype=dtype, device=like.device).index_copy(0, at, vector.detach().to(like.device, dtype))


def _check(index: Sequence[int], columns: int, channels: int, group: int) -> None:
    if not index or len(index) != columns:
        raise KernelError(f"expected as many channels as the weight has columns ({columns}), found {len(index)}")
    if channels % group:
        raise KernelError(f"expected a multiple of {group} channels to gather in groups of {group}, found {channels}")
    wrong = [channel for channel in index if not 0 <= channel < channels]
    if wrong:
        raise KernelError(f"expected channels from 0 to {channels - 1}, found {wrong[:5]}")
