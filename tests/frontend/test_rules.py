"""The table of rules: what every family of operators does to channels, and that the program computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chanopt.frontend import RULES
from chanopt.frontend.lower import Refused
from chanopt.ir import Access, IndexMap, Kind, Op, Program, Read
from tests.support.equal import outputs
from tests.support.nets.base import Inputs, Net, conv, image, parameter, randomise, tensors
from tests.support.passes import lowered

ALL, FLOW, SET = Access.ALL, Access.FLOW, Access.SET
SAME = tuple(range(8))
ABSENT = IndexMap.ABSENT


@dataclass(frozen=True)
class Case:
    """An expression over `t` (8 channels), and what its last op is.

    `reads` has access and index of every read of a value with channels.
    """

    body: Callable[[Any, Tensor], Tensor]
    kind: Kind
    reads: tuple[tuple[Access, tuple[int, ...]], ...]
    groups: int = 1
    block: int = 1
    linear: bool = False
    border: bool = False
    fan: int = 1


def same(body: Any, kind: Kind = Kind.MAP, times: int = 1, **more: Any) -> Case:
    return Case(body, kind, ((FLOW, SAME),) * times, **more)


def mix(body: Any, border: bool) -> Case:
    return Case(body, Kind.MIX, ((SET, SAME),), linear=True, border=border)


def moved(body: Any, kind: Kind, *index: int, **more: Any) -> Case:
    return Case(body, kind, ((FLOW, index),), **more)


def placed(*pieces: int) -> list[tuple[Access, tuple[int, ...]]]:
    """The reads of a concat of operands that wide."""
    total, start, reads = sum(pieces), 0, []
    for width in pieces:
        index = [ABSENT] * total
        index[start : start + width] = range(width)
        reads.append((FLOW, tuple(index)))
        start += width
    return reads


MAPS: dict[str, Case] = {
    "conv 1x1": mix(lambda n, t: n.one(t), border=False),
    "conv 3x3, padded": mix(lambda n, t: n.three(t), border=True),
    "conv 3x3, not padded": mix(lambda n, t: F.conv2d(t, n.three.weight), border=False),
    "conv 3x3, same": mix(lambda n, t: F.conv2d(t, n.three.weight, padding="same"), border=True),
    "conv 1x1, same": mix(lambda n, t: F.conv2d(t, n.one.weight, padding="same"), border=False),
    "conv 3x3, valid": mix(lambda n, t: F.conv2d(t, n.three.weight, padding="valid"), border=False),
    "conv with one result channel": mix(lambda n, t: n.single(t), border=False),
    "grouped conv": Case(lambda n, t: n.grouped(t), Kind.GROUPED, ((SET, SAME),), groups=2, linear=True, border=True),
    "depthwise conv": same(lambda n, t: n.depthwise(t), linear=True, border=True),
    "depthwise conv, multiplier 2": moved(
        lambda n, t: n.double_(t), Kind.MAP, *np.repeat(SAME, 2), block=2, linear=True, border=True
    ),
    "transposed conv": mix(lambda n, t: n.transposed(t), border=True),
    "transposed depthwise conv": same(lambda n, t: n.transposed_depthwise(t), linear=True, border=True),
    "activation": same(lambda n, t: t.sigmoid()),
    "activation with arguments": same(lambda n, t: F.leaky_relu(t, 0.3)),
    "prelu by channel": same(lambda n, t: n.prelu(t)),
    "prelu for all": same(lambda n, t: n.prelu_one(t)),
    "number": same(lambda n, t: t * 0.5),
    "parameter by channel": same(lambda n, t: t * n.scale),
    "parameter by pixel": same(lambda n, t: t * n.plane),
    "cast": same(lambda n, t: t.float().to(t.dtype)),
    "comparison": same(lambda n, t: t > 0.1),
    "batch norm": same(lambda n, t: n.norm(t)),
    "instance norm": same(lambda n, t: n.instance(t)),
    "max pool": same(lambda n, t: F.max_pool2d(t, 2)),
    "average pool": same(lambda n, t: F.avg_pool2d(t, 2)),
    "adaptive pool": same(lambda n, t: F.adaptive_avg_pool2d(t, 1)),
    "resize": same(lambda n, t: F.interpolate(t, scale_factor=2, mode="bilinear")),
    "zero pad": same(lambda n, t: F.pad(t, (1, 2, 0, 1))),
    "reflection pad": same(lambda n, t: F.pad(t, (1, 1, 1, 1), mode="reflect")),
    "mean over space": same(lambda n, t: t.mean((2, 3))),
    "maximum over space": same(lambda n, t: t.amax((2, 3), keepdim=True)),
    "softmax over space": same(lambda n, t: t.softmax(-1)),
    "spatial flip": same(lambda n, t: t.flip(3)),
    "spatial transpose": same(lambda n, t: t.transpose(2, 3)),
    "spatial crop": same(lambda n, t: t[:, :, 1:5, ::2]),
    "channels last": same(lambda n, t: t.permute(0, 2, 3, 1)),
    "spatial flatten": same(lambda n, t: t.flatten(2)),
}

JOINS: dict[str, Case] = {
    "add": same(lambda n, t: t + n.one(t), Kind.JOIN, 2),
    "add to itself": same(lambda n, t: t + t, Kind.JOIN, 2),
    "product": same(lambda n, t: t * t.exp(), Kind.JOIN, 2),
    "gate": same(lambda n, t: t * t.mean((2, 3), keepdim=True), Kind.JOIN, 2),
    "where": same(lambda n, t: torch.where(t > 0, t, n.one(t)), Kind.JOIN, 3),
    "one channel for all": Case(lambda n, t: t + n.single(t), Kind.MAP, ((FLOW, SAME), (ALL, ()))),
    "concat along the height": same(lambda n, t: torch.cat([t, n.one(t)], 2), Kind.JOIN, 2),
}

MOVES: dict[str, Case] = {
    "concat": Case(lambda n, t: torch.cat([t, n.single(t), t], 1), Kind.CONCAT, tuple(placed(8, 1, 8))),
    "slice": moved(lambda n, t: t[:, 2:6], Kind.SPLIT, 2, 3, 4, 5),
    "strided slice": moved(lambda n, t: t[:, 1::3], Kind.SPLIT, 1, 4, 7),
    "chunk": moved(lambda n, t: t.chunk(4, 1)[2], Kind.SPLIT, 4, 5),
    "split": moved(lambda n, t: t.split([1, 5, 2], 1)[1], Kind.SPLIT, 1, 2, 3, 4, 5),
    "one channel, axis kept": moved(lambda n, t: t.narrow(1, 3, 1), Kind.SPLIT, 3),
    "index by a list": moved(lambda n, t: t[:, [1, 4, 6]], Kind.SPLIT, 1, 4, 6),
    "index by a buffer": moved(lambda n, t: t[:, n.order], Kind.REINDEX, 5, 0, 5, 7),
    "index_select": moved(lambda n, t: torch.index_select(t, 1, n.order), Kind.REINDEX, 5, 0, 5, 7),
    "flip": moved(lambda n, t: t.flip(1), Kind.REINDEX, *reversed(SAME)),
    "roll": moved(lambda n, t: t.roll(3, 1), Kind.REINDEX, 5, 6, 7, 0, 1, 2, 3, 4),
    "shuffle": moved(lambda n, t: F.channel_shuffle(t, 2), Kind.REINDEX, 0, 4, 1, 5, 2, 6, 3, 7),
    "shuffle by hand": moved(
        lambda n, t: t.view(t.shape[0], 4, 2, 8, 8).transpose(1, 2).reshape(t.shape[0], 8, 8, 8),
        Kind.REINDEX,
        *(0, 2, 4, 6, 1, 3, 5, 7),
    ),
    "repeat": moved(lambda n, t: t.repeat(1, 2, 1, 1), Kind.REINDEX, *SAME, *SAME),
    "repeat one by one": moved(lambda n, t: t.repeat_interleave(2, 1), Kind.REINDEX, *np.repeat(SAME, 2)),
    "flatten": moved(lambda n, t: t.flatten(1), Kind.REINDEX, *np.repeat(SAME, 64), block=64),
    "pixel shuffle": moved(lambda n, t: F.pixel_shuffle(t, 2), Kind.REINDEX, *SAME, fan=4),
    "pixel unshuffle": moved(lambda n, t: F.pixel_unshuffle(t, 2), Kind.REINDEX, *np.repeat(SAME, 4), block=4),
}

STATISTICS: dict[str, Case] = {
    "group norm": same(lambda n, t: n.group(t), Kind.STATISTIC, groups=4),
    "layer norm over C, H, W": same(lambda n, t: F.layer_norm(t, [8, 8, 8]), Kind.STATISTIC),
    "softmax over channels": same(lambda n, t: t.softmax(1), Kind.STATISTIC),
    "log softmax over channels": same(lambda n, t: t.log_softmax(-3), Kind.STATISTIC),
    "mean over channels": Case(lambda n, t: t.mean(1, keepdim=True), Kind.STATISTIC, ((SET, SAME),)),
    "sum over everything": Case(lambda n, t: t.sum((1, 2, 3)), Kind.STATISTIC, ((SET, SAME),)),
    "norm over channels": Case(lambda n, t: torch.linalg.vector_norm(t, dim=1), Kind.STATISTIC, ((SET, SAME),)),
    "variance over channels": Case(lambda n, t: t.var(1), Kind.STATISTIC, ((SET, SAME),)),
}

CASES = {**MAPS, **JOINS, **MOVES, **STATISTICS}


def net() -> Any:
    parts: dict[str, Any] = {
        "one": conv(8, 8),
        "three": conv(8, 8, 3),
        "single": conv(8, 1),
        "grouped": conv(8, 8, 3, groups=2),
        "depthwise": conv(8, 8, 3, groups=8),
        "double_": conv(8, 16, 3, groups=8),
        "transposed": nn.ConvTranspose2d(8, 8, 2, 2),
        "transposed_depthwise": nn.ConvTranspose2d(8, 8, 2, 2, groups=8),
        "prelu": nn.PReLU(8),
        "prelu_one": nn.PReLU(),
        "scale": parameter(8, 1, 1),
        "plane": parameter(8, 8),
        "norm": nn.BatchNorm2d(8),
        "instance": nn.InstanceNorm2d(8, affine=True),
        "group": nn.GroupNorm(4, 8),
        "order": torch.tensor([5, 0, 5, 7]),
    }

    def body(n: Net, x: Tensor) -> tuple[Tensor, ...]:
        t = n.stem(x).tanh()
        return tuple(case.body(n, t) for case in CASES.values())

    return randomise(Net(body, stem=conv(3, 8, 3), **parts)).eval()


@pytest.fixture(scope="module")
def built() -> tuple[Any, Program, dict[str, str]]:
    """One net with every case as an output, its program, and the value that each case returns."""
    torch.manual_seed(0)
    model = net()
    program = lowered(model, image())
    returned = [arg.value for arg in program.ops[-1].args]
    return model, program, dict(zip(CASES, returned, strict=True))


def last_op(program: Program, value: str) -> Op:
    return program.producer(value)


@pytest.mark.parametrize("name", CASES)
def test_rule(built: tuple[Any, Program, dict[str, str]], name: str) -> None:
    _, program, returned = built
    case, op = CASES[name], last_op(program, returned[name])
    channelled = [read for read in op.reads if program.values[read.value].layout is not None]
    assert op.kind is case.kind, op
    assert tuple((read.access, tuple(read.index)) for read in channelled) == case.reads, op
    assert (op.groups, op.block, op.linear, op.border) == (case.groups, case.block, case.linear, case.border)
    assert channelled[0].fan == case.fan


def test_no_case_is_refused(built: tuple[Any, Program, dict[str, str]]) -> None:
    assert built[1].refusals == ()


def test_the_program_means_the_model(built: tuple[Any, Program, dict[str, str]]) -> None:
    model, program, _ = built
    x = image()(3, torch.float64, 4)
    expected, found = outputs(model.double(), x), outputs(program.to_module(), x)
    for name, a, b in zip(CASES, expected, found, strict=True):
        assert a.shape == b.shape, name
        assert torch.equal(a, b) or (a - b).abs().max() < 1e-12, name


# -- linear layers, other ranks ---------------------------------------------------------------------------------------


def only(program: Program, target: str) -> Op:
    (op,) = [op for op in program.ops if op.target == target]
    return op


@pytest.mark.parametrize(
    ("layers", "inputs", "target"),
    [
        ([nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 1)], tensors((3, 9)), "aten.conv1d.default"),
        ([nn.Conv3d(3, 8, 2), nn.ReLU(), nn.Conv3d(8, 4, 1)], tensors((3, 4, 4, 4)), "aten.conv3d.default"),
        (
            [nn.ConvTranspose1d(3, 8, 2), nn.ReLU(), nn.ConvTranspose1d(8, 4, 1)],
            tensors((3, 9)),
            "aten.conv_transpose1d.default",
        ),
        (
            [nn.ConvTranspose3d(3, 8, 2), nn.ReLU(), nn.ConvTranspose3d(8, 4, 1)],
            tensors((3, 3, 3, 3)),
            "aten.conv_transpose3d.input",
        ),
        ([nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)], tensors((6,)), "aten.linear.default"),
        ([nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)], tensors((5, 6)), "aten.linear.default"),
    ],
    ids=["conv1d", "conv3d", "transposed 1d", "transposed 3d", "linear", "linear on tokens"],
)
def test_mixes_of_every_rank(layers: list[nn.Module], inputs: Inputs, target: str) -> None:
    program = lowered(nn.Sequential(*layers).eval(), inputs)
    first, second = [op for op in program.ops if op.target == target]
    assert first.kind is second.kind is Kind.MIX
    assert second.reads[0].access is SET
    assert list(second.reads[0].index) == list(SAME)
    turned = "transpose" in target
    assert [(p.out, p.inn) for p in second.params] == [(1, 0) if turned else (0, 1), (0, None)]
    expected = len(program.values[first.result].shape) - 1 if "linear" in target else 1
    assert program.values[first.result].axis == expected


@pytest.mark.parametrize(
    "body",
    [lambda n, x: x.relu() @ n.w, lambda n, x: torch.mm(x.relu(), n.w), lambda n, x: torch.addmm(n.b, x.relu(), n.w)],
    ids=["matmul", "mm", "addmm"],
)
def test_a_product_with_a_parameter_is_a_linear_layer(body: Any) -> None:
    model = Net(body, w=parameter(6, 4), b=parameter(4)).eval()
    program = lowered(model, tensors((6,)))
    op = only(program, "aten.linear.default")
    assert op.kind is Kind.MIX
    assert op.linear
    x = tensors((6,))(3, torch.float64, 1)
    assert torch.allclose(program.to_module()(*x), model.double()(*x), atol=1e-12)


# -- refusals ---------------------------------------------------------------------------------------------------------


class Refusing(nn.Module):
    """Operators whose effect on channels depends on numbers, or is none of the kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = conv(3, 8, 3), nn.ConvTranspose2d(8, 8, 2, 2, groups=2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        t = self.stem(x).tanh()
        return (
            F.pad(t, (0, 0, 0, 0, 1, 1)),
            self.grouped(t),
            F.conv2d(t, t[:1, :, :3, :3]),
            t.flatten(2) @ t.flatten(2).transpose(1, 2),
            t.cumsum(1),
            F.prelu(t, t.mean((0, 2, 3))),
        )


def test_refusals_give_op_reason_layer_and_source_line() -> None:
    program = lowered(randomise(Refusing()).eval(), image())
    reasons = {refusal.op: refusal.reason for refusal in program.refusals}
    assert (
        reasons["aten.constant_pad_nd.default" if "aten.constant_pad_nd.default" in reasons else "aten.pad.default"]
        == "it pads the channel axis"
    )
    assert (
        reasons["aten.conv_transpose2d.input"]
        == "transposed convs in groups that are not depthwise keep their channels"
    )
    assert reasons["aten.conv2d.default"] == "its weight is computed at run time"
    assert reasons["aten.matmul.default"] == "a product of two activations reads whole rows"
    assert reasons["aten.cumsum.default"] == "no channel rule for this operator"
    assert reasons["aten.prelu.default"] == "its slope is computed at run time"
    by_op = {refusal.op: refusal for refusal in program.refusals}
    assert by_op["aten.conv_transpose2d.input"].layer == "grouped"
    assert by_op["aten.cumsum.default"].source.startswith(f"{__file__}:")
    assert by_op["aten.cumsum.default"].source.endswith("t.cumsum(1),")
    barriers = {op.target for op in program.ops if op.kind is Kind.BARRIER}
    assert by_op.keys() <= barriers


def test_a_barrier_takes_all_channels_in_order() -> None:
    program = lowered(randomise(Refusing()).eval(), image())
    for op in program.ops:
        if op.kind is Kind.BARRIER:
            assert all(read.access is ALL for read in op.reads)
            assert program.values[op.result].layout is None or program.values[op.result].live.is_identity


def test_every_rule_of_the_table_is_an_operator_that_exists() -> None:
    """A misspelt name would make the operator a barrier without a word."""
    missing = []
    for target in RULES:
        _, name, overload = target.split(".")
        if not hasattr(getattr(torch.ops.aten, name, None), overload):
            missing.append(target)
    assert not missing


def test_refused_is_an_answer_with_a_reason() -> None:
    assert Refused("because").reason == "because"


def test_reads_of_a_rule_point_to_values_of_the_program(built: tuple[Any, Program, dict[str, str]]) -> None:
    _, program, _ = built
    assert all(isinstance(read, Read) and read.value in program.values for op in program.ops for read in op.reads)
