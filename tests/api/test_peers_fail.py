"""U-1b: every operator that UPSCALE (Wan et al., ICML 2023) gets silently wrong or refuses, and what users ask for.

Here each is exact, and what can shrink does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import chanopt
from tests.support.equal import assert_same_function
from tests.support.masks import mask_randomly
from tests.support.micro import MICRO
from tests.support.nets.base import Net, conv, image, randomise
from tests.support.passes import kill

TOL = 1e-10


@dataclass(frozen=True)
class Case:
    """A net, the input columns that are masked, and the shapes of parameters afterwards."""

    net: str
    masked: dict[str, list[int]]
    shapes: dict[str, tuple[int, ...]]
    refused: tuple[str, ...] = ()


# What UPSCALE computes wrongly without an error.
SILENT: dict[str, Case] = {
    "group norm between convs": Case(
        "group_norm_4", {"3": [0, 1, 2]}, {"0.weight": (6, 3, 3, 3), "3.weight": (6, 5, 1, 1)}
    ),
    "softmax over channels": Case(
        "softmax_channels", {"b": [0, 5]}, {"a.weight": (8, 3, 3, 3), "b.weight": (6, 6, 1, 1)}
    ),
    "local response norm": Case(
        "local_response_norm", {"3": [0, 5]}, {"0.weight": (8, 3, 3, 3), "3.weight": (6, 6, 1, 1)}
    ),
    "product with the channel mean": Case(
        "channel_mean_product", {"b": [0, 5]}, {"a.weight": (8, 3, 3, 3), "b.weight": (6, 6, 1, 1)}
    ),
    "depthwise conv with multiplier 2": Case(
        "depthwise_2", {"4": [0, 1, 6, 7]}, {"0.weight": (6, 3, 1, 1), "2.weight": (12, 1, 3, 3)}
    ),
}

# What UPSCALE raises on.
RAISES: dict[str, Case] = {
    "grouped conv": Case("grouped_2", {"4": [0, 4]}, {"2.weight": (6, 4, 3, 3), "4.weight": (6, 6, 1, 1)}),
    "chunk": Case("chunk_two", {"b": [0, 1], "c": [5]}, {"a.weight": (9, 3, 3, 3), "b.weight": (6, 4, 3, 3)}),
    "split": Case("split_sizes", {"b": [0], "c": [5]}, {"a.weight": (10, 3, 3, 3), "b.weight": (6, 5, 3, 3)}),
    "slices for two consumers": Case("slices", {"b": [1], "c": [0, 7]}, {"a.weight": (9, 3, 3, 3)}),
    "hardswish": Case("hardswish", {"2": [0, 1, 4]}, {"0.weight": (5, 3, 3, 3)}),
    "instance norm": Case("instance_norm", {"3": [0, 1, 4]}, {"0.weight": (5, 3, 3, 3), "1.weight": (5,)}),
    "layer norm": Case("layer_norm_channels", {"b": [0, 1]}, {"a.weight": (8, 3, 3, 3), "b.weight": (6, 6, 1, 1)}),
    "pixel shuffle": Case("pixel_shuffle", {"3": [1]}, {"0.weight": (12, 3, 3, 3), "3.weight": (6, 3, 3, 3)}),
    "a conv used twice": Case("conv_twice", {}, {}),
    "a conv on two branches": Case("conv_two_branches", {}, {}),
    "linear after flatten": Case("flatten_many", {}, {}),
    "a tensor that is output and consumed": Case(
        "returned_and_read", {"b": [0, 3]}, {"a.weight": (8, 3, 3, 3), "b.weight": (6, 6, 1, 1)}
    ),
}

# Section 6 item 5 of the survey: what users of the other tools report.
ASKED: dict[str, Case] = {
    "cat([x, x])": Case("cat_self", {"c": [0, 6, 2, 9]}, {"a.weight": (5, 3, 3, 3), "c.weight": (6, 8, 3, 3)}),
    "C2f": Case("c2f", {}, {}),
    "channel shuffle": Case("channel_shuffle", {"b": [0, 1]}, {"a.weight": (10, 3, 3, 3)}),
    "pixel unshuffle": Case("pixel_unshuffle", {"3": [0, 1, 2, 3]}, {"0.weight": (3, 3, 3, 3)}),
    "squeeze and excite": Case("squeeze_excite", {}, {}),
    "depthwise": Case("depthwise_1", {"4": [0, 1, 7]}, {"0.weight": (5, 3, 1, 1), "2.weight": (5, 1, 3, 3)}),
    "one output channel": Case("one_output_channel", {}, {}),
    "dead branch": Case("dead_branch", {}, {}),
    "dict output": Case("dict_output", {"b": [0, 1], "c": [1, 2]}, {"a.weight": (7, 3, 3, 3)}),
    "tuple output": Case("tuple_output", {"b": [0, 1], "c": [0, 1]}, {"a.weight": (6, 3, 3, 3)}),
    "bare parameter scale": Case("layer_scale", {}, {}),
    "beta with padding": Case("batch_norm_beta_border", {"2": [0, 3]}, {"0.weight": (6, 3, 3, 3)}),
    "layer norm over C, H, W": Case("layer_norm_chw", {}, {}),
    "x + 1": Case("add_one", {}, {}),
    "transposed conv": Case("transposed", {}, {}),
    "argmax over channels": Case("argmax_hidden", {"b": [0, 1]}, {"a.weight": (8, 3, 3, 3)}),
    "attention": Case("attention", {}, {}),
}


def check(case: Case) -> None:
    micro = MICRO[case.net]
    net = micro.build().double()
    for name, lost in case.masked.items():
        kill(net.get_submodule(name), inputs=lost)
    if not case.masked:
        mask_randomly(net, 1, side="input")
    fast = chanopt.optimize(net, micro.inputs(2, torch.float64, 0))
    shapes = {name: tuple(fast.get_parameter(name).shape) for name in case.shapes}
    assert shapes == case.shapes, chanopt.explain(fast)
    assert_same_function(net, fast, micro.inputs(3, torch.float64, 5), TOL)


@pytest.mark.parametrize("name", SILENT)
def test_u_1b_silently_wrong_elsewhere(name: str) -> None:
    check(SILENT[name])


@pytest.mark.parametrize("name", RAISES)
def test_u_1b_raises_elsewhere(name: str) -> None:
    check(RAISES[name])


@pytest.mark.parametrize("name", ASKED)
def test_asked_for_elsewhere(name: str) -> None:
    check(ASKED[name])


def three() -> Any:
    return (
        randomise(
            Net(
                lambda n, x: n.d(n.a(x).relu() + n.b(x).relu()),
                a=conv(3, 8, 3),
                b=conv(3, 8, 3),
                d=conv(8, 6),
            )
        )
        .eval()
        .double()
    )


def double_image(seed: int) -> tuple[Any, ...]:
    return image()(3, torch.float64, seed)


def test_u_1b_output_masks_on_a_chain() -> None:
    net: Any = randomise(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6))).eval().double()
    kill(net[0], outputs=[1, 6])
    fast = chanopt.optimize(net, double_image(0))
    assert fast.get_parameter("0.weight").shape == (6, 3, 1, 1)
    assert_same_function(net, fast, double_image(1), TOL)


def test_u_1b_output_masks_that_disagree_at_a_join() -> None:
    """Zero in a but not in b: the sum has the channel; zero in both: it goes. Each producer computes what it has."""
    net = three()
    kill(net.a, outputs=[0, 1, 2])
    kill(net.b, outputs=[2, 3, 4])
    fast = chanopt.optimize(net, double_image(0))
    assert fast.get_parameter("d.weight").shape[1] == 7
    assert_same_function(net, fast, double_image(1), TOL)


def test_u_1b_a_consumer_whose_inputs_are_all_masked() -> None:
    net = three()
    kill(net.d, inputs=range(8))
    fast = chanopt.optimize(net, double_image(0))
    assert fast.get_parameter("d.weight").shape == (6, 1, 1, 1)
    assert_same_function(net, fast, double_image(1), TOL, allow_constant=True)


def test_u_1b_linear_after_flatten_with_one_channel_masked() -> None:
    net: Any = randomise(nn.Sequential(conv(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))).eval().double()
    kill(net[3], inputs=range(128, 192))
    fast = chanopt.optimize(net, double_image(0))
    assert fast.get_parameter("0.weight").shape == (7, 3, 3, 3)
    assert fast.get_parameter("3.weight").shape == (5, 448)
    assert_same_function(net, fast, double_image(1), TOL)


@pytest.mark.parametrize("name", ["conv_twice", "conv_two_branches", "shared_head", "tied_weights"])
def test_u_1b_a_shared_weight_is_cut_for_each_user(name: str) -> None:
    net = MICRO[name].build().double()
    mask_randomly(net, 7, mode="uniform")
    fast = chanopt.optimize(net, MICRO[name].inputs(2, torch.float64, 0))
    assert_same_function(net, fast, MICRO[name].inputs(3, torch.float64, 3), TOL, allow_constant="some")
