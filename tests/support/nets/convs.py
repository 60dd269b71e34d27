"""Kinds of convolution, pooling, padding, resizing, activations and arithmetic with numbers."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.nets.base import Net, add, conv, image, micro, tensors


def _around(*middle: nn.Module, width: int = 8) -> nn.Sequential:
    return nn.Sequential(conv(3, width, 3), *middle, conv(width, 6, 3))


_MAPS: dict[str, tuple[nn.Module, str]] = {
    "relu6": (nn.ReLU6(), "ReLU6"),
    "hardswish": (nn.Hardswish(), "hardswish"),
    "hardsigmoid": (nn.Hardsigmoid(), "hardsigmoid: zero goes to one half"),
    "silu": (nn.SiLU(), "SiLU"),
    "gelu": (nn.GELU(), "GELU"),
    "gelu_tanh": (nn.GELU(approximate="tanh"), "GELU by tanh"),
    "elu": (nn.ELU(), "ELU"),
    "leaky_relu": (nn.LeakyReLU(0.2), "leaky ReLU"),
    "sigmoid": (nn.Sigmoid(), "sigmoid: zero goes to one half"),
    "tanh": (nn.Tanh(), "tanh"),
    "softplus": (nn.Softplus(), "softplus: zero goes to log 2"),
    "mish": (nn.Mish(), "Mish"),
    "prelu_channels": (nn.PReLU(8), "PReLU with one slope per channel"),
    "prelu_one": (nn.PReLU(), "PReLU with one slope for all channels"),
    "max_pool_padded": (nn.MaxPool2d(3, 2, 1), "max pool padded with minus infinity"),
    "max_pool_ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), "max pool with ceil_mode"),
    "avg_pool_padded": (
        nn.AvgPool2d(3, 2, 1),
        "average pool that counts its zero padding: constants differ there",
    ),
    "avg_pool_uncounted": (
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        "average pool, padding not counted",
    ),
    "avg_pool_ceil": (nn.AvgPool2d(3, 2, ceil_mode=True), "average pool with ceil_mode"),
    "adaptive_pool": (nn.AdaptiveAvgPool2d(3), "adaptive average pool to 3x3"),
    "adaptive_max_pool": (nn.AdaptiveMaxPool2d((2, 3)), "adaptive max pool to 2x3"),
    "reflection_pad": (nn.ReflectionPad2d(1), "reflection pad"),
    "replication_pad": (nn.ReplicationPad2d((1, 0, 2, 1)), "replication pad, different on each side"),
    "constant_pad": (nn.ConstantPad2d(1, 0.7), "padded by 0.7: a dead channel is no longer one constant"),
    "zero_pad": (nn.ZeroPad2d((1, 2, 0, 1)), "zero pad, different on each side"),
    "upsample_nearest": (nn.Upsample(scale_factor=2), "nearest upsampling by 2"),
    "upsample_bilinear": (nn.Upsample(scale_factor=1.5, mode="bilinear"), "bilinear upsampling by 1.5"),
    "upsample_bicubic": (nn.Upsample(size=(11, 9), mode="bicubic"), "bicubic resize to a size"),
}
for _name, (_module, _note) in _MAPS.items():
    # A copy per build: two built nets must not share the module of the table.
    add(_name, lambda module=_module: _around(copy.deepcopy(module)), _note)


for _name, _function in {
    "add_one": lambda t: t + 1,
    "affine_numbers": lambda t: 2 * t - 3,
    "divide_number": lambda t: t / 4 + 0.1,
    "reciprocal": lambda t: 1 / (2 + t.abs()),
    "power": lambda t: t**2,
    "clamp": lambda t: t.clamp(-0.3, 0.8),
    "absolute": torch.abs,
    "exponential": lambda t: (-t.abs()).exp(),
    "square_root": lambda t: t.abs().sqrt(),
    "contiguous_float": lambda t: t.contiguous().to(t.dtype).relu(),
}.items():
    add(
        _name,
        lambda f=_function: Net(lambda n, x: n.b(f(n.a(x))), a=conv(3, 8, 3), b=conv(8, 6, 3)),
        f"{_name.replace('_', ' ')} between two convs, the second padded",
    )


@micro("transposed conv, stride 2, output padding")
def transposed() -> nn.Module:
    return _around(nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1), nn.ReLU())


@micro("transposed conv, stride 2, two groups, 8 to 12 channels")
def transposed_grouped() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, 2, groups=2), nn.ReLU(), conv(12, 6))


@micro("transposed depthwise conv")
def transposed_depthwise() -> nn.Module:
    return _around(nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2, groups=8), nn.ReLU())


@micro("1-D convs", tensors((3, 16)))
def conv1d() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 3, 2))


@micro("3-D convs", tensors((3, 4, 6, 6)))
def conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 6, 1))


@micro(
    "an unbatched (C, H, W) input: the channels are axis 0",
    lambda b, d, s: (tensors((8, 8))(3, d, s)[0],),
    fixed_batch=1,
    batch_first=False,
)
def conv_unbatched() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 6, 3))


@micro(
    "an unbatched (C, L) input of 1-D convs",
    lambda b, d, s: (tensors((16,))(3, d, s)[0],),
    fixed_batch=1,
    batch_first=False,
)
def conv1d_unbatched() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 6, 1))


@micro("dilated 3x3 and strided 1x1")
def dilated_strided() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3, dilation=2, padding=2), nn.ReLU(), conv(8, 8, stride=2), nn.ReLU(), conv(8, 6, 3)
    )


@micro("a 3x1 and a 1x5 kernel with their own paddings, strides and dilations", image(3, 12))
def asymmetric_kernel() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, (3, 1), stride=(2, 1), padding=(1, 0)),
        nn.ReLU(),
        nn.Conv2d(8, 6, (1, 5), padding=(0, 4), dilation=(1, 2)),
    )


@micro("F.pad on two sides only, then an unpadded strided conv (TensorFlow's SAME)")
def asymmetric_pad() -> nn.Module:
    return Net(lambda n, x: n.b(F.pad(n.a(x), (0, 1, 0, 1))), a=conv(3, 8, 3), b=conv(8, 6, 3, stride=2, padding=0))


@micro("padding='same', also with an even kernel (dilated, so that both sides get the same)")
def padding_same() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3, padding="same"), nn.Conv2d(8, 6, 2, padding="same", dilation=2))


@micro("padding='valid'")
def padding_valid() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3, padding="valid"), nn.ReLU(), conv(8, 6, 3, padding="valid"))


for _mode in ("reflect", "circular", "replicate"):
    add(
        f"padding_mode_{_mode}",
        lambda mode=_mode: nn.Sequential(
            conv(3, 8, 3, padding_mode=mode), nn.Sigmoid(), conv(8, 6, 3, padding_mode=mode)
        ),
        f"convs with padding_mode={_mode!r}: constants stay constant at the border",
    )


@micro("padding wider than the kernel's reach: some outputs see padding only")
def padding_wide() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3), nn.Sigmoid(), conv(8, 6, 3, padding=4))


@micro("a conv with one output channel: not a depthwise conv")
def one_output_channel() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 1, 3), nn.Sigmoid(), conv(1, 6))


@micro("a conv with one input and one output channel, groups 1", image(1))
def one_channel() -> nn.Module:
    return nn.Sequential(conv(1, 1, 3), nn.ReLU(), conv(1, 6, 3))


@micro("interpolate by scale on a functional call, antialiased downsampling")
def interpolate_down() -> nn.Module:
    return Net(
        lambda n, x: n.b(F.interpolate(n.a(x).relu(), scale_factor=0.5, mode="bilinear", antialias=True)),
        a=conv(3, 8, 3),
        b=conv(8, 6, 3),
    )


@micro("H and W exchanged, flipped and rolled: channels untouched", image(3, 8, 6))
def spatial_moves() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).transpose(2, 3).flip(2).roll(1, 3).relu()), a=conv(3, 8, 3), b=conv(8, 6, 3))


@micro("spatial crop by slicing H and W")
def spatial_crop() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x)[:, :, 1:-1, 2:7].relu()), a=conv(3, 8, 3), b=conv(8, 6, 3))


@micro("blur: a fixed depthwise kernel kept as a buffer")
def blur_pool() -> nn.Module:
    kernel = torch.tensor([1.0, 2.0, 1.0])

    def body(n: Net, x: Tensor) -> Tensor:
        t = F.pad(n.a(x).relu(), (1, 1, 1, 1), mode="reflect")
        return n.b(F.conv2d(t, n.kernel.expand(8, 1, 3, 3), stride=2, groups=8))

    return Net(body, a=conv(3, 8, 3), kernel=(kernel[:, None] * kernel)[None, None] / 16, b=conv(8, 6))


@micro("three 3x3 convs in a chain, no bias anywhere", image(3, 10))
def chain_no_bias() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3, bias=False), nn.ReLU(), conv(8, 8, 3, bias=False), nn.ReLU(), conv(8, 6, 3, bias=False)
    )


@micro("two convs and nothing else")
def two_convs() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3), conv(8, 6, 3))


@micro("one conv: its channels are the network's own")
def one_conv() -> nn.Module:
    return nn.Sequential(conv(3, 6, 3))
