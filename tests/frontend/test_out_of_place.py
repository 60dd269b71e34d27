"""In-place operators: replaced by a walk over the graph where that is the same function, by torch where it may not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional
from torch.nn.utils import prune

import chanopt
from benchmarks import zoo
from chanopt.codegen.torch_names import OpOverload, is_mutable
from chanopt.frontend import RULES, capture, lower_captured
from chanopt.ir import Kind, Program
from tests.support.equal import assert_same_function
from tests.support.nets.base import image, randomise


class Between(nn.Module):
    """A function of feature maps between two layers."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.body = body
        self.last = nn.LazyConv2d(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.first(x))
        return self.last(y if y.ndim == 4 else y[:, :, None, None])


def made(body: Callable[[Tensor], Tensor]) -> Any:
    net = Between(body)
    with torch.no_grad():
        net(*image()(2, torch.float32, 0))
    return randomise(net).eval()


def walked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled by every capture from now on: whether torch was not asked to trace again."""
    asked: list[bool] = []
    again = ExportedProgram.run_decompositions

    def run(self: ExportedProgram, *args: Any, **kwargs: Any) -> ExportedProgram:
        asked[-1] = False
        return again(self, *args, **kwargs)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", run)
    asked.append(True)
    return asked


def assert_captured(net: nn.Module) -> None:
    inputs = image()(2, torch.float32, 0)
    captured = capture(net, inputs)
    operators = [node.target for node in captured.graph.graph.nodes if isinstance(node.target, OpOverload)]
    assert not any(map(is_mutable, operators))
    assert_same_function(net, captured.graph, image()(3, torch.float32, 1), tol=0)
    program = lower_captured(captured, RULES, strict=False)
    assert_same_function(net.double(), program.to_module().double(), image()(3, torch.float64, 1), tol=1e-10)


def read_before_and_after(x: Tensor) -> Tensor:
    before = x + 1
    x.relu_()
    return before * x


def residual(x: Tensor) -> Tensor:
    y = functional.relu(x, inplace=True)
    z = y * 2
    z += y
    z.mul_(0.5).add_(z)
    return z


def flattened(x: Tensor) -> Tensor:
    y = functional.adaptive_avg_pool2d(x, 1).flatten(1)
    return functional.dropout(y, 0.5, training=False, inplace=True).relu_()


def through_dropout(x: Tensor) -> Tensor:
    y = functional.dropout(x, 0.5, training=False)
    y.relu_()
    return x * y


def joined(x: Tensor) -> Tensor:
    y = torch.cat([x, functional.hardswish(x * 2, inplace=True)], 1)
    return functional.leaky_relu_(y, 0.2).clamp_(-1, 1)


def added_to_itself(x: Tensor) -> Tensor:
    return functional.silu(x.add_(x), inplace=True)


SEEN_BY_NOTHING_ELSE = (read_before_and_after, residual, flattened, joined, through_dropout, added_to_itself)


def seen_by_a_view(x: Tensor) -> Tensor:
    part = x[:, :2]
    x.relu_()
    return torch.cat([x, part], 1)


def through_a_view(x: Tensor) -> Tensor:
    x[:, 2:4].relu_()
    return x


def through_a_chunk(x: Tensor) -> Tensor:
    one, _ = x.chunk(2, 1)
    one.mul_(3)
    return x


def through_one_of_two_shapes(x: Tensor) -> Tensor:
    y = x.flatten(2)
    y.neg_()
    return x * y.mean(2)[:, :, None, None]


def through_an_einsum(x: Tensor) -> Tensor:
    y = torch.einsum("bchw->bcwh", x)
    y.relu_()
    return x * y.transpose(2, 3)


def through_what_may_be_another_type(x: Tensor) -> Tensor:
    y = x.type_as(x * 2)
    y.transpose(2, 3).relu_()
    return x * y


def through_dropout_and_a_view(x: Tensor) -> Tensor:
    functional.dropout(x, 0.5, training=False)[:, :4].relu_()
    return x


def a_test_in_floats(x: Tensor) -> Tensor:
    return x + (x * 2).lt_(0.5)


def a_part_set(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:5] = x[:, 2:6]
    return y


LEFT_TO_TORCH = (
    *(seen_by_a_view, through_a_view, through_a_chunk, through_one_of_two_shapes, through_an_einsum),
    *(through_what_may_be_another_type, through_dropout_and_a_view, a_test_in_floats, a_part_set),
)


@pytest.mark.parametrize("body", [*SEEN_BY_NOTHING_ELSE, *LEFT_TO_TORCH])
def test_what_nothing_else_sees_is_replaced_by_a_walk_and_the_rest_by_torch(
    body: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, asked = made(body), walked(monkeypatch)
    assert_captured(net)
    assert asked == [body in SEEN_BY_NOTHING_ELSE]


def test_a_result_that_is_seen_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return y, y.relu_()

    asked = walked(monkeypatch)
    assert_captured(randomise(Two()).eval())
    assert asked == [True]


def test_masks_of_prune_are_no_reason_to_trace_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = made(residual)
    prune.random_structured(net.first, "weight", amount=3, dim=0)
    asked = walked(monkeypatch)
    chanopt.lower(net, image()(2, torch.float32, 0))
    assert asked == [True]


_STEPS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: x.relu_(),
    lambda x, y: x.add_(y),
    lambda x, y: x.mul_(0.5),
    lambda x, y: x.copy_(y),
    lambda x, y: x + y,
    lambda x, y: torch.tanh(x),
    lambda x, y: x.contiguous(),
    lambda x, y: x.reshape(x.shape),
    lambda x, y: functional.dropout(x, training=False),
    lambda x, y: x.transpose(2, 3).transpose(2, 3),
    lambda x, y: torch.cat([x[:, 4:], y[:, :4]], 1),
    lambda x, y: x.clone(),
)


@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed: int) -> None:
    """Whatever shares memory with whatever: the captured graph answers what the model does."""
    drawn = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(most, (), generator=drawn))

    plan = [(number(len(_STEPS)), number(1 << 16), number(1 << 16)) for _ in range(8)]

    def body(x: Tensor) -> Tensor:
        known = [x, x * 2, x - 1]
        for step, one, other in plan:
            known.append(_STEPS[step](known[one % len(known)], known[other % len(known)]))
        return torch.cat(known, 1)

    assert_captured(made(body))


def shown(program: Program) -> list[tuple[Kind, str, int]]:
    """The ops without their names (torch numbers additions among those of sizes) and without views and their sizes."""
    own = (op for op in program.ops if op.target not in ("aten.sym_size.int", "aten.flatten.using_ints"))
    return [(op.kind, op.layer, len(op.reads)) for op in own if op.target != "aten.reshape.default"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "googlenet", "mobilenet_v2", "shufflenet_v2_x0_5", "regnet_y_400mf"])
def test_a_walk_and_torch_answer_the_same_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = zoo.entry(name).small
    model, inputs = zoo.build(name, resolution=size), zoo.example_inputs(name, 1, size)
    asked = walked(monkeypatch)
    by_walk = chanopt.lower(model, inputs)
    assert asked == [True]
    monkeypatch.setitem(capture.__globals__, "out_of_place", lambda module: None)
    by_torch = chanopt.lower(model, inputs)
    assert asked == [False]
    assert shown(by_walk) == shown(by_torch)
