"""The operators without a GPU: what they compute, and every part of torch that they must work under."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from chanopt.kernels import ACTIVATIONS, KernelError, gather_conv2d, pack, pack_depthwise

OPS = torch.ops.chanopt
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda v: v,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
INDEX = (3, 17, 4, 22, 30)


def image(format_: str = "nhwc", batch: int = 2, channels: int = 32) -> Tensor:
    return torch.randn(batch, channels, 6, 7).contiguous(memory_format=FORMATS[format_])


def weight(kernel: int = 3, outputs: int = 8) -> Tensor:
    return torch.randn(outputs, len(INDEX), kernel, kernel)


def arguments(format_: str = "nhwc", **changes: Any) -> tuple[Any, ...]:
    """Everything at once: prologue, padding, bias, residual, activation."""
    packed = pack(INDEX, weight(), 32, scale=torch.rand(5) + 0.5, shift=torch.randn(5))
    given = {
        "x": image(format_),
        "weight": packed.weight,
        "bias": torch.randn(8),
        "groups": packed.groups,
        "group": 8,
        "stride": [2, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "scale": packed.scale,
        "shift": packed.shift,
        "pre_act": "relu",
        "residual": torch.randn(2, 8, 3, 7),
        "act": "silu",
        "config": None,
    }
    return tuple((given | changes).values())


def depthwise_arguments() -> tuple[Any, ...]:
    packed, _ = pack_depthwise(INDEX, torch.randn(5, 1, 3, 3), 32)
    return image(), packed.weight, torch.randn(packed.weight.shape[0]), packed.groups, 8, [1, 1], [1, 1]


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_packed_gather_is_a_conv_on_the_channels(dtype: torch.dtype, group: int, format_: str) -> None:
    x, w = image(format_).to(dtype), weight().to(dtype)
    packed = pack(INDEX, w, 32, group=group)
    found = gather_conv2d(x, packed.weight, None, packed.groups, group, padding=1)
    expected = torch.conv2d(x[:, list(INDEX)].double(), w.double(), padding=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("pre_act", ACTIVATIONS)
def test_prologue_padding_bias_residual_activation_in_this_order(pre_act: str, act: str) -> None:
    x, w, bias = image().double(), weight().double(), torch.randn(8).double()
    scale, shift, residual = torch.randn(5).double(), torch.randn(5).double(), torch.randn(2, 8, 6, 7).double()
    found = OPS.gather_conv2d(
        x, w, bias, torch.tensor(INDEX), 1, [1, 1], [1, 1], [1, 1], scale, shift, pre_act, residual, act
    )
    before = ACTS[pre_act](x[:, list(INDEX)] * scale[:, None, None] + shift[:, None, None])
    expected = ACTS[act](torch.conv2d(before, w, bias, padding=1) + residual)
    torch.testing.assert_close(found, expected)


def test_depthwise_places() -> None:
    x, w = image().double(), torch.randn(5, 1, 3, 3).double()
    packed, places = pack_depthwise(INDEX, w, 32)
    found = OPS.gather_depthwise_conv2d(x, packed.weight, None, packed.groups, 8, [1, 1], [1, 1])
    expected = torch.conv2d(x[:, list(INDEX)], w, padding=1, groups=5)
    torch.testing.assert_close(found[:, places], expected)
    others = [c for c in range(found.shape[1]) if c not in places]
    assert found[:, others].abs().max() == 0


@pytest.mark.parametrize("accumulate", [False, True])
def test_into_a_slice(accumulate: bool) -> None:
    args = arguments(residual=None)
    buffer = torch.full((2, 24, 3, 7), 9.0).contiguous(memory_format=torch.channels_last)
    OPS.gather_conv2d_into(buffer[:, 8:16], *args, accumulate=accumulate)
    residual = torch.full((2, 8, 3, 7), 9.0) if accumulate else None
    torch.testing.assert_close(buffer[:, 8:16], OPS.gather_conv2d(*args[:11], residual, *args[12:]))
    assert bool((buffer[:, :8] == 9).all() and (buffer[:, 16:] == 9).all())


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("outputs", [1, 8])
@pytest.mark.parametrize("size", [(6, 7), (1, 7), (6, 1), (1, 1)], ids=str)
def test_fake_results_have_the_strides_of_real_ones(size: tuple[int, int], outputs: int, format_: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.empty(2, 32, *size, memory_format=FORMATS[format_]).normal_()
    packed = pack(INDEX, weight(1, outputs), 32)
    real = gather_conv2d(x, packed.weight, None, packed.groups, 8)
    with FakeTensorMode() as mode:
        fake = gather_conv2d(
            mode.from_tensor(x), mode.from_tensor(packed.weight), None, mode.from_tensor(packed.groups), 8
        )
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("format_", FORMATS)
def test_opcheck_conv(format_: str) -> None:
    args = arguments(format_)
    opcheck(OPS.gather_conv2d.default, args)
    grad = tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    opcheck(OPS.gather_conv2d.default, grad)


def test_opcheck_few_arguments() -> None:
    args = arguments()
    opcheck(OPS.gather_conv2d.default, (args[0], args[1].requires_grad_(), None, args[3], 8))


def test_opcheck_depthwise() -> None:
    args = depthwise_arguments()
    opcheck(OPS.gather_depthwise_conv2d.default, (args[0].requires_grad_(), args[1].requires_grad_(), *args[2:]))


@pytest.mark.parametrize("accumulate", [False, True])
def test_opcheck_into(accumulate: bool) -> None:
    buffer = torch.randn(2, 24, 3, 7).contiguous(memory_format=torch.channels_last)
    args = (buffer[:, 8:16], *arguments(residual=None))
    opcheck(OPS.gather_conv2d_into.default, args, {"accumulate": accumulate})
    depthwise = depthwise_arguments()
    wide = torch.zeros(2, depthwise[1].shape[0], 6, 7)
    opcheck(OPS.gather_depthwise_conv2d_into.default, (wide, *depthwise), {"accumulate": accumulate})


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("depthwise", [False, True])
def test_gradients_are_right(depthwise: bool, act: str) -> None:
    """Against finite differences, in float64, of every tensor at once."""
    x = torch.randn(1, 6, 4, 3, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([2, 0])
    w = torch.randn(4, 1 if depthwise else 4, 2, 2, dtype=torch.float64, requires_grad=True)
    per = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    residual = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    op = OPS.gather_depthwise_conv2d if depthwise else OPS.gather_conv2d

    def compute(*t: Tensor) -> Tensor:
        return op(t[0], t[1], t[2], groups, 2, [1, 1], [0, 0], [1, 1], t[3], t[4], "silu", t[5], act)

    assert torch.autograd.gradcheck(compute, (x, w, *per, residual))


def test_gradients_of_some() -> None:
    """What needs no gradient gets none, and the rest is the same."""
    args = arguments()
    w = args[1].clone().requires_grad_()
    OPS.gather_conv2d(args[0], w, *args[2:]).sum().backward()
    every = [a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    OPS.gather_conv2d(*every).sum().backward()
    torch.testing.assert_close(w.grad, every[1].grad)
    assert args[0].grad is None


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast(enabled: bool) -> None:
    args = arguments(residual=torch.randn(2, 8, 3, 7, dtype=torch.bfloat16 if enabled else torch.float32))
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        found = OPS.gather_conv2d(*args)
        buffer = torch.empty_like(found)
        OPS.gather_conv2d_into(buffer, *args)
    assert found.dtype == (torch.bfloat16 if enabled else torch.float32)
    expected = OPS.gather_conv2d(*args)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)
    torch.testing.assert_close(buffer.float(), expected, rtol=0.05, atol=0.1)


def test_autocast_of_an_inference_leaves_float32_buffers_float32() -> None:
    args = arguments()
    buffer = torch.empty(2, 8, 3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        OPS.gather_conv2d_into(buffer, *args)
    torch.testing.assert_close(buffer, OPS.gather_conv2d(*args))


@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("act", ["none", "relu"])
def test_autocast_of_a_sum_promotes_as_eager_does(wide: torch.dtype, act: str) -> None:
    x, weight = torch.randn(2, 16, 6, 7), torch.randn(8, 16, 3, 3)
    residual = torch.randn(2, 8, 4, 5).to(wide)
    groups = torch.arange(2, dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        found = OPS.gather_conv2d(x, weight, None, groups, 8, residual=residual, act=act)
        expected = torch.conv2d(x, weight) + residual
        expected = expected.relu() if act == "relu" else expected
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.1)


def test_flops_are_those_of_the_conv_on_gathered_channels() -> None:
    args = arguments()
    with FlopCounterMode(display=False) as found:
        OPS.gather_conv2d(*args)
    with FlopCounterMode(display=False) as into:
        OPS.gather_conv2d_into(torch.empty(2, 8, 3, 7), *args)
    with FlopCounterMode(display=False) as expected:
        torch.conv2d(torch.randn(2, args[1].shape[1], 6, 7), args[1], stride=(2, 1), padding=1)
    assert found.get_total_flops() == expected.get_total_flops() == into.get_total_flops() > 0
    assert set(found.get_flop_counts()["Global"]) == {OPS.gather_conv2d}


def test_flops_of_depthwise() -> None:
    args = depthwise_arguments()
    with FlopCounterMode(display=False) as found:
        OPS.gather_depthwise_conv2d(*args)
    channels = args[1].shape[0]
    assert found.get_total_flops() == 2 * 2 * channels * 6 * 7 * 9


class Net(nn.Module):
    """One gather with everything, one into a slice of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        args = arguments()
        for name, tensor in zip(("w", "b", "g"), args[1:4], strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("scale", args[8])
        self.register_buffer("shift", args[9])

    def forward(self, x: Tensor) -> Tensor:
        y = OPS.gather_conv2d(
            x, self.w, self.b, self.g, 8, [1, 1], [1, 1], [1, 1], self.scale, self.shift, "relu", None, "silu"
        )
        buffer = torch.zeros(x.shape[0], 24, *x.shape[2:]).contiguous(memory_format=torch.channels_last)
        OPS.gather_conv2d_into(buffer[:, 8:16], x, self.w, self.b, self.g, 8, [1, 1], [1, 1])
        return torch.cat([y, buffer * 2], 1)


def test_export_keeps_one_node_and_a_dynamic_batch() -> None:
    net = Net().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (image(),), dynamic_shapes=({0: batch},)).run_decompositions({})
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("chanopt.gather_conv2d.default") == 1
    fresh = image(batch=5)
    torch.testing.assert_close(program.module()(fresh), net(fresh))


@pytest.mark.slow
def test_inductor() -> None:
    net = Net().eval()
    fast = torch.compile(net, fullgraph=True)
    for batch in (2, 3):
        x = image(batch=batch)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), net(x))
    x = image().requires_grad_()
    args = arguments()
    compiled = torch.compile(lambda x: OPS.gather_conv2d(x, *args[1:]), fullgraph=True)
    compiled(x).sum().backward()
    again = x.detach().clone().requires_grad_()
    OPS.gather_conv2d(again, *args[1:]).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)


_FRESH = """
import sys, torch
import chanopt.kernels
x, expected = torch.load(sys.argv[2])
found = torch._inductor.aoti_load_package(sys.argv[1])(x)
torch.testing.assert_close(found, expected)
print("equal")
"""


@pytest.mark.slow
def test_aot_inductor_in_a_fresh_process(tmp_path: Path) -> None:
    net, x = Net().eval(), image()
    with torch.no_grad():
        program = torch.export.export(net, (x,))
        # The C++ compiler's time is spent on the wrapper, whose speed is no question here.
        quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
        path = str(tmp_path / "net.pt2")
        package = torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=quick)
        torch.save((x, net(x)), tmp_path / "data.pt")
    command = [sys.executable, "-c", _FRESH, package, str(tmp_path / "data.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_importing_does_not_need_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, chanopt, chanopt.kernels as k\n"
        "k.gather_conv2d(torch.ones(1, 8, 2, 2), torch.ones(8, 8, 1, 1), None, torch.tensor([0]), 8)\n"
        "from chanopt.kernels import aot\n"
        "problem = next(aot.problems())\n"
        "try: aot.compile_kernel(problem, k.heuristic(problem), 90)\n"
        "except k.KernelError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "expected triton to compile kernels with; install it (Linux only)", done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 4}, "expected a weight of shape"),
        ({"groups": torch.tensor([0.0])}, "expected groups as one list of integers"),
        ({"bias": torch.randn(3)}, "expected bias of shape (8,), found (3,)"),
        ({"shift": None}, "expected scale and shift together"),
        ({"act": "gelu"}, "expected act to be one of none, relu, relu6, silu, hardswish, sigmoid, found 'gelu'"),
        ({"residual": torch.randn(2, 8, 3, 3)}, "expected residual of shape (2, 8, 3, 7)"),
        ({"config": [128, 128, 48, 4, 3]}, "expected a config"),
        ({"x": torch.randn(32, 6, 7)}, "expected x of shape (N, C, H, W)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError) as error:
        OPS.gather_conv2d(*arguments(**changes))
    assert message in str(error.value)


def test_bad_out() -> None:
    args = arguments()
    with pytest.raises(KernelError, match="expected out of shape"):
        OPS.gather_conv2d_into(torch.empty(2, 8, 3, 3), *args)
    with pytest.raises(KernelError, match="expected out in torch.float32"):
        OPS.gather_conv2d_into(torch.empty(2, 8, 3, 7).double(), *args)


def test_arguments_of_pack() -> None:
    with pytest.raises(KernelError, match="expected channels from 0 to 31, found \\[32\\]"):
        pack([32], torch.randn(8, 1, 1, 1), 32)
    with pytest.raises(KernelError, match="as many channels as the weight has columns"):
        pack([1, 2], torch.randn(8, 1, 1, 1), 32)
    with pytest.raises(KernelError, match="a multiple of 8 channels"):
        pack([1], torch.randn(8, 1, 1, 1), 30)
    with pytest.raises(KernelError, match="every channel of a depthwise gather once"):
        pack_depthwise([1, 1], torch.randn(2, 1, 1, 1), 32)
    with pytest.raises(KernelError, match="with a prologue once"):
        pack([1, 1], torch.randn(2, 2, 1, 1), 32, scale=torch.ones(2), shift=torch.ones(2))


def test_a_channel_may_be_gathered_twice() -> None:
    x, w = image().double(), torch.randn(4, 3, 1, 1).double()
    packed = pack([5, 9, 5], w, 32)
    torch.testing.assert_close(
        gather_conv2d(x, packed.weight, None, packed.groups, 8), torch.conv2d(x[:, [5, 9, 5]], w)
    )
