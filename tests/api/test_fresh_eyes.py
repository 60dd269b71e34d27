"""Smallest forms of what a stranger broke: each was once a wrong output, a raw traceback or a false alarm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import chanopt
from chanopt.errors import ChanoptError, MaskError, PassError
from tests.support.equal import assert_same_function


class Net(nn.Module):
    """Two convs on one input, joined by a function, and a conv on the result."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.join(self.a(x), self.b(x)))


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "greater": lambda a, b: (a > b).to(a.dtype),
    "less or equal": lambda a, b: (a <= b).to(a.dtype),
    "where": lambda a, b: torch.where(b > 0, a, 2 * a),
    "where of one": lambda a, _b: torch.where(a > 0, a, 2 * a),
}


@pytest.mark.parametrize("name", JOINS)
def test_a_constant_in_a_comparison_keeps_its_type(name: str) -> None:
    net = Net(JOINS[name]).double().eval()
    with torch.no_grad():
        net.b.weight.zero_()
        net.b.bias.fill_(0.3)
        net.a.weight[:2] = 0
    inputs = (torch.randn(2, 3, 5, 5, dtype=torch.float64),)
    assert_same_function(net, chanopt.optimize(net, inputs), (torch.randn(2, 3, 5, 5, dtype=torch.float64),))


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 1, 1),
        nn.AvgPool2d(2, 2, padding=1, ceil_mode=True),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d(2, 2, padding=1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False, divisor_override=4),
    ],
)
@pytest.mark.parametrize("traced", [1, 2, 4])
def test_a_padded_average_is_no_constant_at_another_size(pool: nn.Module, traced: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), pool, nn.Conv2d(4, 2, 1)).double().eval()
    with torch.no_grad():
        net[0].weight[:2] = 0
    fast = chanopt.optimize(net, (torch.randn(2, 3, traced, traced, dtype=torch.float64),))
    assert_same_function(net, fast, (torch.randn(2, 3, 9, 9, dtype=torch.float64),))


def test_verify_gives_each_module_inputs_of_its_own() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.mul_(2))

    net, x = Writes().double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    kept = x.clone()
    assert chanopt.verify(net, chanopt.optimize(net, x), x) <= 1e-10
    assert torch.equal(x, kept)


@pytest.mark.parametrize("kept", [torch.tensor([True] * 4), [1.7], 3, "abc", [True, False]])
def test_a_mask_that_is_no_list_of_channels(kept: object) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    with pytest.raises(MaskError, match="expected kept output channels of 0 as channel numbers"):
        chanopt.optimize(net, torch.randn(1, 3, 4, 4), masks={"0": chanopt.Mask(outputs=kept)})  # type: ignore[arg-type]


@pytest.mark.parametrize("masks", [[1], {"0": {1, 2}}])
def test_masks_of_another_type(masks: object) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    with pytest.raises(MaskError, match="expected masks as"):
        chanopt.optimize(net, torch.randn(1, 3, 4, 4), masks=masks)  # type: ignore[arg-type]


def test_calls_that_make_no_sense_are_refused_in_words() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), torch.randn(1, 3, 4, 4)
    with pytest.raises(ChanoptError, match="expected a torch.nn.Module"):
        chanopt.optimize(3, x)  # type: ignore[arg-type]
    with pytest.raises(PassError, match="expected a pipeline of passes"):
        chanopt.optimize(net, x, pipeline="fast")  # type: ignore[arg-type]
    with pytest.raises(PassError, match="expected a pipeline of passes"):
        chanopt.optimize(net, x, pipeline=[chanopt.passes.Pipeline])  # type: ignore[list-item]
    with pytest.raises(ChanoptError, match="expected keyword inputs as a dict"):
        chanopt.optimize(net, x, [1])  # type: ignore[arg-type]
    with pytest.raises(ChanoptError, match="on the meta device"):
        chanopt.optimize(
            nn.Sequential(nn.Conv2d(3, 4, 1, device="meta")).eval(), torch.empty(1, 3, 4, 4, device="meta")
        )
