"""Emitted modules write in place: never over what the user, another reader or autograd still needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import chanopt
from tests.support.nets.base import Net, conv, image, randomise

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "leaky_relu of negative slope": lambda t: F.leaky_relu(t, -0.3),
    "elu": F.elu,
    "elu of negative alpha": lambda t: F.elu(t, -0.5),
    "sigmoid": torch.sigmoid,
    "two in a row": lambda t: F.silu(F.relu(t)),
    "of a sum": lambda t: F.relu(t + t.sigmoid()),
    "of a concat": lambda t: F.relu(torch.cat([t, t.tanh()], 1))[:, :8],
    "of a product": lambda t: F.relu(t * t.sigmoid()),
    "of a value that is read again": lambda t: F.relu(t) * t,
    "of a slice": lambda t: torch.cat([F.relu(t[:, :4]), t[:, 4:]], 1),
    "a chain of sums": lambda t: F.relu(F.relu(t + t.tanh()) + t.exp().clamp(max=3)),
}


def batch(seed: int) -> tuple[Any, ...]:
    return image()(3, torch.float64, seed)


@pytest.fixture(scope="module", params=list(ACTIVATIONS))
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    torch.manual_seed(0)
    body = ACTIVATIONS[request.param]
    net = randomise(Net(lambda n, x: n.b(body(n.a(x))), a=conv(3, 8, 3), b=conv(8, 4))).eval().double()
    return net, chanopt.optimize(net, batch(0))


def test_outputs(pair: tuple[Any, Any]) -> None:
    net, fast = pair
    with torch.no_grad():
        assert torch.allclose(fast(*batch(1)), net(*batch(1)), atol=1e-12)


def test_gradients(pair: tuple[Any, Any]) -> None:
    net, fast = pair
    (x,) = batch(1)
    for module in (net, fast):
        module.zero_grad()
        module(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(fast.get_parameter(name).grad, parameter.grad, rtol=1e-10, atol=1e-10)


def test_there_is_something_in_place_here() -> None:
    """Or these tests would prove nothing."""
    net = randomise(Net(lambda n, x: n.b(n.a(x).relu() + n.c(x)), a=conv(3, 8, 3), b=conv(8, 4), c=conv(3, 8))).eval()
    fast: Any = chanopt.optimize(net, image()(2, torch.float32, 0))
    targets = {str(node.target) for node in fast.graph.nodes}
    assert {"aten.relu_.default", "aten.add_.Tensor"} <= targets


@pytest.mark.parametrize(
    "body",
    [
        lambda n, x: n.a(F.relu(x)),
        lambda n, x: n.a(x + 1),
        lambda n, x: (n.a(F.relu(x)), x),
        lambda n, x: n.a(F.relu(x.flip(3)[..., 2:])),
        lambda n, x: n.a(F.relu(x[:, :3])),
        lambda n, x: F.relu(x + n.a(x).mean(1, keepdim=True)),
    ],
)
def test_the_users_input_is_not_written_to(body: Any) -> None:
    net = randomise(Net(body, a=conv(3, 4, 3))).eval().double()
    fast: Any = chanopt.optimize(net, batch(0))
    (x,) = batch(1)
    before = x.clone()
    with torch.no_grad():
        first, second = fast(x), fast(x)
    assert torch.equal(x, before)
    leaves = torch.utils._pytree.tree_leaves
    assert all(torch.equal(a, b) for a, b in zip(leaves(first), leaves(second), strict=True))


@pytest.mark.parametrize(
    "body",
    [
        lambda n, x: (t := n.a(x), t.relu()),
        lambda n, x: (t := n.a(x), n.b(t.relu()), t + 1),
        lambda n, x: (t := n.a(x), t + n.a(x)),
        lambda n, x: (t := n.a(x) + n.a(x.flip(3)), t.sigmoid(), t.relu()),
        lambda n, x: ((t := n.a(x))[:, 1:3], t.relu()),
        lambda n, x: (t := n.a(x), t.view(-1, 4, 64), t.view(-1, 4, 64).relu()),
    ],
)
def test_what_is_returned_is_not_written_to(body: Any) -> None:
    net = randomise(Net(body, a=conv(3, 4, 3), b=conv(4, 4))).eval().double()
    fast = chanopt.optimize(net, batch(0))
    with torch.no_grad():
        for a, b in zip(net(*batch(1)), fast(*batch(1)), strict=True):
            assert torch.allclose(a, b, atol=1e-12)


def test_parameters_and_buffers_are_not_written_to() -> None:
    net = randomise(Net(lambda n, x: n.a(x) + F.relu(n.p + 0.0), a=conv(3, 4, 3), p=torch.randn(4, 1, 1))).eval()
    fast = chanopt.optimize(net, image()(2, torch.float32, 0))
    before = {name: tensor.clone() for name, tensor in fast.state_dict().items()}
    with torch.no_grad():
        fast(*image()(2, torch.float32, 1))
    assert all(torch.equal(before[name], tensor) for name, tensor in fast.state_dict().items())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        lambda n, x: (n.a(x) + x).relu(),
        lambda n, x: (x + n.a(x)).relu(),
        lambda n, x: (n.a(x) + F.softmax(n.b(x), 1)).relu(),
        lambda n, x: (F.max_pool2d(n.a(x), 3, 1, 1) + n.b(n.a(x))).relu(),
    ],
)
def test_under_autocast_sums_are_as_wide_as_eager_pytorch_has_them(body: Any, channels_last: bool) -> None:
    """A sum that is written over what a conv has made is as narrow as that."""
    net = randomise(Net(body, a=conv(8, 8), b=conv(8, 8))).eval()
    x = torch.randn(2, 8, 6, 6)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    fast = chanopt.optimize(net, (x,))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, expected = fast(x), net(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
