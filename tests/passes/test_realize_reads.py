"""RealizeReads: every way of reading means the same, and the cheapest is taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import chanopt
from chanopt.ir import How, Program, parse, physical_read
from chanopt.pass_infra import checked
from chanopt.passes import RealizeReads
from chanopt.target import ConvRead, Measured, Realization, Target
from tests.support.equal import assert_same_function
from tests.support.masks import mask_randomly
from tests.support.micro import MICRO
from tests.support.nets.base import Net, conv, image, randomise
from tests.support.passes import all_of, at_odds, kill, passes_before, prepared

R = Realization
aten = torch.ops.aten


def prefer(*wanted: Realization) -> Callable[[ConvRead, Realization], float]:
    """A cost under which these ways are taken wherever a conv has them."""
    return lambda _, way: 0.0 if way in wanted else 1.0


def run(net: nn.Module, x: torch.Tensor, target: Target) -> tuple[nn.Module, Program]:
    with checked():
        fast = chanopt.optimize(net, (x,), target=target)
    assert isinstance(fast, torch.fx.GraphModule)
    return fast, chanopt.Plan.of(fast).program


def ways(program: Program) -> Counter[How]:
    return Counter(op.how for op in program.ops if op.linear)


LAST = torch.channels_last


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("memory_format", [LAST, torch.contiguous_format], ids=["last", "contiguous"])
@pytest.mark.parametrize("way", list(R), ids=lambda way: way.value)
@pytest.mark.parametrize("kernel", [1, 3])
def test_every_way_computes_the_same(way: Realization, memory_format: Any, batch: int, kernel: int) -> None:
    net = at_odds(kernel)
    x = torch.randn(batch, 3, 9, 8).contiguous(memory_format=memory_format)
    device = "cuda" if way is R.FUSED else "cpu"
    fast, _ = run(net, x, Target(device, cost=prefer(way)))
    if way is not R.FUSED:  # whose kernel knows no float64
        assert_same_function(net, fast, (x,), allow_constant=batch == 1)
    for size, images in ((9, batch), (13, batch + 2 if batch > 1 else 1)):
        fresh = torch.randn(images, 3, size, 8).contiguous(memory_format=memory_format)
        torch.testing.assert_close(fast(fresh), net(fresh), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("way", "device", "memory_format", "how"),
    [
        (R.GEMM, "cpu", LAST, How.PRODUCT),
        (R.RUNS, "cpu", LAST, How.RUNS),
        (R.FUSED, "cuda", LAST, How.FUSED),
    ],
)
def test_a_way_that_is_cheapest_is_taken(way: Realization, device: str, memory_format: Any, how: How) -> None:
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=memory_format)
    fast, program = run(at_odds(), x, Target(device, cost=prefer(way)))
    assert ways(program)[how] > 0
    assert parse(str(program)) == replace(program, dialect=None, costs=None)
    report = chanopt.explain(fast)
    assert [layer.way for layer in report.layers].count(way.value) == ways(program)[how]
    assert f", {way.value}" in str(report) or way is R.FUSED
    again = chanopt.Report.from_json(report.to_json())
    assert again.layers == report.layers
    assert all(set(layer.costs) >= {way.value} for layer in report.layers if layer.way == way.value)


def test_ways_that_copy_nothing_count_no_copies() -> None:
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=LAST)
    for way, device in ((R.RUNS, "cpu"), (R.FUSED, "cuda")):
        plain = chanopt.explain(run(at_odds(), x, Target(device, cost=prefer(R.VIEW, R.GATHER)))[0])
        fast, _ = run(at_odds(), x, Target(device, cost=prefer(way)))
        report = chanopt.explain(fast)
        assert report.copies < plain.copies
        selected = [n for n in fast.graph.nodes if n.target is aten.index_select.default]  # type: ignore[union-attr]
        assert len(selected) == report.copies


@pytest.mark.parametrize("way", [R.COVER, R.DENSE])
def test_a_wider_read_multiplies_zeros_and_gathers_nothing(way: Realization) -> None:
    net, x = at_odds(3), torch.randn(1, 3, 9, 8)
    narrow = chanopt.explain(run(net, x, Target("cpu"))[0])
    assert narrow.gathers > 0
    fast, program = run(net, x, Target("cpu", cost=prefer(way, R.VIEW)))
    wide = chanopt.explain(fast)
    assert wide.gathers == 0
    assert wide.macs_after > narrow.macs_after
    read = {op.label(): physical_read(op, op.reads[0], program) for op in program.ops if op.linear}
    gathered = next(layer.name for layer in narrow.layers if layer.reads == "gather")
    weight = fast.get_parameter(f"{gathered}.weight")
    kept = torch.tensor([bool(net.get_parameter(f"{gathered}.weight")[:, c].any()) for c in read[gathered].channels])
    assert not weight[:, ~kept].any()
    assert weight[:, kept].any()


def test_a_weight_that_is_used_twice_is_widened_for_one_of_its_uses() -> None:
    net = Net(
        lambda n, x: torch.cat([all_of(n.a(x).relu(), n.b, n.c), n.b(n.e(x).relu())], 1),
        a=conv(3, 24, 3),
        e=conv(3, 24, 3),
        b=conv(24, 8),
        c=conv(24, 8),
    )
    net = randomise(net).eval()
    kill(net.b, inputs=range(0, 24, 2))
    kill(net.c, inputs=range(0, 24, 3))
    x = torch.randn(1, 3, 6, 6)
    fast, _ = run(net, x, Target("cpu", cost=prefer(R.DENSE)))
    assert_same_function(net, fast, (x,), allow_constant=True)


def test_the_plain_way_stays_where_another_gains_less_than_the_margin() -> None:
    def near(_: ConvRead, way: Realization) -> float:
        return 0.99 if way is R.GEMM else 1.0

    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=LAST)
    _, program = run(at_odds(), x, Target("cpu", cost=near))
    assert set(ways(program)) == {How.OWN}


@pytest.mark.parametrize("batch", [1, 3])
def test_nchw_on_a_cpu_is_left_as_it_is(batch: int) -> None:
    """Views are free for one image; for several a product would gain little, and quantisers know convs only."""
    program = prepared(at_odds(), image(), passes_before(RealizeReads), batch=batch)
    assert not RealizeReads()(program).modified


def test_relu_writes_over_the_result_of_a_product() -> None:
    net = Net(
        lambda n, x: all_of(n.a(x).relu(), nn.Sequential(n.b, nn.ReLU(), n.d), n.c),
        a=conv(3, 16),
        b=conv(16, 8),
        c=conv(16, 8),
        d=conv(8, 8),
    )
    net = randomise(net).eval()
    kill(net.b, inputs=range(8))
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=LAST)
    fast, program = run(net, x, Target("cpu", cost=prefer(R.GEMM)))
    assert ways(program)[How.PRODUCT] >= 1
    assert isinstance(fast, torch.fx.GraphModule)
    after = {n.target for n in fast.graph.nodes if n.op == "call_function"}
    assert aten.relu.default not in after
    fast.double()(x.double()).sum().backward()
    net.double()(x.double()).sum().backward()
    wanted = net.get_parameter("b.weight").grad
    assert wanted is not None
    torch.testing.assert_close(fast.get_parameter("b.weight").grad, wanted[:, 8:])


def test_measured_costs_are_asked_for_once_for_all_convs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Measured, "prepare", lambda self, reads: asked.append(len(reads)))
    monkeypatch.setattr(Measured, "__call__", lambda self, read, way: 1.0)
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=LAST)
    chanopt.optimize(at_odds(), (x,), target=Target("cpu", cost=Measured(path=None, progress=False)))
    assert len(asked) == 1
    assert asked[0] >= 2


@pytest.mark.parametrize("name", sorted(MICRO)[::6])
def test_micro_nets_for_a_gpu(name: str) -> None:
    """Planned for CUDA and run here, channels last where there are images: the operators have ATen forms."""
    net = MICRO[name].build()
    mask_randomly(net, 3, side="both", mode="uniform", amount=0.4)

    def last(t: Any) -> Any:
        return t.contiguous(memory_format=LAST) if isinstance(t, torch.Tensor) and t.dim() == 4 else t

    inputs = torch.utils._pytree.tree_map(last, MICRO[name].inputs(MICRO[name].fixed_batch or 2, torch.float32, 0))
    with checked():
        fast = chanopt.optimize(net, inputs, target="cuda")
    _close(net, fast, inputs)


def _close(net: nn.Module, fast: nn.Module, inputs: tuple[Any, ...]) -> None:
    with torch.no_grad():
        wanted, found = (torch.utils._pytree.tree_leaves(module(*inputs)) for module in (net, fast))
    for one, other in zip(wanted, found, strict=True):
        if isinstance(one, torch.Tensor) and one.is_floating_point():
            scale = one.abs().max().item() or 1.0
            assert (one - other).abs().max().item() <= 2e-5 * scale


@pytest.mark.parametrize(
    ("kernel", "padding", "fused"), [(3, "same", 3), (2, "same", 0), (3, "valid", 3), (1, "same", 3)]
)
def test_padding_in_words(kernel: int, padding: str, fused: int) -> None:
    """A kernel of two has more zeros behind than in front, which the operator cannot."""
    net, x = at_odds(kernel, padding), torch.randn(2, 3, 9, 8).contiguous(memory_format=LAST)
    fast, program = run(net, x, Target("cuda", cost=prefer(R.FUSED)))
    assert ways(program)[How.FUSED] == fused
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)


def test_under_inductor_a_gpu_gathers_in_blocks_too() -> None:
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=LAST)
    for compiler in ("eager", "inductor"):
        report = chanopt.explain(run(at_odds(), x, Target("cuda", compiler))[0])
        grains = {reader.name: reader.grain for segment in report.segments for reader in segment.instance.readers}
        assert [grains[name] for name in "bcd"] == [16, 16, 16]


def test_a_widened_weight_takes_no_others_name() -> None:
    net = Net(
        lambda n, x: torch.cat([all_of(n.a(x).relu(), n.b), n.b(n.e(x).relu()) * n.b.weight_covering.sum()], 1),
        a=conv(3, 24, 3),
        e=conv(3, 24, 3),
        b=conv(24, 8),
    )
    net = randomise(net).eval()
    kill(net.b, inputs=range(0, 24, 2))
    net.b.weight_covering = nn.Parameter(torch.full((2,), 3.0))
    net, x = net.double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    fast, _ = run(net, x, Target("cpu", cost=prefer(R.DENSE)))
    assert_same_function(net, fast, (x,))
