"""DropDead, case by case (the numbers are those of its docstring)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chanopt.errors import PassError
from chanopt.ir import Form, Kind, Program
from chanopt.pass_infra import checked
from chanopt.passes import DropDead, FoldAffine, FoldConstants
from tests.support.masks import MODES, mask_randomly
from tests.support.micro import MICRO
from tests.support.nets.base import Net, conv, image, randomise
from tests.support.passes import assert_leaves, assert_rewrites, kill, layer, of_kind, prepared, width


def chain(**options: Any) -> Any:
    return randomise(
        Net(
            lambda n, x: n.c(n.b(n.a(x).relu()).relu()),
            a=conv(3, 8, 3),
            b=conv(8, 8, 3, **options),
            c=conv(8, 6),
        )
    ).eval()


def residual_chain() -> Any:
    """A stream that is read, grown by an add, read again, and grown once more."""

    def body(n: Net, x: Tensor) -> Tensor:
        first = n.a(x)
        second = first + n.b(first.relu())
        third = second + n.c(second.relu())
        return n.d(third.relu())

    return randomise(Net(body, a=conv(3, 8, 3), b=conv(8, 8, 3), c=conv(8, 8, 3), d=conv(8, 6))).eval()


# -- it fires ---------------------------------------------------------------------------------------------------------


def test_case_1_a_channel_without_a_reader_goes_with_its_row() -> None:
    net = chain()
    kill(net.b, inputs=[1, 2, 7])
    result = assert_rewrites(DropDead(), net, image(), widths={"a": (3, 5), "b": (5, 8), "c": (8, 6)})
    assert result.figures["parameters"] == (862, 862 - 3 * (27 + 1) - 3 * 8 * 9)


def test_case_1_maps_in_between_lose_the_channel_too() -> None:
    net = randomise(nn.Sequential(conv(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6))).eval()
    kill(net[4], inputs=[0, 4, 5])
    result = assert_rewrites(DropDead(), net, image())
    module = result.program.to_module()
    assert {name: tuple(p.shape) for name, p in module.named_parameters() if name[0] == "2"} == {
        "2.weight": (5,),
        "2.bias": (5,),
    }
    assert module.get_buffer("2.running_var").shape == (5,)


def test_case_1_a_residual_chain_shrinks_along_its_way() -> None:
    """Demand is per value: what only early readers need, later producers do not make."""
    net = residual_chain()
    kill(net.d, inputs=[0, 1, 2, 3, 4, 5])
    kill(net.c, inputs=[0, 1, 2])
    result = assert_rewrites(DropDead(), net, image(), widths={"a": (3, 8), "b": (8, 5), "c": (5, 2), "d": (2, 6)})
    assert result.figures["channels"][0] > result.figures["channels"][1]


def test_case_2_a_mix_takes_only_columns_in_which_a_live_row_has_a_weight() -> None:
    """Columns 3 and 4 of b are used by rows that nobody reads: they go once those rows have gone."""
    net = chain()
    with torch.no_grad():
        net.b.weight[2:, 3:5] = 0
    kill(net.c, inputs=[0, 1])
    assert_rewrites(DropDead(), net, image(), widths={"a": (3, 6), "b": (6, 6), "c": (6, 6)})


def test_case_3_a_concat_loses_an_operand_that_gives_nothing() -> None:
    net = MICRO["cat_two"].build()
    kill(net.c, inputs=range(8, 12))
    result = assert_rewrites(
        DropDead(), net, image(), widths={"a": (3, 8), "b": (0, 0), "c": (8, 6)}, targets={"aten.cat.default": 1}
    )
    (cat,) = of_kind(result.program, Kind.CONCAT)
    assert len(cat.reads) == 1
    assert "cat" not in str(result.program.to_module().graph)


def test_case_4_ops_go_that_nobody_needs_back_to_the_input() -> None:
    def body(n: Net, x: Tensor) -> Tensor:
        return n.d(torch.cat([n.a(x).relu(), n.c(n.b(x).relu()).sigmoid()], 1))

    net = randomise(Net(body, a=conv(3, 8, 3), b=conv(3, 8, 3), c=conv(8, 4), d=conv(12, 6))).eval()
    kill(net.d, inputs=range(8, 12))
    widths = {"a": (3, 8), "b": (0, 0), "c": (0, 0), "d": (8, 6)}
    assert_rewrites(
        DropDead(), net, image(), widths=widths, targets={"aten.relu.default": 1, "aten.sigmoid.default": 0}
    )


@pytest.mark.parametrize(("lost", "left"), [(range(8), 1), (range(7), 1), (range(1, 8), 1)])
def test_a_layer_keeps_one_input_for_its_batch_and_size(lost: range, left: int) -> None:
    net = chain()
    kill(net.b, inputs=lost)
    assert_rewrites(DropDead(), net, image(), widths={"a": (3, left), "b": (left, 8)}, allow_constant=len(lost) == 8)


def test_groups_keep_equally_many_channels() -> None:
    """Group 0 needs 3 of 4, group 1 needs 1: both keep 3, or the conv could not stay one conv."""
    net = chain(groups=2)
    kill(net.c, inputs=[0, 4, 5, 6])
    assert_rewrites(DropDead(), net, image(), widths={"b": (8, 6), "c": (4, 6)})


def test_a_dead_group_goes_whole() -> None:
    net = chain(groups=2)
    kill(net.c, inputs=[4, 5, 6, 7])
    result = assert_rewrites(DropDead(), net, image(), widths={"a": (3, 4), "b": (4, 4), "c": (4, 6)})
    convs = [n for n in result.program.to_module().graph.nodes if n.target is torch.ops.aten.conv2d.default]
    assert [node.args[-1] for node in convs] == [1, 1, 1]


def test_a_depthwise_conv_loses_channels_as_a_map_does() -> None:
    net = MICRO["depthwise_2"].build()
    kill(net[4], inputs=[0, 1, 5, 9])
    result = assert_rewrites(DropDead(), net, image())
    assert width(result.program, "0") == (3, 7)


def test_results_of_a_depthwise_multiplier_go_in_whole_blocks() -> None:
    """Channel 7 has nobody, but 6 has: to compute it costs less than to copy all others."""
    net = MICRO["depthwise_2"].build()
    kill(net[4], inputs=[0, 1, 7])
    program = assert_rewrites(DropDead(), net, image(), widths={"0": (3, 7), "4": (13, 6)}).program
    assert len(layer(program, "2").reads[0].index) == 16
    assert width(program, "2") == (7, 14)


def test_flattened_channels_go_in_whole_blocks() -> None:
    """Channel 2 is 64 columns of the linear layer; channel 3 loses all but one of its columns, and so stays."""
    net = randomise(nn.Sequential(conv(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))).eval()
    kill(net[3], inputs=[*range(128, 192), *range(193, 256)])
    assert_rewrites(DropDead(), net, image(), widths={"0": (3, 7), "3": (385, 5)})


def test_group_norm_keeps_whole_groups() -> None:
    net = MICRO["group_norm_4"].build()
    kill(net[3], inputs=[0, 2, 3])
    assert_rewrites(DropDead(), net, image(), widths={"0": (3, 6), "3": (5, 6)})


def test_reads_of_less_than_a_value_has_are_ranges_or_gathers() -> None:
    def body(n: Net, x: Tensor) -> tuple[Tensor, ...]:
        t = n.a(x).relu()
        return n.b(t), n.c(t), n.d(t)

    net = randomise(Net(body, a=conv(3, 8, 3), b=conv(8, 6), c=conv(8, 6), d=conv(8, 6))).eval()
    kill(net.b, inputs=[6, 7])
    kill(net.c, inputs=[0, 3])
    forms = {"b": Form.RANGE, "c": Form.GATHER, "d": Form.WHOLE}
    assert_rewrites(DropDead(), net, image(), widths={"b": (6, 6), "c": (6, 6), "d": (8, 6)}, forms=forms)


# -- it leaves alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["two_convs", "batch_norm", "residual_post", "dense_block", "identity", "one_conv", "attention"]
)
def test_leaves_a_model_without_dead_channels(name: str) -> None:
    assert_leaves(DropDead(), MICRO[name].build(), MICRO[name].inputs)


def test_leaves_channels_of_the_output() -> None:
    net = chain()
    kill(net.c, outputs=[0, 1])
    assert_leaves(DropDead(), net, image())


def test_leaves_a_dead_row_that_someone_reads() -> None:
    """A zero row is a constant, not a channel nobody needs: that is for FoldConstants."""
    net = chain()
    kill(net.a, outputs=[3], bias=0.5)
    assert_leaves(DropDead(), net, image())


def test_leaves_the_operands_of_what_it_does_not_know() -> None:
    net = MICRO["sort_channels"].build()
    kill(net.b, inputs=[0, 1])
    result = assert_rewrites(DropDead(), net, image(), widths={"a": (3, 8), "b": (6, 6)})
    assert [refusal.op for refusal in result.program.refusals] == ["aten.sort.default"]


# -- it refuses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Idle(DropDead):
    """Promises what DropDead does and does nothing."""

    name = "idle"

    def apply(self, program: Program) -> Program:
        return program


def test_checked_mode_refuses_a_result_with_dead_channels() -> None:
    net = chain()
    kill(net.b, inputs=[1, 2, 7])
    program = prepared(net, image())
    assert not Idle()(program).modified
    with (
        checked(),
        pytest.raises(PassError, match=r"pass idle guaranteed that only demanded .* channels 1:3,7 of %conv2d"),
    ):
        Idle()(program)


# -- it means the same ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_means_the_same(mode: Any) -> None:
    net = MICRO["shufflenet"].build()
    mask_randomly(net, 3, mode=mode, amount=0.4)
    assert_rewrites(DropDead(), net, image(), before=(FoldAffine(), FoldConstants()), allow_constant=True)
