"""FoldAffine, case by case (the numbers are those of its docstring)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chanopt.errors import PassError
from chanopt.ir import Program
from chanopt.pass_infra import checked
from chanopt.passes import FoldAffine
from tests.support.masks import mask_randomly
from tests.support.micro import MICRO
from tests.support.nets.base import Inputs, Net, conv, image, parameter, randomise, tensors
from tests.support.passes import assert_leaves, assert_rewrites, prepared
from tests.support.random_nets import random_net

NORM = "aten.batch_norm.default"


def between(body: Any, **parts: Any) -> Any:
    """`body` between two convs of eight channels."""
    return randomise(Net(lambda n, x: n.b(body(n, n.a(x)).relu()), a=conv(3, 8, 3), b=conv(8, 6, 3), **parts)).eval()


# -- it fires ---------------------------------------------------------------------------------------------------------

CASE_1: dict[str, tuple[nn.Module, Inputs]] = {
    "conv": (nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8)), image()),
    "conv without bias": (nn.Sequential(conv(3, 8, 3, bias=False), nn.BatchNorm2d(8)), image()),
    "conv1d": (nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), tensors((3, 9))),
    "conv3d": (nn.Sequential(nn.Conv3d(3, 8, 2), nn.BatchNorm3d(8)), tensors((3, 4, 4, 4))),
    "depthwise conv": (nn.Sequential(conv(3, 3, 3, groups=3), nn.BatchNorm2d(3)), image()),
    "depthwise conv with multiplier": (nn.Sequential(conv(3, 6, 3, groups=3), nn.BatchNorm2d(6)), image()),
    "grouped conv": (nn.Sequential(conv(4, 8, 3, groups=2), nn.BatchNorm2d(8)), image(4)),
    "transposed conv": (nn.Sequential(nn.ConvTranspose2d(3, 8, 2, 2), nn.BatchNorm2d(8)), image()),
    "transposed depthwise conv": (
        nn.Sequential(nn.ConvTranspose2d(3, 3, 2, 2, groups=3), nn.BatchNorm2d(3)),
        image(),
    ),
    "linear": (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), tensors((6,))),
    "without gamma and beta": (nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8, affine=False)), image()),
    "two in a row": (nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)), image()),
}


@pytest.mark.parametrize("name", CASE_1)
def test_case_1_batch_norm_folds_into(name: str) -> None:
    net, inputs = CASE_1[name]
    result = assert_rewrites(FoldAffine(), randomise(net).eval(), inputs, targets={NORM: 0})
    module = result.program.to_module()
    assert sorted(name for name, _ in module.named_parameters()) == ["0.bias", "0.weight"]
    assert not list(module.named_buffers())


CASE_2: dict[str, tuple[Any, str]] = {
    "times a number": (lambda n, t: t * 0.7, "aten.mul.Tensor"),
    "over a number": (lambda n, t: t / 3, "aten.div.Tensor"),
    "plus a number": (lambda n, t: t + 1, "aten.add.Tensor"),
    "minus a number": (lambda n, t: t - 0.3, "aten.sub.Tensor"),
    "times a parameter": (lambda n, t: t * n.p, "aten.mul.Tensor"),
    "over a parameter": (lambda n, t: t / n.p, "aten.div.Tensor"),
    "plus a parameter": (lambda n, t: t + n.p, "aten.add.Tensor"),
    "minus a parameter": (lambda n, t: t - n.p, "aten.sub.Tensor"),
    "plus a multiple of a parameter": (lambda n, t: torch.add(t, n.p, alpha=0.5), "aten.add.Tensor"),
    "minus a multiple of a parameter": (lambda n, t: torch.sub(t, n.p, alpha=2), "aten.sub.Tensor"),
    "several in a row": (lambda n, t: (t * n.p + 1) / 2, "aten.mul.Tensor"),
}


@pytest.mark.parametrize("name", CASE_2)
def test_case_2(name: str) -> None:
    body, target = CASE_2[name]
    assert_rewrites(FoldAffine(), between(body, p=parameter(8, 1, 1)), image(), targets={target: 0})


def test_a_shared_weight_is_scaled_for_one_of_its_users_only() -> None:
    """The other user keeps the weight under its own name."""

    def body(n: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        return n.norm(n.a(x)), n.a(2 * x).relu()

    net = randomise(Net(body, a=conv(3, 8, 3), norm=nn.BatchNorm2d(8))).eval()
    result = assert_rewrites(FoldAffine(), net, image(), targets={NORM: 0})
    module = result.program.to_module()
    assert torch.equal(module.get_parameter("a.weight"), net.a.weight.double())
    assert sorted(name for name, _ in module.named_parameters()) == ["a.bias", "a.bias_1", "a.weight", "a.weight_1"]


# -- it leaves alone --------------------------------------------------------------------------------------------------

LEFT: dict[str, Any] = {
    "no affine map": lambda n, t: t,
    "a batch norm after an activation": lambda n, t: n.norm(t.relu()),
    "a sum with another activation": lambda n, t: t + t.relu(),
    "a number less the value (not x * s + t with x first)": lambda n, t: torch.pow(t, 2),
    "a parameter that varies over space": lambda n, t: t * n.plane,
    "a division by zero": lambda n, t: torch.where(torch.isfinite(u := t / 0), u, t.relu()),
    "a division that rounds": lambda n, t: torch.div(t, 0.5, rounding_mode="floor"),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves(name: str) -> None:
    net = between(LEFT[name], norm=nn.BatchNorm2d(8), plane=parameter(1, 1, 8, 8))
    assert_leaves(FoldAffine(), net, image())


@pytest.mark.parametrize(
    "name", ["batch_norm_fork", "batch_norm_after_relu", "batch_norm_on_input", "batch_norm_after_cat"]
)
def test_leaves_a_batch_norm_whose_operand_is_not_a_linear_op_of_its_own(name: str) -> None:
    program = assert_leaves(FoldAffine(), MICRO[name].build(), MICRO[name].inputs)
    assert sum(op.target == NORM for op in program.ops) >= 1


def test_leaves_batch_statistics_and_names_them() -> None:
    net = MICRO["batch_norm_batch_statistics"].build()
    program = assert_leaves(FoldAffine(), net, image())
    assert [refusal.layer for refusal in program.refusals] == ["1"]


def test_leaves_a_value_that_is_also_returned() -> None:
    net = randomise(Net(lambda n, x: (t := n.a(x), n.norm(t)), a=conv(3, 8, 3), norm=nn.BatchNorm2d(8))).eval()
    assert_leaves(FoldAffine(), net, image())


# -- it refuses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Idle(FoldAffine):
    """Promises what FoldAffine does and does nothing."""

    name = "idle"

    def apply(self, program: Program) -> Program:
        return program


def test_checked_mode_refuses_a_result_with_a_batch_norm_that_could_fold() -> None:
    program = prepared(MICRO["batch_norm"].build(), image())
    with (
        checked(),
        pytest.raises(PassError, match=r"idle guaranteed that no affine map is left .* found 1 that still is"),
    ):
        Idle()(program)


# -- it means the same ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [4, 11, 23])
def test_means_the_same_on_random_nets(seed: int) -> None:
    net, inputs = random_net(seed)
    mask_randomly(net, seed)
    assert_rewrites(FoldAffine(), net, inputs, allow_constant=True)
