"""FoldConstants, case by case (the numbers are those of its docstring)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chanopt.analysis.constants import constants
from chanopt.analysis.weights import used
from chanopt.errors import IRError, PassError
from chanopt.ir import Program, parse
from chanopt.pass_infra import checked
from chanopt.passes import DropDead, FoldAffine, FoldConstants
from chanopt.passes.fold_constants import carriers
from tests.support.equal import assert_same_function
from tests.support.masks import mask_randomly
from tests.support.micro import MICRO
from tests.support.nets.base import Net, conv, image, randomise, tensors
from tests.support.passes import assert_leaves, assert_rewrites, kill, layer, prepared
from tests.support.random_nets import random_net

SIZES = ((5, 5), (8, 8), (9, 6), (3, 12), (1, 1), (2, 7))
"""Heights and widths on which a rewrite at a border must hold: also those that are nothing but border."""


def pair(kernel: int, **options: Any) -> Any:
    """a, ReLU, b."""
    return randomise(Net(lambda n, x: n.b(n.a(x).relu()), a=conv(3, 8, 3), b=conv(8, 6, kernel, **options))).eval()


def weighted(program: Program, name: str) -> list[int]:
    """The operand channels for which a layer has weights."""
    op = layer(program, name)
    table = used(op, program)
    per_group = table.reshape(op.groups, -1, table.shape[1]).any(1).reshape(-1)
    return np.flatnonzero(per_group).tolist()


def assert_any_size(net: nn.Module, program: Program, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
    """The rewritten graph computes the same on other heights and widths than it was captured for."""
    module = program.to_module()
    for number, (height, wide) in enumerate(sizes):
        assert_same_function(net, module, tensors((3, height, wide))(2, torch.float64, number), tol=1e-10)


# -- it fires ---------------------------------------------------------------------------------------------------------


def test_case_1_without_a_border_constants_go_into_the_bias() -> None:
    net = pair(1)
    kill(net.a, outputs=[2, 5], bias=0.7)
    result = assert_rewrites(FoldConstants(), net, image(), expect=lambda p: weighted(p, "b") == [0, 1, 3, 4, 6, 7])
    before, after = net.b.bias.double(), result.program.weights["b.bias"]
    moved = 0.7 * net.b.weight.double()[:, [2, 5], 0, 0].sum(1)
    # the constant passes through float32 weights: 0.7 is not exactly 0.7 there
    torch.testing.assert_close(after, before + moved, rtol=1e-6, atol=1e-7)


def test_case_1_an_unpadded_kernel_has_no_border() -> None:
    net = pair(3, padding=0)
    kill(net.a, outputs=[2, 5], bias=0.7)
    result = assert_rewrites(FoldConstants(), net, image(), expect=lambda p: len(weighted(p, "b")) == 6)
    assert_any_size(net, result.program, ((5, 5), (9, 6), (3, 12)))


def test_case_1_a_layer_without_a_bias_gets_one() -> None:
    net = pair(1, bias=False)
    kill(net.a, outputs=[2], bias=0.7)
    result = assert_rewrites(FoldConstants(), net, image())
    assert result.program.to_module().get_parameter("b.bias").shape == (6,)


def test_case_1_a_linear_layer_behind_a_flatten() -> None:
    net = randomise(nn.Sequential(conv(3, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(256, 5))).eval()
    kill(net[0], outputs=[1], bias=None)
    assert_rewrites(FoldConstants(), net, image(), expect=lambda p: len(weighted(p, "3")) == 192)


def test_case_1_a_grouped_conv_without_a_border() -> None:
    net = pair(1, groups=2)
    kill(net.a, outputs=[1, 6], bias=0.4)
    assert_rewrites(FoldConstants(), net, image(), expect=lambda p: weighted(p, "b") == [0, 2, 3, 4, 5, 7])


def test_case_2_a_zero_channel_needs_no_carrier_at_a_border() -> None:
    net = pair(3)
    kill(net.a, outputs=[2, 5], bias=-0.3)  # ReLU makes it 0
    result = assert_rewrites(FoldConstants(), net, image(), expect=lambda p: len(weighted(p, "b")) == 6)
    assert torch.equal(result.program.weights["b.bias"], net.b.bias.double())
    assert_any_size(net, result.program)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"padding": 3},
        {"padding": "same"},
        {"padding": (0, 2)},
    ],
    ids=str,
)
def test_case_3_one_carrier_is_exact_at_the_border_for_every_height_and_width(options: dict[str, Any]) -> None:
    net = pair(3, **options)
    kill(net.a, outputs=[2, 5, 6])
    with torch.no_grad():
        net.a.bias[[2, 5, 6]] = torch.tensor([0.3, 0.9, 0.5])
    result = assert_rewrites(FoldConstants(), net, image(), expect=lambda p: weighted(p, "b") == [0, 1, 3, 4, 5, 7])
    sizes = SIZES if options.get("padding") != (0, 2) and not options.get("dilation") else ((5, 5), (9, 6), (5, 12))
    assert_any_size(net, result.program, sizes)


def test_case_3_the_carrier_is_the_constant_of_greatest_magnitude() -> None:
    net = Net(lambda n, x: n.b(n.a(x)), a=conv(3, 8, 3), b=conv(8, 6, 3))
    net = randomise(net).eval()
    kill(net.a, outputs=[2, 5, 6])
    with torch.no_grad():
        net.a.bias[[2, 5, 6]] = torch.tensor([0.3, -0.9, 0.5])
    program = prepared(net, image())
    assert carriers(program, constants(program)) == {program.ops[2].result: 5}
    assert_rewrites(FoldConstants(), net, image(), expect=lambda p: weighted(p, "b") == [0, 1, 3, 4, 5, 7])


def test_case_3_readers_of_a_value_share_its_carrier() -> None:
    def body(n: Net, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = n.a(x)
        return n.b(t), n.c(t), n.d(t)

    net: Any = randomise(Net(body, a=conv(3, 8, 3), b=conv(8, 6, 3), c=conv(8, 5, 5), d=conv(8, 4))).eval()
    kill(net.a, outputs=[1, 4, 7])
    with torch.no_grad():
        net.a.bias[[1, 4, 7]] = torch.tensor([0.3, -0.9, 0.5])

    def shared(program: Program) -> bool:
        return weighted(program, "b") == weighted(program, "c") == [0, 2, 3, 4, 5, 6] and 4 not in weighted(
            program, "d"
        )

    result = assert_rewrites(FoldConstants(), net, image(), expect=shared)
    assert_any_size(net, result.program)
    cut = assert_rewrites(DropDead(), net, image(), before=(FoldConstants(),), widths={"a": (3, 6)})
    assert_any_size(net, cut.program)


def test_case_3_a_constant_between_two_borders() -> None:
    """A conv whose row is zero but whose bias is not makes a constant that the next padded conv sees."""
    net: Any = randomise(nn.Sequential(conv(3, 8, 3), conv(8, 8, 3), nn.Sigmoid(), conv(8, 6, 3))).eval()
    kill(net[0], outputs=[0, 1], bias=0.6)
    kill(net[1], outputs=[2, 3, 4], bias=None)
    result = assert_rewrites(FoldConstants(), net, image())
    assert_any_size(net, result.program)


def test_case_3_a_transposed_conv_has_a_border_everywhere() -> None:
    net: Any = randomise(
        nn.Sequential(conv(3, 8, 3), nn.Sigmoid(), nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1))
    ).eval()
    kill(net[0], outputs=[0, 3, 4], bias=0.6)
    result = assert_rewrites(FoldConstants(), net, image(), expect=lambda p: len(weighted(p, "2")) == 6)
    assert_any_size(net, result.program)


def test_constants_pass_through_batch_norm_activations_pools_and_joins() -> None:
    def body(n: Net, x: Tensor) -> Tensor:
        left = n.norm(n.a(x)).sigmoid()
        right = torch.nn.functional.avg_pool2d(n.b(x), 3, 1, 1, count_include_pad=False).tanh()
        return n.c(left * 2 + right)

    net: Any = randomise(Net(body, a=conv(3, 8, 3), norm=nn.BatchNorm2d(8), b=conv(3, 8), c=conv(8, 6))).eval()
    kill(net.a, outputs=[0, 1, 2], bias=None)
    kill(net.b, outputs=[1, 2, 3], bias=None)
    assert_rewrites(FoldConstants(), net, image(), expect=lambda p: weighted(p, "c") == [0, 3, 4, 5, 6, 7])


def test_case_4_a_dead_branch_becomes_a_parameter() -> None:
    net = MICRO["add_both_read"].build()
    kill(net.b, outputs=range(8), bias=None)
    program = assert_rewrites(FoldConstants(), net, image(), allow_constant=True).program
    (added,) = [op for op in program.ops if op.target == "aten.add.Tensor"]
    assert [param.name for param in added.params] == ["constant"]
    assert added.params[0].buffer
    net = MICRO["residual_downsample"].build()
    kill(net.short, outputs=range(12), bias=None)
    folded = assert_rewrites(FoldAffine(), net, image(), before=(FoldConstants(),), targets={"aten.add.Tensor": 0})
    assert not any(op.layer == "short" for op in DropDead()(folded.program).program.ops)


def test_case_5_adding_nothing_goes() -> None:
    net = MICRO["residual_downsample"].build()
    kill(net.short, outputs=range(12))
    program = assert_rewrites(FoldConstants(), net, image(), targets={"aten.add.Tensor": 0}).program
    assert "constant" not in program.weights


def test_case_5_a_wholly_dead_residual_block_disappears() -> None:
    net = MICRO["residual_post"].build()
    with torch.no_grad():
        net[2].bn2.weight.zero_()
        net[2].bn2.bias.zero_()
    before = (FoldAffine(), FoldConstants(), FoldAffine())
    program = assert_rewrites(DropDead(), net, image(), before=before).program
    assert not any(op.layer.startswith("2.") for op in program.ops)


def test_folding_exposes_more_to_fold() -> None:
    """Only constants were left to add up in the second layer: its rows are constants in turn."""
    net: Any = randomise(nn.Sequential(conv(3, 8), nn.Sigmoid(), conv(8, 8), nn.Sigmoid(), conv(8, 6))).eval()
    kill(net[0], outputs=[0, 1, 2, 3], bias=None)
    kill(net[2], inputs=[4, 5, 6, 7])
    with torch.no_grad():
        net[2].weight[:4, 4:] = 1.0
    assert_rewrites(FoldConstants(), net, image(), expect=lambda p: weighted(p, "4") == [0, 1, 2, 3])


# -- it leaves alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two_convs", "dense_block", "grouped_2", "attention", "identity"])
def test_leaves_a_model_without_constants(name: str) -> None:
    assert_leaves(FoldConstants(), MICRO[name].build(), MICRO[name].inputs)


def test_leaves_the_only_constant_at_a_border() -> None:
    """It is its own carrier."""
    net = pair(3)
    kill(net.a, outputs=[4], bias=0.7)
    assert_leaves(FoldConstants(), net, image())


def test_leaves_constants_that_a_padded_grouped_conv_reads() -> None:
    net = pair(3, groups=2)
    kill(net.a, outputs=[0, 1], bias=0.7)
    assert_leaves(FoldConstants(), net, image())


def test_leaves_what_only_the_border_makes_uneven() -> None:
    """A padded average of a constant is not one."""
    net: Any = randomise(nn.Sequential(conv(3, 8, 3), nn.AvgPool2d(3, 1, 1), nn.Sigmoid(), conv(8, 6))).eval()
    kill(net[0], outputs=[0, 1], bias=0.7)
    assert_leaves(FoldConstants(), net, image())


def test_leaves_constants_that_a_statistic_reads() -> None:
    net = MICRO["group_norm_2"].build()
    kill(net[0], outputs=[0, 1], bias=0.7)
    assert_leaves(FoldConstants(), net, image())


# -- it refuses -------------------------------------------------------------------------------------------------------


def test_refuses_a_program_that_is_only_text() -> None:
    program = parse(str(prepared(pair(1), image())))
    with pytest.raises(
        IRError, match=r"expected a program with a dialect, found one parsed from text alone; see Program\.bind"
    ):
        FoldConstants()(program)


@dataclass(frozen=True)
class Idle(FoldConstants):
    """Promises what FoldConstants does and does nothing."""

    name = "idle"

    def apply(self, program: Program) -> Program:
        return program


def test_checked_mode_refuses_a_result_that_still_has_weights_for_constants() -> None:
    net = pair(1)
    kill(net.a, outputs=[2, 5], bias=0.7)
    with (
        checked(),
        pytest.raises(
            PassError, match=r"idle guaranteed that constant channels .* found constant channels 2,5 read by b"
        ),
    ):
        Idle()(prepared(net, image()))


# -- it means the same ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["uniform", "dead_layers", "slimming"])
@pytest.mark.parametrize("seed", [5, 17])
def test_means_the_same_on_random_nets(seed: int, mode: Any) -> None:
    net, inputs = random_net(seed)
    mask_randomly(net, seed, mode=mode, side="output", keep_bias=True)
    assert_rewrites(FoldConstants(), net, inputs, before=(FoldAffine(),), allow_constant=True)
