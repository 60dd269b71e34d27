"""How a gather is emitted: over rows wherever channels are on the last axis in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import chanopt
from tests.support.calibrate import calibrate
from tests.support.nets.base import Net, conv, randomise
from tests.support.passes import kill

aten = torch.ops.aten
SETS = ([0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [0, 3, 6, 7])


def three_readers(reader: type[nn.Module], axes: tuple[int, ...] | None) -> nn.Module:
    """A producer of eight channels and three readers of pairwise crossing sets: one of them has to gather."""

    def body(n: Net, x: Tensor) -> tuple[Tensor, ...]:
        t = n.a(x).relu()
        t = t if axes is None else t.permute(axes)
        return tuple(n.get_submodule(f"b{i}")(t) for i in range(3))

    make = conv if reader is nn.Conv2d else nn.Linear
    net = randomise(Net(body, a=conv(3, 8, 3), **{f"b{i}": make(8, 4) for i in range(3)})).eval()
    for number, kept in enumerate(SETS):
        kill(net.get_submodule(f"b{number}"), inputs=[c for c in range(8) if c not in kept])
    return net.double()


def gathers(module: nn.Module) -> list[torch.fx.Node]:
    assert isinstance(module, torch.fx.GraphModule)
    return [node for node in module.graph.nodes if node.target is aten.index_select.default]


@pytest.mark.parametrize(
    ("reader", "axes", "memory_format"),
    [
        (nn.Conv2d, None, torch.channels_last),
        (nn.Linear, (0, 2, 3, 1), torch.contiguous_format),
        (nn.Linear, (0, 2, 3, 1), torch.channels_last),
    ],
    ids=["channels_last", "permuted", "permuted, channels_last"],
)
def test_channels_on_the_last_axis_are_gathered_over_rows(
    reader: type[nn.Module], axes: tuple[int, ...] | None, memory_format: torch.memory_format
) -> None:
    net = calibrate(three_readers(reader, axes), (torch.randn(4, 3, 7, 6, dtype=torch.float64),))
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64).to(memory_format=memory_format)
    fast = chanopt.optimize(net, (x,))
    (gather,) = gathers(fast)
    assert gather.args[1] == 1
    assert isinstance(gather.args[0], torch.fx.Node)
    assert gather.args[0].target is aten.flatten.using_ints
    for batch in (1, 5):
        chanopt.verify(net, fast, (torch.randn(batch, 3, 7, 6, dtype=torch.float64).to(memory_format=memory_format),))


def test_a_gather_keeps_the_memory_format() -> None:
    net = three_readers(nn.Conv2d, None)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    fast = chanopt.optimize(net, (x,))
    for output in fast(x):
        assert output.is_contiguous(memory_format=torch.channels_last)


def test_contiguous_channels_are_gathered_where_they_are() -> None:
    fast = chanopt.optimize(three_readers(nn.Conv2d, None), (torch.randn(2, 3, 7, 6, dtype=torch.float64),))
    (gather,) = gathers(fast)
    assert isinstance(gather.args[0], torch.fx.Node)
    assert gather.args[0].target is not aten.flatten.using_ints


def test_sizes_known_only_at_run_time() -> None:
    net = three_readers(nn.Conv2d, None)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    sizes = {axis: torch.export.Dim(name, min=1, max=64) for axis, name in ((0, "n"), (2, "h"), (3, "w"))}
    fast = chanopt.optimize(torch.export.export(net, (x,), dynamic_shapes=(sizes,)), (x,))
    assert len(gathers(fast)) == 1
    for shape in ((1, 3, 9, 4), (3, 3, 5, 5)):
        fresh = torch.randn(shape, dtype=torch.float64).to(memory_format=torch.channels_last)
        for one, other in zip(net(fresh), fast(fresh), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
