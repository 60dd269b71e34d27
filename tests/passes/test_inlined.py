"""RealizeReads on a GPU: a fused conv's kernel does what stands beside the conv too, and the function stays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import chanopt
from chanopt.analysis.figures import figures
from chanopt.errors import IRError
from chanopt.frontend import RULES, capture, lower_captured
from chanopt.ir import Fusing, How, Program, parse
from chanopt.kernels import GROUP
from chanopt.pass_infra import checked
from chanopt.passes import DEFAULT, Pipeline
from chanopt.target import ConvRead, Realization, Target
from tests.support.equal import assert_same_function
from tests.support.nets.base import Net, conv, randomise
from tests.support.passes import kill

aten, gather_conv2d = torch.ops.aten, torch.ops.chanopt.gather_conv2d.default
LAST = torch.channels_last
FUSED: Callable[[ConvRead, Realization], float] = lambda _, way: float(way is not Realization.FUSED)  # noqa: E731
Body = Callable[[Any, Tensor], Tensor]


@functools.cache
def compiled(body: Body, target: str = "cuda", cost: Any = FUSED) -> tuple[fx.GraphModule, Program]:
    """A net in which `c` and `d` read half of a stream of 32 channels, and what the compiler makes of it for a GPU."""
    net = Net(
        lambda n, x: n.head(body(n, n.stem(x).relu())),
        **{name: conv(32, 32) for name in ("c", "d")},
        stem=conv(3, 32),
        head=conv(32, 8),
        norm=nn.BatchNorm2d(32),
        last=nn.BatchNorm2d(32),
    )
    net = randomise(net).eval()
    kill(net.c, inputs=range(0, 32, 2))
    kill(net.d, inputs=range(16))
    net = net.double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64).contiguous(memory_format=LAST)
    program = replace(lower_captured(capture(net, (x,)), RULES, strict=True), target=target, costs=cost)
    with checked():
        program = Pipeline(DEFAULT)(program).program
    assert parse(str(program)) == program
    fast = program.to_module()
    assert isinstance(fast, fx.GraphModule)
    assert_same_function(net, fast, (x,))
    return fast, program


def inlined(program: Program) -> list[str]:
    return [op.target.split(".")[1] for op in program.ops if op.how is How.INLINED]


def targets(fast: fx.GraphModule) -> set[Any]:
    return {node.target for node in fast.graph.nodes if node.op == "call_function"}


CASES: dict[str, tuple[Body, list[str]]] = {
    "nothing": (lambda n, x: n.c(x).tanh() + x, []),
    "activation": (lambda n, x: n.c(x).relu() * x, ["relu"]),
    "silu": (lambda n, x: F.silu(n.c(x)) * x, ["silu"]),
    "relu6": (lambda n, x: F.relu6(n.c(x)) * x, ["relu6"]),
    "hardtanh of other ends": (lambda n, x: F.hardtanh(n.c(x)) * x, []),
    "sum": (lambda n, x: (x + n.c(x)).tanh() * x, ["add"]),
    "sum and activation": (lambda n, x: (n.c(x) + x).relu() * x, ["add", "relu"]),
    "a sum with a factor": (lambda n, x: torch.add(x, n.c(x), alpha=2).relu() * x, []),
    "a sum of other sizes": (lambda n, x: (n.c(x) + x.mean((2, 3), keepdim=True)).tanh() * x, []),
    "a difference": (lambda n, x: (x - n.c(x)).relu() * x, []),
    "twice itself": (lambda n, x: (lambda y: y + y)(n.c(x)) * x, []),
    "read by others too": (lambda n, x: (lambda y: y.relu() * y + x)(n.c(x)), []),
    "two convs in a sum": (lambda n, x: (n.c(x) + n.d(x)).relu() * x, ["add", "relu"]),
    "what is added comes later": (lambda n, x: (lambda y, z: (y + z.tanh()).relu() * x)(n.c(x), x.exp()), []),
    "two in a row": (lambda n, x: F.silu(n.c(x).relu()) * x, ["relu"]),
    "batch norm before": (lambda n, x: n.c(n.norm(x).relu()) * x, ["batch_norm", "relu"]),
    "affine before": (lambda n, x: n.d(torch.tanh(x) * n.norm.weight[:, None, None]).tanh() * x, ["mul"]),
    "batch norm for two": (lambda n, x: (lambda y: n.c(y) * n.d(y) + x)(n.norm(x).relu()), []),
    "all": (lambda n, x: (n.c(F.silu(n.norm(x))) + x).relu() * x, ["batch_norm", "silu", "add", "relu"]),
    "one after another": (
        lambda n, x: (lambda y: n.d(n.last(y).relu()) + y)(n.c(n.norm(x).relu()) + x),
        ["batch_norm", "relu", "add", "batch_norm", "relu", "add"],
    ),
}


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels know no float64; what stands for them on a CPU does."""
    monkeypatch.setattr(ConvRead, "has_kernel", property(lambda read: read.stored % GROUP == 0))


@pytest.mark.parametrize("case", list(CASES))
def test_what_a_kernel_does_besides(case: str) -> None:
    body, expected = CASES[case]
    fast, program = compiled(body)
    assert gather_conv2d in targets(fast)
    assert inlined(program) == expected


def test_nothing_beside_is_left_to_run() -> None:
    fast, program = compiled(CASES["one after another"][0])
    assert targets(fast) & {aten.batch_norm.default, aten.add.Tensor, aten.add_.Tensor} == set()
    assert figures(program).copies == 0
    whole = [node for node in fast.graph.nodes if node.target is gather_conv2d]
    assert [len(node.args) for node in whole] == [13, 13]
    assert all(node.args[8] is not None and node.args[10] == "relu" and node.args[11] is not None for node in whole)


def test_what_is_not_marked_is_done_apart() -> None:
    fast, program = compiled(CASES["all"][0])
    apart = program.evolve(ops=[replace(op, how=How.OWN) if op.how is How.INLINED else op for op in program.ops])
    apart.verify()
    x = torch.randn(3, 3, 5, 4, dtype=torch.float64).contiguous(memory_format=LAST)
    torch.testing.assert_close(apart.to_module()(x), fast(x))
    assert aten.batch_norm.default in targets(apart.to_module())  # type: ignore[arg-type]


def test_no_op_stands_beside_two_convs() -> None:
    for body, _ in CASES.values():
        _, program = compiled(body)
        fusing = Fusing(program)
        found = [op.result for conv in program.ops if conv.linear for op in fusing.beside(conv).ops]
        assert len(found) == len(set(found))


def test_an_inlined_op_that_no_kernel_does_is_found() -> None:
    _, program = compiled(CASES["all"][0])
    astray = [replace(op, how=How.INLINED) if op.target == "aten.mul.Tensor" else op for op in program.ops]
    with pytest.raises(IRError, match="rule 10: expected a fused conv beside the inlined op"):
        program.evolve(ops=astray).verify()


def test_what_a_kernel_does_besides_counts_for_it() -> None:
    read = ConvRead(64, ((0, 64),), 64, (1, 1), (1, 1), (0, 0), (1, 1), (56, 56), 64, 2, True)
    target = Target("cuda")
    assert Realization.FUSED not in target.ways(read)
    dressed = replace(read, before=2, after=2)
    assert target.ways(dressed) == [Realization.VIEW, Realization.FUSED]
    saved = target.seconds(dressed, Realization.VIEW) - target.seconds(read, Realization.VIEW)
    assert saved > 4 * 2 * 64 * 64 * 56 * 56 * 2 / 4e12  # four passes, at more than an H100's bandwidth
    assert target.seconds(dressed, Realization.FUSED) < target.seconds(dressed, Realization.VIEW)


def test_inductor_makes_one_pass_of_several() -> None:
    found: list[tuple[int, int]] = []

    def note(read: ConvRead, way: Realization) -> float:
        found.append((read.before, read.after))
        return FUSED(read, way)

    for compiler, expected in (("eager", (2, 2)), ("inductor", (1, 1))):
        found.clear()
        compiled(CASES["all"][0], str(Target("cuda", compiler)), note)
        assert set(found) == {expected}


def test_a_sum_that_may_broadcast_at_other_sizes_is_done_apart() -> None:
    net = Net(
        lambda n, x: (lambda y: n.head((y.mean((2, 3), keepdim=True) + n.c(y)).relu()))(n.stem(x).relu()),
        stem=nn.Conv2d(3, 32, 3, padding=1, stride=2),
        c=conv(32, 32),
        head=conv(32, 8),
    )
    net = randomise(net).eval()
    kill(net.c, inputs=range(0, 32, 2))
    x, larger = (torch.randn(2, 3, size, size).contiguous(memory_format=LAST) for size in (2, 8))
    fast = chanopt.optimize(net, (x,), target=Target("cuda", cost=FUSED))
    for images in (x, larger):
        torch.testing.assert_close(fast(images), net(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["batch_norm_scale", "batch_norm_shift", "relu_groups"])
@pytest.mark.parametrize("part", [conv(32, 8), nn.Parameter(torch.ones(1))], ids=["module", "parameter"])
def test_names_of_the_users_stay_theirs(name: str, part: Any) -> None:
    def body(n: Any, x: Tensor) -> Tensor:
        y = n.stem(x).relu()
        z, own = n.c(n.norm(y).relu()) + y, getattr(n, name)
        return own(z) if isinstance(own, nn.Module) else torch.maximum(n.head(z), own)

    parts: dict[str, Any] = {"stem": conv(3, 32), "norm": nn.BatchNorm2d(32), "c": conv(32, 32), "head": conv(32, 8)}
    net = randomise(Net(body, **parts, **{name: part})).eval().double()
    kill(net.c, inputs=range(0, 32, 2))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64).contiguous(memory_format=LAST)
    fast = chanopt.optimize(net, (x,), target=Target("cuda", cost=FUSED))
    assert_same_function(net, fast, (x,))
    theirs = f"{name}.weight" if isinstance(part, nn.Module) else name
    after, before = (module.state_dict()[theirs].flatten().sort().values for module in (fast, net))
    assert torch.equal(after, before)  # channels may have moved
