"""PoolChannelsLast, case by case (the numbers are those of its docstring)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chanopt.errors import PassError
from chanopt.frontend import RULES, capture, lower_captured
from chanopt.ir import Kind, Program
from chanopt.pass_infra import checked
from chanopt.passes import OrderChannels, PoolChannelsLast
from tests.support.masks import mask_randomly
from tests.support.nets.base import Net, conv, image, randomise
from tests.support.passes import assert_leaves, assert_rewrites, kill, passes_before, prepared

MAX, AVERAGE, CLONE = "aten.max_pool2d.default", "aten.avg_pool2d.default", "aten.clone.default"


def pooled(pool: Callable[[Tensor], Tensor], channels: int = 16) -> Any:
    return randomise(Net(lambda n, x: n.b(pool(n.a(x).relu())), a=conv(3, channels, 3), b=conv(channels, 4))).eval()


def single(model: nn.Module, dtype: torch.dtype = torch.float32) -> Program:
    """Lowered as it is: average pools are quicker in float32 alone."""
    return lower_captured(capture(model.to(dtype), image()(2, dtype, 0)), RULES, strict=True)


# -- it fires ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stride": 1, "padding": 1}, {"dilation": 2}, {"ceil_mode": True}], ids=str)
def test_case_1_a_maximum_pool_stands_between_two_copies(options: dict[str, Any]) -> None:
    net = pooled(lambda t: F.max_pool2d(t, 3, **options))

    def wrapped(program: Program) -> bool:
        into, pool, out = (op for op in program.ops if op.target in (CLONE, MAX))
        formats = [dict(op.kwargs)["memory_format"] for op in (into, out)]
        return (
            [into.target, pool.target, out.target] == [CLONE, MAX, CLONE]
            and formats == [torch.channels_last, torch.contiguous_format]
            and {op.kind for op in (into, pool, out)} == {Kind.MAP}
            and (pool.reads[0].value, out.reads[0].value) == (into.result, pool.result)
        )

    assert_rewrites(PoolChannelsLast(), net, image(), expect=wrapped)


def test_case_1_an_average_pool_in_float32() -> None:
    program = single(pooled(lambda t: F.avg_pool2d(t, 2)))
    with checked():
        after = PoolChannelsLast()(program).program
        assert not PoolChannelsLast()(after).modified
    assert [op.target for op in after.ops].count(CLONE) == 2
    x = image()(3, torch.float32, 1)
    assert torch.allclose(after.to_module()(*x), program.to_module()(*x), atol=1e-6)


def test_case_1_the_emitted_pool_runs_channels_last_and_gives_back_contiguous_tensors() -> None:
    net = randomise(nn.Sequential(conv(3, 16, 3), nn.MaxPool2d(2))).eval()
    module: Any = PoolChannelsLast()(single(net)).program.to_module()
    seen: dict[str, bool] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            made = super().run_node(n)
            if n.target is torch.ops.aten.max_pool2d.default:
                seen["last"] = made.is_contiguous(memory_format=torch.channels_last)
            return made

    out = Watch(module).run(*image()(2, torch.float32, 0))
    assert seen == {"last": True}
    assert torch.utils._pytree.tree_leaves(out)[0].is_contiguous()


@pytest.mark.parametrize(("least", "times"), [(16, 2), (17, 0), (1, 2)])
def test_least_channels_counts_live_channels(least: int, times: int) -> None:
    """Of 20 channels 16 are live."""
    net = pooled(lambda t: F.max_pool2d(t, 2), channels=20)
    kill(net.b, inputs=[0, 1, 2, 3])
    program = prepared(net, image(), passes_before(PoolChannelsLast))
    found = PoolChannelsLast(least_channels=least)(program).program
    assert [op.target for op in found.ops].count(CLONE) == times


# -- it leaves alone --------------------------------------------------------------------------------------------------

LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "no pool": lambda t: t,
    "an average pool in float64": lambda t: F.avg_pool2d(t, 2),
    "an adaptive pool": lambda t: F.adaptive_max_pool2d(t, 2),
    "a pool over one axis": lambda t: F.max_pool1d(t.flatten(2), 4, 4).unflatten(2, (4, 4)),
    "a pool of a tensor without a batch": lambda t: F.max_pool2d(t[0], 2).unsqueeze(0),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves(name: str) -> None:
    assert_leaves(PoolChannelsLast(), pooled(LEFT[name]), image())


def test_leaves_few_channels() -> None:
    assert_leaves(PoolChannelsLast(), pooled(lambda t: F.max_pool2d(t, 2), channels=15), image())


def test_leaves_other_devices_and_programs_that_are_channels_last() -> None:
    program = single(pooled(lambda t: F.max_pool2d(t, 2)))
    assert PoolChannelsLast()(program).modified
    for other in (replace(program, target="cuda"), replace(program, channels_last=True)):
        assert PoolChannelsLast()(other).program is other


# -- it refuses -------------------------------------------------------------------------------------------------------


def test_checked_mode_refuses_to_build_on_a_program_that_breaks_a_rule() -> None:
    program = single(pooled(lambda t: F.max_pool2d(t, 2)))
    broken = replace(program, ops=program.ops[:-1])
    with checked(), pytest.raises(PassError, match="pass pool_channels_last broke a rule of the IR: rule 2"):
        PoolChannelsLast()(broken)


# -- it means the same ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["uniform", "dead_layers", "slimming"])
def test_means_the_same_on_masked_nets_in_any_order_of_channels(mode: Any) -> None:
    def body(n: Net, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = n.a(x)
        u = F.max_pool2d(t, 2)
        return n.b(u), n.c(t), n.d(u)

    net: Any = randomise(Net(body, a=conv(3, 40, 3), b=conv(40, 4), c=conv(40, 4, 3), d=conv(40, 4))).eval()
    mask_randomly(net, 3, mode=mode, side="input", amount=0.3)
    ready = (*passes_before(OrderChannels), OrderChannels())
    assert_rewrites(PoolChannelsLast(), net, image(), before=ready, allow_constant=True)
