"""Figures, against the emitted module at work: gathers, bytes, multiplications and parameters as they are observed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from chanopt.analysis.figures import figures
from chanopt.passes import DEFAULT, OrderChannels, Pass
from tests.support.masks import mask_randomly
from tests.support.micro import MICRO
from tests.support.nets.base import Net, conv, image, randomise
from tests.support.passes import kill, passes_before, prepared
from tests.support.random_nets import random_net

NETS = (
    "bottleneck",
    "residual_pre",
    "dense_block",
    "dense_middle",
    "c2f",
    "inception",
    "fan_out",
    "add_both_read",
    "cat_two_orders",
    "hrnet_fuse",
    "grouped_chain",
    "depthwise_2",
    "depthwise_3",
    "transposed",
    "split_sizes",
    "two_inputs_added",
    "mlp_residual",
    "conv1d",
    "conv3d",
)


class Gathers(TorchDispatchMode):
    """Counts index_select: calls and bytes written."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = self.channels = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index_select.default:
            self.calls += 1
            self.bytes += made.numel() * made.element_size()
            self.channels += made.shape[args[1]]
        return made


def assert_as_observed(model: nn.Module, inputs: Any, batch: int, passes: tuple[Pass, ...] = DEFAULT) -> int:
    program = prepared(model, inputs, passes, batch)
    module = program.to_module()
    claimed = figures(program)
    x = inputs(batch, torch.float64, 1)
    with torch.no_grad(), Gathers() as seen:
        module(*x)
    assert (seen.calls, seen.channels, seen.bytes) == (claimed.copies, claimed.gathered_channels, claimed.copied_bytes)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        module(*x)
    assert flops.get_total_flops() == 2 * claimed.macs
    assert sum(p.numel() for p in module.parameters()) == claimed.parameters
    return seen.calls


@pytest.mark.parametrize("name", NETS)
def test_figures_are_what_is_observed(name: str) -> None:
    model = MICRO[name].build()
    mask_randomly(model, 4, side="input", mode="uniform", amount=0.4)
    assert_as_observed(model, MICRO[name].inputs, 2)


def test_some_of_these_nets_gather() -> None:
    """Or the counts above would prove nothing."""
    for name in ("fan_out", "inception"):
        model = MICRO[name].build()
        mask_randomly(model, 4, side="input", mode="uniform", amount=0.4)
        assert assert_as_observed(model, MICRO[name].inputs, 3) > 0


@pytest.mark.parametrize("seed", range(340, 346))
def test_figures_of_random_nets_are_what_is_observed(seed: int) -> None:
    """But for multiplications: random nets multiply activations, which are no layers."""
    model, inputs = random_net(seed)
    mask_randomly(model, seed, side="input")
    program = prepared(model, inputs, DEFAULT)
    claimed, module = figures(program), program.to_module()
    with torch.no_grad(), Gathers() as seen:
        module(*inputs(2, torch.float64, 1))
    assert (seen.calls, seen.channels, seen.bytes) == (claimed.copies, claimed.gathered_channels, claimed.copied_bytes)
    assert sum(p.numel() for p in module.parameters()) == claimed.parameters


def test_one_gather_of_the_same_channels_serves_all_its_readers() -> None:
    def body(n: Net, x: Tensor) -> tuple[Tensor, ...]:
        t = n.a(x)
        return n.b(t), n.c(t), n.d(t), n.e(t)

    model: Any = randomise(Net(body, a=conv(3, 8), b=conv(8, 4), c=conv(8, 5), d=conv(8, 4), e=conv(8, 4))).eval()
    for name, lost in (("b", [1, 4]), ("c", [1, 4]), ("d", [0, 2])):
        kill(model.get_submodule(name), inputs=lost)
    unordered = passes_before(OrderChannels)
    found = figures(prepared(model, image(), unordered))
    assert (found.gathers, found.copies, found.gathered_channels) == (3, 2, 12)
    assert assert_as_observed(model, image(), 2, unordered) == 2


def test_a_model_without_masks_copies_nothing() -> None:
    model = MICRO["bottleneck"].build()
    found = figures(prepared(model, image(), ()))
    assert (found.slices, found.gathers, found.copies, found.copied_bytes) == (0, 0, 0, 0)
    assert found.parameters == sum(p.numel() for p in model.parameters())
