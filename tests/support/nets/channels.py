"""Channels that are taken apart, put together, reordered: groups, slices, concats, shuffles."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.nets.base import Net, add, conv, image, micro, tensors

for _multiplier in (1, 2, 3):
    add(
        f"depthwise_{_multiplier}",
        lambda m=_multiplier: nn.Sequential(
            conv(3, 8), nn.ReLU(), conv(8, 8 * m, 3, groups=8), nn.ReLU(), conv(8 * m, 6)
        ),
        f"depthwise conv with channel multiplier {_multiplier}",
    )

for _groups in (2, 4):
    add(
        f"grouped_{_groups}",
        lambda g=_groups: nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 8, 3, groups=g), nn.ReLU(), conv(8, 6)),
        f"grouped conv with {_groups} groups in the middle",
    )


@micro("grouped conv that doubles the channels, 4 groups")
def grouped_multiplier() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 16, 3, groups=4), nn.ReLU(), conv(16, 6))


@micro("grouped conv that halves the channels, 2 groups")
def grouped_reducer() -> nn.Module:
    return nn.Sequential(conv(3, 12, 3), nn.ReLU(), conv(12, 6, groups=2), nn.ReLU(), conv(6, 6))


@micro("two grouped convs in a row (2 then 4 groups), with batch norm")
def grouped_chain() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3), conv(8, 16, groups=2), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 8, groups=4), conv(8, 6)
    )


@micro("grouped conv on a residual add")
def grouped_residual() -> nn.Module:
    return Net(
        lambda n, x: n.head(n.g((t := n.stem(x)).relu()) + t),
        stem=conv(3, 8, 3),
        g=conv(8, 8, 3, groups=2),
        head=conv(8, 6),
    )


@micro("chunk into two, one conv each, added")
def chunk_two() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        first, second = n.a(x).relu().chunk(2, 1)
        return n.b(first) + n.c(second)

    return Net(body, a=conv(3, 12, 3), b=conv(6, 6, 3), c=conv(6, 6))


@micro("torch.split with sizes 2, 6, 4; the halves meet in different readers")
def split_sizes() -> nn.Module:
    def body(n: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        small, large, rest = torch.split(n.a(x), [2, 6, 4], dim=1)
        return n.b(large.relu()), n.c(torch.cat([rest, small], 1))

    return Net(body, a=conv(3, 12, 3), b=conv(6, 6, 3), c=conv(6, 5))


@micro("slices x[:, :4] and x[:, 4:] read by two convs")
def slices() -> nn.Module:
    return Net(
        lambda n, x: (n.b((t := n.a(x).relu())[:, :4]), n.c(t[:, 4:])),
        a=conv(3, 12, 3),
        b=conv(4, 6, 3),
        c=conv(8, 6),
    )


@micro("overlapping slices, one counted from the end")
def slices_overlap() -> nn.Module:
    return Net(
        lambda n, x: n.b((t := n.a(x).relu())[:, 1:9]) + n.c(t[:, -8:]),
        a=conv(3, 12, 3),
        b=conv(8, 6),
        c=conv(8, 6, 3),
    )


@micro("strided slices x[:, ::2] and x[:, 1::2]")
def slices_strided() -> nn.Module:
    return Net(
        lambda n, x: n.b((t := n.a(x).relu())[:, ::2]) + n.c(t[:, 1::2]),
        a=conv(3, 12, 3),
        b=conv(6, 6),
        c=conv(6, 6, 3),
    )


@micro("half of the channels pass through a conv, the other half past it (partial conv)")
def partial_conv() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.a(x)
        return n.c(torch.cat([n.b(t[:, :4]), t[:, 4:]], 1))

    return Net(body, a=conv(3, 12, 3), b=conv(4, 4, 3), c=conv(12, 6))


@micro("assignment into a channel slice of a clone (slice_scatter after functionalisation)")
def slice_assign() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.a(x).clone()
        t[:, 2:6] = n.b(t[:, 2:6])
        return n.c(t.relu())

    return Net(body, a=conv(3, 8, 3), b=conv(4, 4), c=conv(8, 6))


@micro("one channel is selected and gates the others")
def select_channel() -> nn.Module:
    return Net(lambda n, x: n.b((t := n.a(x))[:, 1:] * torch.sigmoid(t[:, :1])), a=conv(3, 9, 3), b=conv(8, 6))


@micro("x[:, 2] drops the axis, unsqueeze brings it back")
def select_unsqueeze() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).relu()[:, 2].unsqueeze(1)), a=conv(3, 8, 3), b=conv(1, 6, 3))


@micro("channels picked by a constant index list, one of them twice")
def index_constant() -> nn.Module:
    return Net(
        lambda n, x: n.b(n.a(x).relu()[:, n.index]),
        a=conv(3, 8, 3),
        index=torch.tensor([5, 0, 5, 7, 2]),
        b=conv(5, 6),
    )


@micro("index_select with a constant buffer")
def index_select() -> nn.Module:
    return Net(
        lambda n, x: n.b(torch.index_select(n.a(x).relu(), 1, n.index)),
        a=conv(3, 8, 3),
        index=torch.tensor([6, 1, 3, 0]),
        b=conv(4, 6, 3),
    )


@micro("channels rolled by three")
def roll_channels() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).relu().roll(3, 1)), a=conv(3, 8, 3), b=conv(8, 6))


@micro("channels repeated as a block and one by one")
def repeat_channels() -> nn.Module:
    return Net(
        lambda n, x: n.b((t := n.a(x).relu()).repeat(1, 2, 1, 1)) + n.c(t.repeat_interleave(2, 1)),
        a=conv(3, 6, 3),
        b=conv(12, 6),
        c=conv(12, 6),
    )


@micro("one channel expanded to eight")
def expand_channels() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).expand(-1, 8, -1, -1) * n.c(x)), a=conv(3, 1, 3), b=conv(8, 6), c=conv(3, 8))


@micro("zero channels padded on, then added: the parameter-free shortcut of CIFAR ResNets")
def pad_channels() -> nn.Module:
    return Net(
        lambda n, x: n.head(F.pad((t := n.a(x).relu())[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + n.b(t)),
        a=conv(3, 8, 3),
        b=conv(8, 12, 3, stride=2),
        head=conv(12, 6),
    )


@micro("channel shuffle by view, transpose, reshape")
def channel_shuffle() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.a(x).relu()
        batch, channels, height, width = t.shape
        t = t.view(batch, 4, channels // 4, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return n.b(t)

    return Net(body, a=conv(3, 12, 3), b=conv(12, 6))


@micro("nn.ChannelShuffle between grouped convs")
def native_shuffle() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3), conv(8, 8, groups=2), nn.ReLU(), nn.ChannelShuffle(2), conv(8, 8, groups=2))


@micro("channel shuffle on an add of two streams")
def shuffle_join() -> nn.Module:
    return Net(
        lambda n, x: n.c(n.shuffle(n.a(x) + n.b(x)).relu()),
        a=conv(3, 8, 3),
        b=conv(3, 8),
        shuffle=nn.ChannelShuffle(4),
        c=conv(8, 6, 3),
    )


@micro("pixel shuffle: four channels become one with twice the size")
def pixel_shuffle() -> nn.Module:
    return nn.Sequential(conv(3, 16, 3), nn.ReLU(), nn.PixelShuffle(2), conv(4, 6, 3))


@micro("pixel unshuffle: one channel becomes four of half the size")
def pixel_unshuffle() -> nn.Module:
    return nn.Sequential(conv(3, 4, 3), nn.ReLU(), nn.PixelUnshuffle(2), conv(16, 6, 3))


@micro("pixel shuffle written out with view and permute")
def pixel_shuffle_by_hand() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.a(x).relu()
        batch, _, height, width = t.shape
        t = t.view(batch, 3, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        return n.b(t.reshape(batch, 3, 2 * height, 2 * width))

    return Net(body, a=conv(3, 12, 3), b=conv(3, 6, 3))


@micro("space to depth by slicing H and W (focus)")
def focus() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.a(x).relu()
        corners = [t[..., ::2, ::2], t[..., 1::2, ::2], t[..., ::2, 1::2], t[..., 1::2, 1::2]]
        return n.b(torch.cat(corners, 1))

    return Net(body, a=conv(3, 4, 3), b=conv(16, 6, 3))


@micro("gated linear unit over channels")
def glu() -> nn.Module:
    return Net(lambda n, x: n.b(F.glu(n.a(x), dim=1)), a=conv(3, 16, 3), b=conv(8, 6))


@micro("chunk, SiLU of one half times the other (SwiGLU on images)")
def gated_chunk() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        value, gate = n.a(x).chunk(2, dim=1)
        return n.b(value * F.silu(gate))

    return Net(body, a=conv(3, 16, 3), b=conv(8, 6))


@micro("maxout: view as (C/2, 2) and take the maximum")
def maxout() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.a(x)
        return n.b(t.view(t.shape[0], 8, 2, t.shape[2], t.shape[3]).amax(2))

    return Net(body, a=conv(3, 16, 3), b=conv(8, 6))


@micro("minimum of adjacent channels by unflatten")
def unflatten_min() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).unflatten(1, (2, 8)).amin(1)), a=conv(3, 16, 3), b=conv(8, 6))


@micro("an axis squeezed in and out")
def squeeze_unsqueeze() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).unsqueeze(2).relu().squeeze(2)), a=conv(3, 8, 3), b=conv(8, 6))


@micro("three values stacked on a new axis and summed")
def stack_sum() -> nn.Module:
    return Net(
        lambda n, x: n.d(torch.stack([n.a(x), n.b(x), n.c(x).relu()]).sum(0)),
        a=conv(3, 8, 3),
        b=conv(3, 8),
        c=conv(3, 8),
        d=conv(8, 6),
    )


@micro("stack behind the channels, then flatten: channels interleave")
def stack_interleave() -> nn.Module:
    return Net(
        lambda n, x: n.c(torch.stack([n.a(x), n.b(x).relu()], 2).flatten(1, 2)),
        a=conv(3, 6, 3),
        b=conv(3, 6),
        c=conv(12, 6),
    )


@micro("reshape with the batch written as a number", fixed_batch=2)
def reshape_fixed_batch() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).relu().reshape(2, 8, 64).reshape(2, 8, 8, 8)), a=conv(3, 8, 3), b=conv(8, 6))


@micro("H and W flattened into one axis, 1-D conv over it")
def flatten_spatial() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).relu().flatten(2)), a=conv(3, 8, 3), b=nn.Conv1d(8, 6, 3, padding=1))


@micro("channels and batch exchanged and back")
def transpose_batch() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).transpose(0, 1).relu().transpose(0, 1)), a=conv(3, 8, 3), b=conv(8, 6))


@micro("channels folded into the batch: a conv with one input channel reads each of them")
def channels_as_batch() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.a(x).relu()
        batch, channels, height, width = t.shape
        t = n.each(t.reshape(batch * channels, 1, height, width))
        return n.b(t.reshape(batch, channels, height, width))

    return Net(body, a=conv(3, 8, 3), each=conv(1, 1, 3), b=conv(8, 6))


def _joined(body: Any, **parts: nn.Module) -> Net:
    return Net(body, a=conv(3, 8, 3), b=conv(3, 4), **parts)


@micro("concat of two producers")
def cat_two() -> nn.Module:
    return _joined(lambda n, x: n.c(torch.cat([n.a(x).relu(), n.b(x)], 1)), c=conv(12, 6, 3))


@micro("concat of a value with itself: every channel has two places")
def cat_self() -> nn.Module:
    return Net(lambda n, x: n.c(torch.cat([t := n.a(x).relu(), t], 1)), a=conv(3, 6, 3), c=conv(12, 6, 3))


@micro("concat of a value with itself, both halves activated differently")
def cat_self_crelu() -> nn.Module:
    return Net(lambda n, x: n.c(torch.cat([t := n.a(x), -t], 1).relu()), a=conv(3, 6, 3), c=conv(12, 6))


@micro("concat with the network input, which is pinned")
def cat_input() -> nn.Module:
    return Net(lambda n, x: n.c(torch.cat([x, n.a(x).relu(), x], 1)), a=conv(3, 8, 3), c=conv(14, 6))


@micro("the same two values in two concats of opposite order")
def cat_two_orders() -> nn.Module:
    def body(n: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = n.a(x).relu(), n.b(x).relu()
        return n.c(torch.cat([first, second], 1)), n.d(torch.cat([second, first], 1))

    return _joined(body, c=conv(12, 6), d=conv(12, 5, 3))


@micro("concat along the height: channels meet as in a join")
def cat_height() -> nn.Module:
    return Net(lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], 2)), a=conv(3, 8, 3), b=conv(3, 8), c=conv(8, 6))


@micro("concat along the batch", batch_first=False)
def cat_batch() -> nn.Module:
    return Net(lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], 0)), a=conv(3, 8, 3), b=conv(3, 8), c=conv(8, 6))


@micro("concat, then an add with a third producer")
def cat_add() -> nn.Module:
    return _joined(lambda n, x: n.d(torch.cat([n.a(x), n.b(x)], 1).relu() + n.c(x)), c=conv(3, 12), d=conv(12, 6, 3))


@micro("a concat inside a concat, the inner one also read alone")
def cat_nested() -> nn.Module:
    def body(n: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = torch.cat([n.a(x), n.b(x)], 1).relu()
        return n.d(torch.cat([n.c(x), inner], 1)), n.e(inner)

    return _joined(body, c=conv(3, 4, 3), d=conv(16, 6), e=conv(12, 5))


@micro("a slice that straddles the border of a concat")
def cat_straddle() -> nn.Module:
    return _joined(lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], 1)[:, 5:10].relu()), c=conv(5, 6, 3))


@micro("concat of feature vectors of two sizes, then linear")
def cat_features() -> nn.Module:
    return _joined(
        lambda n, x: n.c(torch.cat([n.a(x).relu().flatten(1), n.b(x).mean((2, 3))], 1)),
        c=nn.Linear(8 * 64 + 4, 5),
    )


@micro("concat of constant channels (a position map kept as a buffer)")
def cat_constant() -> nn.Module:
    return Net(
        lambda n, x: n.c(torch.cat([n.a(x).relu(), n.grid.expand(x.shape[0], -1, -1, -1)], 1)),
        a=conv(3, 8, 3),
        grid=torch.rand(1, 2, 8, 8),
        c=conv(10, 6, 3),
    )


@micro("einsum that mixes channels by a parameter")
def einsum_channels() -> nn.Module:
    return Net(
        lambda n, x: n.b(torch.einsum("nchw,dc->ndhw", n.a(x).relu(), n.weight)),
        a=conv(3, 8, 3),
        weight=nn.Parameter(torch.randn(10, 8) / 3),
        b=conv(10, 6),
    )


@micro("F.conv2d with a bare parameter as weight")
def conv_bare_weight() -> nn.Module:
    return Net(
        lambda n, x: n.b(F.conv2d(n.a(x).relu(), n.weight, padding=1)),
        a=conv(3, 8, 3),
        weight=nn.Parameter(torch.randn(10, 8, 3, 3) / 8),
        b=conv(10, 6),
    )


@micro("matmul of the transposed channels by a parameter", tensors((6, 5)))
def matmul_parameter() -> nn.Module:
    return Net(
        lambda n, x: n.b((n.a(x).relu().transpose(1, 2) @ n.weight).relu()),
        a=nn.Conv1d(6, 8, 1),
        weight=nn.Parameter(torch.randn(8, 10) / 3),
        b=nn.Linear(10, 4),
    )


@micro("unbind a group axis; each part has its own reader", image(3, 6))
def unbind_groups() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        first, second = n.a(x).relu().unflatten(1, (2, 6)).unbind(1)
        return n.b(first) + n.c(second)

    return Net(body, a=conv(3, 12, 3), b=conv(6, 6), c=conv(6, 6, 3))
