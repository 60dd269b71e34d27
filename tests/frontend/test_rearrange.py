"""classify: what shape ops do to channels, against definitions written out element by element."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chanopt.frontend.rearrange import Rearranged, addresses, classify

SHAPE = (2, 6, 3, 4)


def found(move: Callable[[Tensor], Tensor], shape: tuple[int, ...] = SHAPE, axis: int = 1) -> Rearranged | None:
    numbers = move(addresses(shape)).contiguous()
    return classify(numbers, shape, axis, range(1, numbers.ndim))


def carries(move: Callable[[Tensor], Tensor], result: Rearranged, shape: tuple[int, ...], axis: int) -> bool:
    """By definition: channel j of the result holds elements of operand channel index[j] and of no other."""
    source = torch.arange(shape[axis]).reshape([-1 if k == axis else 1 for k in range(len(shape))]).expand(shape)
    moved = move(source.contiguous()).movedim(result.axis, 0)
    return all(bool((moved[j] == c).all()) for j, c in enumerate(result.index))


def cuts(
    move: Callable[[Tensor], Tensor], result: Rearranged, shape: tuple[int, ...], axis: int, keep: list[int]
) -> bool:
    """By definition of what a pass relies on: a pure move is a read by index, on any subset of the result."""
    x = torch.randn(shape)
    return torch.equal(
        move(x).index_select(result.axis, torch.tensor(keep)),
        x.index_select(axis, torch.tensor([result.index[j] for j in keep])),
    )


PURE: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    "nothing": (lambda t: t, [0, 1, 2, 3, 4, 5]),
    "a view and back": (lambda t: t.reshape(2, 6, 12).reshape(SHAPE), [0, 1, 2, 3, 4, 5]),
    "a slice": (lambda t: t[:, 1:4], [1, 2, 3]),
    "a stride": (lambda t: t[:, ::2], [0, 2, 4]),
    "one channel": (lambda t: t[:, 3:4], [3]),
    "a flip": (lambda t: t.flip(1), [5, 4, 3, 2, 1, 0]),
    "a roll": (lambda t: t.roll(2, 1), [4, 5, 0, 1, 2, 3]),
    "an index": (lambda t: t[:, torch.tensor([4, 4, 0])], [4, 4, 0]),
    "a shuffle by 2": (lambda t: t.reshape(2, 2, 3, 3, 4).transpose(1, 2).reshape(SHAPE), [0, 3, 1, 4, 2, 5]),
    "a shuffle by 3": (lambda t: t.reshape(2, 3, 2, 3, 4).transpose(1, 2).reshape(SHAPE), [0, 2, 4, 1, 3, 5]),
    "two permutes that cancel": (lambda t: t.permute(0, 2, 3, 1).permute(0, 3, 1, 2), [0, 1, 2, 3, 4, 5]),
    "a repeat": (lambda t: t.repeat(1, 2, 1, 1), [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]),
    "a repeat of each": (lambda t: t.repeat_interleave(2, 1), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
    "halves exchanged": (lambda t: torch.cat([t[:, 3:], t[:, :3]], 1), [3, 4, 5, 0, 1, 2]),
}


@pytest.mark.parametrize("name", PURE)
def test_moves_of_channels_alone_are_pure(name: str) -> None:
    move, index = PURE[name]
    result = found(move)
    assert result is not None
    assert (result.axis, list(result.index), result.block, result.pure) == (1, index, 1, True)
    assert carries(move, result, SHAPE, 1)
    assert cuts(move, result, SHAPE, 1, list(range(0, len(index), 2)))


SPREAD: dict[str, tuple[Callable[[Tensor], Tensor], int, int, int]] = {
    # axis and number of channels of the result, and result channels per operand channel
    "flatten": (lambda t: t.flatten(1), 1, 72, 12),
    "flatten of a part": (lambda t: t.flatten(1, 2), 1, 18, 3),
    "pixel unshuffle of one axis": (
        lambda t: t.reshape(2, 6, 3, 2, 2).permute(0, 1, 4, 2, 3).reshape(2, 12, 3, 2),
        1,
        12,
        2,
    ),
    "channels last": (lambda t: t.permute(0, 2, 3, 1), 3, 6, 1),
    "space flattened": (lambda t: t.flatten(2), 1, 6, 1),
    "tokens": (lambda t: t.flatten(2).transpose(1, 2), 2, 6, 1),
    "an axis put in": (lambda t: t.unsqueeze(2), 1, 6, 1),
    "an axis put in front": (lambda t: t.unsqueeze(1), 2, 6, 1),
    "space flipped": (lambda t: t.flip(2), 1, 6, 1),
    "space cut": (lambda t: t[:, :, :2, ::2], 1, 6, 1),
    "space exchanged": (lambda t: t.transpose(2, 3), 1, 6, 1),
}


@pytest.mark.parametrize("name", SPREAD)
def test_moves_that_keep_channels_together(name: str) -> None:
    move, axis, channels, block = SPREAD[name]
    result = found(move)
    assert result is not None
    assert (result.axis, len(result.index), result.block, result.pure) == (axis, channels, block, False)
    assert list(result.index) == [c for c in range(6) for _ in range(block)]
    assert carries(move, result, SHAPE, 1)


SPLIT_UP: dict[str, Callable[[Tensor], Tensor]] = {
    "channels over two axes": lambda t: t.reshape(2, 2, 3, 12),
    "channels mixed with space": lambda t: t.permute(0, 2, 1, 3).reshape(2, 6, 3, 4),
    "channels last, flattened": lambda t: t.permute(0, 2, 3, 1).flatten(1),
    "rows of two channels": lambda t: t.reshape(2, 3, 2 * 12)[:, :, 6:18],
    "nothing left": lambda t: t[:, :0],
    "different pixels of different channels": lambda t: torch.stack([t[:, 0].flip(1), t[:, 1]], 1),
}


@pytest.mark.parametrize("name", SPLIT_UP)
def test_moves_that_leave_no_axis_of_channels(name: str) -> None:
    assert found(SPLIT_UP[name]) is None


def test_channels_last_flattened_carries_no_blocks() -> None:
    """(N, H, W, C) flattened: the columns of a channel are strided, so no axis carries whole channels."""
    assert found(lambda t: t.permute(0, 2, 3, 1).flatten(1)) is None


def test_a_symbolic_axis_may_not_carry_channels() -> None:
    numbers = addresses(SHAPE).transpose(0, 1).contiguous()
    assert classify(numbers, SHAPE, 1, [1, 2, 3]) is None
    swapped = classify(numbers, SHAPE, 1, [0, 1, 2, 3])
    assert swapped is not None
    assert swapped.axis == 0


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_one_channel_is_found_whatever_the_other_sizes_are(size: int) -> None:
    shape = (2, size, size, size)
    result = found(lambda t: t[:, 1:2], shape)
    assert result is not None
    assert (result.axis, list(result.index), result.pure) == (1, [1], True)


@given(st.permutations(range(6)), st.integers(1, 6))
def test_every_permutation_and_its_cuts(order: list[int], count: int) -> None:
    kept = torch.tensor(order[:count])
    result = found(lambda t: t[:, kept])
    assert result is not None
    assert (list(result.index), result.pure, result.block) == (order[:count], True, 1)


@given(st.permutations(range(1, 4)), st.integers(1, 3))
def test_every_permutation_of_axes_keeps_track_of_the_channel_axis(axes: list[int], axis: int) -> None:
    shape = (2, 3, 5, 7)
    result = found(lambda t: t.permute(0, *axes), shape, axis)
    assert result is not None
    assert result.axis == 1 + axes.index(axis)
    assert result.index.is_identity(shape[axis])


@pytest.mark.parametrize(
    ("groups", "width"), [(g, w) for g, w in itertools.product((2, 3, 4), (2, 3, 5)) if g * w <= 12]
)
def test_shuffles_are_transposes_of_a_table(groups: int, width: int) -> None:
    """Zhang et al. 2018 (ShuffleNet, figure 2): (g, n) written by rows and read by columns."""
    channels = groups * width
    result = found(
        lambda t: t.reshape(2, groups, width, 2, 2).transpose(1, 2).reshape(2, channels, 2, 2), (2, channels, 2, 2)
    )
    assert result is not None
    table = np.arange(channels).reshape(groups, width)
    assert list(result.index) == table.T.reshape(-1).tolist()
    assert result.pure
