"""Structures of a weight, their sizes, and what falls below a threshold (D3, D5, D9)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from chanopt.errors import ScheduleError
from chanopt.pruning.distiller import groups


def kernels() -> Tensor:
    """Shape (2, 3, 3, 3): the example of Distiller's own tests of thresholds, whose norms are known."""
    return torch.tensor(
        [
            [
                [[-1.2982, 0.7574, 0.7962], [-0.6695, 1.5907, 0.2659], [0.1423, 0.3165, -0.7629]],
                [[-0.5480, -1.2718, 0.8286], [-0.6427, 0.3814, -0.7988], [1.0346, 1.3023, -0.9674]],
                [[-0.7951, 1.8784, -0.5654], [0.0456, -0.2849, -0.3332], [-0.2367, 0.7467, 0.9212]],
            ],
            [
                [[1.3672, 0.2993, -0.0619], [1.8156, 0.7599, 0.1815], [0.4136, 1.8316, 1.7214]],
                [[0.5125, -1.5329, 0.9257], [0.9200, 0.4376, 0.5743], [-0.0097, 0.9473, -0.0899]],
                [[0.2372, 2.4369, -0.3410], [-1.0595, 0.8056, -0.0357], [-1.0105, -0.1451, -0.4194]],
            ],
        ]
    )


def matrix() -> Tensor:
    return torch.arange(1.0, 13.0).view(4, 3)


@pytest.mark.parametrize(
    ("group", "criterion", "threshold", "expected"),
    [
        ("2D", "L1", 6.0, [1, 1, 0, 1, 0, 1]),
        ("3D", "L2", 4.7, [0, 1]),
        ("Filters", "L2", 4.7, [0, 1]),
        ("Channels", "L2", 3.7, [1, 0, 1]),
        ("Channels", "L1", 13.0, [1, 1, 0]),
        ("Channels", "Mean_L1", 0.7, [1, 1, 0]),
        ("Channels", "Mean_Abs", 0.8, [1, 0, 0]),
        ("Channels", "Max", 1.6, [1, 0, 1]),
        ("4D", "L2", 6.8, [1]),
    ],
)
def test_d09_thresholds_of_conv_weights(group: str, criterion: str, threshold: float, expected: list[int]) -> None:
    weight = kernels()
    keep = groups.over_threshold(weight, group, threshold, criterion)
    assert keep.int().tolist() == expected
    mask = groups.expand(keep, weight, group)
    assert mask.shape == weight.shape
    assert torch.equal(groups.parts(mask, group), keep.float()[:, None].expand_as(groups.parts(mask, group)))


@pytest.mark.parametrize(
    ("group", "criterion", "threshold", "expected"),
    [
        ("Rows", "L1", 7.0, [0, 1, 1, 1]),
        ("Rows", "Max", 8.5, [0, 0, 1, 1]),
        ("Rows", "Mean_Abs", 5.5, [0, 0, 1, 1]),
        ("Cols", "L1", 25.0, [0, 1, 1]),
        ("Cols", "L2", 15.0, [0, 0, 1]),
    ],
)
def test_d09_thresholds_of_matrices(group: str, criterion: str, threshold: float, expected: list[int]) -> None:
    keep = groups.over_threshold(matrix(), group, threshold, criterion)
    assert keep.int().tolist() == expected
    mask = groups.expand(keep, matrix(), group)
    along = mask if group == "Rows" else mask.t()
    assert [bool(line.all()) for line in along] == [bool(line.any()) for line in along] == [bool(k) for k in expected]


def test_d09_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"4 dimensions for structures '2D', found shape \(4, 3\)"):
        groups.parts(matrix(), "2D")
    with pytest.raises(ScheduleError, match="one of the structures 2D, 3D"):
        groups.parts(matrix(), "Squares")
    with pytest.raises(ScheduleError, match="threshold_criteria to be one of"):
        groups.over_threshold(matrix(), "Rows", 1.0, "Median")


@pytest.mark.parametrize("total", [1, 5, 8, 10, 64])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.29, 0.3, 0.5, 0.6, 0.7, 0.999, 1.0])
def test_d03_as_many_go_as_the_fraction_says(total: int, fraction: float) -> None:
    assert groups.prune_count(total, fraction) == math.floor(fraction * total)


def test_d03_never_all_go_unless_all_are_asked_for() -> None:
    assert groups.prune_count(4, 0.99, rounding="ceil") == 3
    assert groups.prune_count(8, 0.95, group_size=4, rounding="ceil") == 4
    assert groups.prune_count(8, 1.0, group_size=4) == 8


def test_d03_whole_groups_go() -> None:
    assert groups.prune_count(16, 0.5, group_size=3 + 1) == 8
    assert groups.prune_count(16, 0.45, group_size=4) == 4
    with pytest.raises(ScheduleError, match="group_size to divide the 16 structures, found 3"):
        groups.prune_count(16, 0.5, group_size=3)


def test_ties_lose_as_many_as_asked_for_and_no_more() -> None:
    """Distiller keeps what is greater than the last to go, so that of four equal filters at 50 % none is left."""
    assert groups.keep_largest(torch.ones(4), 2).tolist() == [False, False, True, True]
    assert int(groups.entries_at_level(torch.ones(10, 10), 0.3).sum()) == 70  # type: ignore[union-attr]


def test_what_is_zero_already_goes_too() -> None:
    """Else a filter that another pruner dropped would come back when this one takes over its mask."""
    weight = torch.tensor([[0.0, 0.0, 0.0, 1.0, 2.0, 3.0]])
    assert groups.entries_at_level(weight, 0.2).tolist() == [[0, 0, 0, 1, 1, 1]]  # type: ignore[union-attr]


def test_d08_levels_drop_the_smallest_entries() -> None:
    weight = torch.rand(3, 64, 8, 8)
    mask = groups.entries_at_level(weight, 0.3)
    assert mask is not None
    assert int((mask == 0).sum()) == int(0.3 * weight.numel())
    assert float(weight[mask == 0].max()) <= float(weight[mask == 1].min())
    assert groups.entries_at_level(weight, 0.0) is None


def test_d05_blocks_of_eight_channels() -> None:
    """1 x 8 x 1 x 1: eight neighbouring channels of one filter at one place of the kernel."""
    weight = torch.randn(4, 16, 3, 3)
    cut = groups.blocks(weight, [1, 8, 1, 1])
    assert cut.shape == (4, 2, 9, 8)
    assert torch.equal(cut[2, 1, 5], weight[2, 8:16, 1, 2])
    keep = torch.rand(4, 2, 9) > 0.5
    mask = groups.expand_blocks(keep, weight, [1, 8, 1, 1])
    assert torch.equal(groups.blocks(mask, [1, 8, 1, 1]), keep.float()[..., None].expand(4, 2, 9, 8))


def test_d05_blocks_of_neighbouring_filters() -> None:
    weight = torch.randn(4, 6, 3, 3)
    cut = groups.blocks(weight, [2, 3, 1, 1])
    assert torch.equal(cut[1, 0, 4], weight[2:4, 0:3, 1, 1].flatten())
    mask = groups.expand_blocks(torch.arange(2 * 2 * 9).view(2, 2, 9), weight, [2, 3, 1, 1])
    assert groups.blocks(mask, [2, 3, 1, 1])[..., 0].flatten().tolist() == list(range(36))
    assert groups.blocks(mask, [2, 3, 1, 1]).std(-1).max() == 0


@pytest.mark.parametrize(
    ("shape", "told"), [([1, 5, 1, 1], "divide"), ([3, 1, 1, 1], "divide"), ([1, 8, 3, 3], "1, 1]"), ([8], "depth")]
)
def test_d05_blocks_must_divide_the_tensor(shape: list[int], told: str) -> None:
    with pytest.raises(ScheduleError, match=told):
        groups.blocks(torch.randn(4, 16, 3, 3), shape)
