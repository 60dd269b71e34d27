"""Autocast, channels last and int8 quantisation of what the compiler made (docs/export.md)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import chanopt


class Branches(nn.Module):
    """Readers of one value with masks of their own, a batch norm that stays, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.a = nn.Conv2d(32, 24, 1)
        self.b = nn.Conv2d(32, 24, 3, padding=1)
        self.c = nn.Conv2d(32, 24, 3, padding=1)
        self.head = nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        both = torch.cat([self.a(y) + self.b(y), self.c(y)], 1).relu()
        return self.head(both.mean((2, 3)))


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    net = Branches().eval()
    with torch.no_grad():  # three sets in a circle: no order makes all of them ranges
        net.a.weight[:, 16:] = 0
        net.b.weight[:, [*range(8), *range(24, 32)]] = 0
        net.c.weight[:, [*range(8, 16), *range(24, 32)]] = 0
        net.head.weight[:, ::3] = 0
    fast = chanopt.optimize(net, (torch.randn(2, 3, 16, 16),))
    assert isinstance(fast, fx.GraphModule)
    assert chanopt.explain(fast).gathers > 0
    return net, fast


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, 16, 16)


def error(reference: Tensor, output: Tensor) -> float:
    exact, made = reference.detach().double(), output.detach().double()
    return float((exact - made).abs().max() / exact.abs().max())


class Seen(fx.Interpreter):
    """Runs a graph and keeps what its nodes gave."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if n.op == "call_function" and isinstance(made, Tensor):
            self.values[n.name] = (str(n.target), made.dtype, made.stride(), tuple(made.shape))
        return made


def test_autocast_bf16(pair: tuple[nn.Module, fx.GraphModule], x: Tensor) -> None:
    net, fast = pair
    exact = copy.deepcopy(net).double()(x.double())
    seen = Seen(fast)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dense, slim = net(x), fast(x)
        seen.run(x)
    convs = [dtype for target, dtype, _, _ in seen.values.values() if "conv2d" in target]
    assert convs
    assert set(convs) == {torch.bfloat16}
    assert slim.dtype == dense.dtype
    assert 0 < error(exact, slim) < 2 * error(exact, dense) + 1e-2
    assert error(exact, fast(x)) < 1e-5  # and leaves nothing behind


def test_autocast_trains(pair: tuple[nn.Module, fx.GraphModule], x: Tensor) -> None:
    twin = copy.deepcopy(pair[1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = twin(x).float().square().mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in twin.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last(pair: tuple[nn.Module, fx.GraphModule], x: Tensor, when: str) -> None:
    net, fast = pair
    x = x.to(memory_format=torch.channels_last)
    if when == "after":
        fast = copy.deepcopy(fast).to(memory_format=torch.channels_last)
    else:
        made = chanopt.optimize(copy.deepcopy(net).to(memory_format=torch.channels_last), (x[:2],))
        assert isinstance(made, fx.GraphModule)
        fast = made
    seen = Seen(fast)
    with torch.no_grad():
        assert error(net(x), fast(x)) < 1e-5
        seen.run(x)
    strides = {stride[1] for target, _, stride, _ in seen.values.values() if "conv2d" in target}
    assert strides == {1}  # channels are the innermost axis of every conv's result
    if when == "before":  # and gathers, which index the (N, H, W, C) view, leave it so
        taken = [
            (shape[-1], stride[-1]) for target, _, stride, shape in seen.values.values() if "index_select" in target
        ]
        assert (16, 1) in taken


@pytest.mark.slow
def test_pt2e_int8(pair: tuple[nn.Module, fx.GraphModule], x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao on its own optional libraries
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

        net, fast = pair
        exported = torch.export.export(fast, (x,)).module()
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(exported, quantizer)
        prepared(x)
        quantised = convert_pt2e(prepared)
        with torch.no_grad():
            made, exact = quantised(x), net(x)
    weights = {name: t for name, t in quantised.state_dict().items() if t.dtype == torch.int8}
    shapes = sorted(tuple(t.shape) for t in weights.values())
    assert shapes == sorted(tuple(p.shape) for p in fast.parameters() if p.ndim > 1)  # int8, and as slim
    assert 0 < error(exact, made) < 0.05
    assert float((made.argmax(1) == exact.argmax(1)).double().mean()) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "shufflenet_v2_x1_0"])
def test_whole_networks_under_autocast_and_channels_last(net: Callable[[str], Any], name: str) -> None:
    slim = net(name)
    x = slim.inputs(2)
    with torch.no_grad():
        exact = slim.masked(x)
        assert error(exact, slim.fast(x.to(memory_format=torch.channels_last))) < 1e-4
        with torch.autocast("cpu", torch.bfloat16):
            dense, made = slim.masked(x), slim.fast(x)
    assert error(exact, made) < 2 * error(exact, dense) + 1e-2
