"""Demand, against an interpreter: what nobody needs may be noise, what is needed matters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chanopt.analysis.demand import demand, rounded
from chanopt.ir import Kind, Op, Program
from tests.support.masks import mask_randomly
from tests.support.micro import MICRO
from tests.support.nets.base import Inputs, Net, conv, image, randomise
from tests.support.passes import kill, layer, lowered, run_from, run_program, sink_values
from tests.support.random_nets import random_net

NETS = (
    "bottleneck",
    "residual_pre",
    "dense_block",
    "c2f",
    "shufflenet",
    "add_flip",
    "cat_self",
    "cat_straddle",
    "grouped_chain",
    "depthwise_2",
    "group_norm_2",
    "softmax_channels",
    "channel_mean_product",
    "pixel_shuffle",
    "pixel_unshuffle",
    "flatten_many",
    "squeeze_excite_linear",
    "conv_twice",
    "transposed",
    "attention",
    "tuple_output",
)


def returned(program: Program, made: dict[str, Tensor]) -> list[Tensor]:
    return [made[name] for name in sink_values(program)]


def rerun(program: Program, made: dict[str, Tensor], name: str, changed: Tensor) -> list[Tensor]:
    """The outputs with one value replaced; what was made before it stays."""
    names = [op.result for op in program.ops]
    before = {key: made[key] for key in names[: names.index(name)] if key}
    return returned(program, run_from(program, {**before, name: changed}))


def noised(value: Tensor, axis: int, channels: np.ndarray) -> Tensor:
    """The value with noise in some channels."""
    changed = value.clone()
    where = torch.from_numpy(channels)
    changed.index_copy_(axis, where, torch.randn_like(changed.index_select(axis, where)) * 3 + 1)
    return changed


def assert_sound(model: nn.Module, inputs: Inputs) -> int:
    """Noise in all channels of a value that are not demanded leaves every output as it is, bit for bit."""
    program = lowered(model, inputs)
    wanted = demand(program)
    made = run_program(program, inputs(2, torch.float64, 3))
    expected, tried = returned(program, made), 0
    for name, live in wanted.live.items():
        dead = np.flatnonzero(~live)
        if not len(dead) or not made[name].is_floating_point():
            continue
        axis = program.values[name].axis
        assert axis is not None
        found = rerun(program, made, name, noised(made[name], axis, dead))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), f"{name}: {dead} matter"
        tried += 1
    return tried


@pytest.mark.parametrize("name", NETS)
def test_what_is_not_demanded_does_not_matter(name: str) -> None:
    model = MICRO[name].build()
    mask_randomly(model, 2, side="input", mode="uniform", amount=0.6)
    tried = assert_sound(model, MICRO[name].inputs)
    assert tried > 0 or name in (
        "softmax_channels",
        "channel_mean_product",
        "attention",
        "flatten_many",
        "pixel_unshuffle",
    )


@pytest.mark.parametrize("seed", range(300, 306))
def test_what_is_not_demanded_does_not_matter_in_random_nets(seed: int) -> None:
    model, inputs = random_net(seed)
    mask_randomly(model, seed, side="input", amount=0.7)
    assert assert_sound(model, inputs) > 0


@pytest.mark.parametrize(
    "name", ["residual_pre", "cat_straddle", "add_flip", "split_sizes", "channel_shuffle", "gated_chunk"]
)
def test_what_is_demanded_matters(name: str) -> None:
    """Every channel asked for beyond padding changes an output when it is replaced, wherever activations are smooth."""
    model = MICRO[name].build()
    mask_randomly(model, 2, side="input", mode="uniform")
    program = lowered(model, MICRO[name].inputs)
    wanted = demand(program)
    made = run_program(program, MICRO[name].inputs(2, torch.float64, 3))
    expected, tried = returned(program, made), 0
    for name_, live in wanted.live.items():
        axis = program.values[name_].axis
        assert axis is not None
        if program.producer(name_).kind in (Kind.SOURCE, Kind.BARRIER):
            continue
        for channel in np.flatnonzero(live & ~wanted.padding[name_]):
            found = rerun(program, made, name_, noised(made[name_], axis, np.array([channel])))
            assert not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), (name_, channel)
            tried += 1
    assert tried > 8


def test_demand_is_per_value_not_per_segment() -> None:
    def body(n: Net, x: Tensor) -> Tensor:
        first = n.a(x)
        second = first + n.b(first.tanh())
        return n.c(second.tanh())

    model: Any = randomise(Net(body, a=conv(3, 6, 3), b=conv(6, 6), c=conv(6, 4))).eval()
    kill(model.b, inputs=[4, 5])
    kill(model.c, inputs=[0, 1])
    program = lowered(model, image())
    wanted = demand(program)

    def live(name: str) -> list[int]:
        return np.flatnonzero(wanted.live[layer(program, name).result]).tolist()

    assert live("a") == [0, 1, 2, 3, 4, 5]
    assert live("b") == [2, 3, 4, 5]
    assert live("c") == [0, 1, 2, 3]


def test_needed_are_the_values_that_reach_an_output() -> None:
    model = MICRO["cat_two"].build()
    kill(model.c, inputs=range(8, 12))
    program = lowered(model, image())
    wanted = demand(program)
    assert layer(program, "a").result in wanted.needed
    assert layer(program, "b").result not in wanted.needed
    assert not wanted.live[layer(program, "b").result].any()


def test_padding_is_what_is_kept_only_because_an_op_cannot_do_without() -> None:
    model = MICRO["group_norm_4"].build()
    kill(model[3], inputs=[0, 2, 3])
    program = lowered(model, image())
    wanted = demand(program)
    result = next(op.result for op in program.ops if op.kind is Kind.STATISTIC)
    assert np.flatnonzero(wanted.live[result]).tolist() == [0, 1, 4, 5, 6, 7]
    assert np.flatnonzero(wanted.padding[result]).tolist() == [0]


@pytest.mark.parametrize(
    ("kind", "more", "asked", "made"),
    [
        (Kind.MAP, {}, [1, 4], [1, 4]),
        (Kind.MIX, {}, [], []),
        (Kind.BARRIER, {}, [1], [0, 1, 2, 3, 4, 5, 6, 7]),
        (Kind.SOURCE, {}, [], [0, 1, 2, 3, 4, 5, 6, 7]),
        (Kind.STATISTIC, {"groups": 4}, [1, 4], [0, 1, 4, 5]),
        (Kind.STATISTIC, {}, [1], [0, 1, 2, 3, 4, 5, 6, 7]),
        (Kind.REINDEX, {"block": 4}, [5], [4, 5, 6, 7]),
        (Kind.GROUPED, {"groups": 2}, [1, 2, 7], [1, 2, 4, 7]),
        (Kind.GROUPED, {"groups": 2}, [5], [5]),
        (Kind.GROUPED, {"groups": 2}, [], []),
        (Kind.GROUPED, {"groups": 4}, [0, 1, 6], [0, 1, 6, 7]),
    ],
)
def test_rounded(kind: Kind, more: dict[str, int], asked: list[int], made: list[int]) -> None:
    mask = np.zeros(8, np.bool_)
    mask[asked] = True
    op = Op(kind, "f.g", (), result="y", **more)  # type: ignore[arg-type]
    found = rounded(op, mask)
    assert np.flatnonzero(found).tolist() == made
    assert np.array_equal(rounded(op, found), found)
