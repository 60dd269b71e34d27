"""Values that meet: residual streams, gates, masks, shared convs, branches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.nets.base import Net, add, conv, image, micro


class PostBlock(nn.Module):
    """Residual block with the activation after the add."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, width, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        t = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(t)) + x)


class PreBlock(nn.Module):
    """Pre-activation residual block: batch norm and ReLU read the stream, nothing follows the add."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), conv(width, width)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(t))) * 0.7 + x


@micro("four residual blocks, activation after the add")
def residual_post() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3), *(PostBlock(8) for _ in range(4)), conv(8, 6))


@micro("four residual blocks, activation before the convs; the stream itself is returned too")
def residual_pre() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3), *(PreBlock(8) for _ in range(4)), nn.ReLU(), conv(8, 6))


@micro("residual block with a strided 1x1 conv on the shortcut")
def residual_downsample() -> nn.Module:
    return Net(
        lambda n, x: n.head((n.b(n.a(t := n.stem(x).relu()).relu()) + n.short(t)).relu()),
        stem=conv(3, 8, 3),
        a=conv(8, 8, 3, stride=2),
        b=conv(8, 12, 3),
        short=conv(8, 12, stride=2),
        head=conv(12, 6),
    )


@micro("y = t + t.flip(1): every output channel reads two channels of one producer")
def add_flip() -> nn.Module:
    return Net(lambda n, x: n.b(((t := n.a(x)) + t.flip(1)).relu()), a=conv(3, 8, 3), b=conv(8, 6))


@micro("y = t + t[:, perm] with a permutation that has one long cycle")
def add_permuted() -> nn.Module:
    return Net(
        lambda n, x: (n.b(((t := n.a(x)) + t[:, n.order]).relu()), n.c(t)),
        a=conv(3, 8, 3),
        order=torch.tensor([3, 0, 7, 5, 1, 2, 4, 6]),
        b=conv(8, 6),
        c=conv(8, 4),
    )


@micro("two producers are added in two orders: no order serves both joins")
def add_two_orders() -> nn.Module:
    def body(n: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = n.a(x), n.b(x)
        return n.c((first + second).relu()), n.d((first + second[:, n.order]).relu())

    return Net(
        body,
        a=conv(3, 8, 3),
        b=conv(3, 8),
        order=torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]),
        c=conv(8, 6),
        d=conv(8, 6),
    )


@micro("an add of two streams that are both read elsewhere")
def add_both_read() -> nn.Module:
    def body(n: Net, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second = n.a(x).relu(), n.b(x).relu()
        return n.c(first + second), n.d(first), n.e(second)

    return Net(body, a=conv(3, 8, 3), b=conv(3, 8), c=conv(8, 6), d=conv(8, 5, 3), e=conv(8, 4))


@micro("a value added to itself")
def add_self() -> nn.Module:
    return Net(lambda n, x: n.b((t := n.a(x).relu()) + t), a=conv(3, 8, 3), b=conv(8, 6))


@micro("a weighted add (alpha) and a reversed subtraction")
def add_alpha() -> nn.Module:
    return Net(
        lambda n, x: n.c(torch.add(n.a(x), n.b(x), alpha=0.5).relu()) - torch.rsub(n.d(x), 2.0),
        a=conv(3, 8, 3),
        b=conv(3, 8),
        c=conv(8, 6),
        d=conv(3, 6),
    )


_JOINS = {
    "sub": torch.sub,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "div": lambda a, b: a / (1 + b.abs()),
    "atan2": torch.atan2,
}
for _name, _join in _JOINS.items():
    add(
        f"join_{_name}",
        lambda join=_join: Net(lambda n, x: n.c(join(n.a(x), n.b(x))), a=conv(3, 8, 3), b=conv(3, 8), c=conv(8, 6, 3)),
        f"two producers meet in {_name}; a dead channel is not neutral everywhere",
    )


@micro("in-place add and in-place ReLU on the stream")
def add_in_place() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.a(x)
        t += n.b(x)
        return n.c(F.relu_(t))

    return Net(body, a=conv(3, 8, 3), b=conv(3, 8), c=conv(8, 6))


@micro("a (N, C, 1, 1) value broadcast onto a feature map by add")
def add_broadcast_pool() -> nn.Module:
    return Net(
        lambda n, x: n.c((n.a(x) + n.b(x.mean((2, 3), keepdim=True))).relu()),
        a=conv(3, 8, 3),
        b=conv(3, 8),
        c=conv(8, 6),
    )


@micro("a one-channel value broadcast onto eight channels by add")
def add_broadcast_channel() -> nn.Module:
    return Net(lambda n, x: n.c((n.a(x) + n.b(x)).relu()), a=conv(3, 8, 3), b=conv(3, 1, 3), c=conv(8, 6))


@micro("torch.where with a constant spatial mask, a number on the other side")
def where_mask() -> nn.Module:
    return Net(
        lambda n, x: n.b(torch.where(n.mask, n.a(x).relu(), 0.5)),
        a=conv(3, 8, 3),
        mask=torch.rand(1, 1, 8, 8) > 0.4,
        b=conv(8, 6, 3),
    )


@micro("torch.where between two producers by the sign of a third")
def where_three() -> nn.Module:
    return Net(
        lambda n, x: n.d(torch.where(n.a(x) > 0, n.b(x), n.c(x))),
        a=conv(3, 8, 3),
        b=conv(3, 8),
        c=conv(3, 8, 3),
        d=conv(8, 6),
    )


@micro("multiply by a channel mask kept as a buffer, half zeros: dead channels without a zero weight")
def mask_buffer() -> nn.Module:
    return Net(
        lambda n, x: n.b(n.a(x).relu() * n.mask),
        a=conv(3, 8, 3),
        mask=(torch.arange(8) % 2).float().reshape(1, 8, 1, 1),
        b=conv(8, 6),
    )


@micro("masked_fill with a constant spatial mask")
def masked_fill() -> nn.Module:
    return Net(
        lambda n, x: n.b(n.a(x).masked_fill(n.mask, -1.0)),
        a=conv(3, 8, 3),
        mask=torch.rand(8, 8) > 0.7,
        b=conv(8, 6),
    )


@micro("one conv applied twice in sequence: its outputs are its inputs")
def conv_twice() -> nn.Module:
    return Net(
        lambda n, x: n.b(n.shared(n.shared(n.a(x)).relu()).relu()),
        a=conv(3, 8),
        shared=conv(8, 8, 3),
        b=conv(8, 6),
    )


@micro("one conv on two branches with different producers and readers")
def conv_two_branches() -> nn.Module:
    return Net(
        lambda n, x: (n.c(n.shared(n.a(x)).relu()), n.d(n.shared(n.b(x)).relu())),
        a=conv(3, 8, 3),
        b=conv(3, 8),
        shared=conv(8, 10, 3),
        c=conv(10, 6),
        d=conv(10, 5),
    )


@micro("one head on three scales, as detectors have it")
def shared_head() -> nn.Module:
    def body(n: Net, x: Tensor) -> list[Tensor]:
        first = n.a(x).relu()
        second = n.b(first).relu()
        third = n.c(second).relu()
        return [n.out(n.tower(level).relu()) for level in (first, second, third)]

    return Net(
        body,
        a=conv(3, 8, 3),
        b=conv(8, 8, 3, stride=2),
        c=conv(8, 8, 3, stride=2),
        tower=conv(8, 8, 3),
        out=conv(8, 5),
    )


@micro("two convs that share one weight parameter but not the bias")
def tied_weights() -> nn.Module:
    first, second = conv(8, 8, 3), conv(8, 8, 3)
    second.weight = first.weight
    return Net(
        lambda n, x: n.c(n.second(n.first(n.a(x)).relu()).relu()),
        a=conv(3, 8),
        first=first,
        second=second,
        c=conv(8, 6),
    )


@micro("a branch that nothing reads")
def dead_branch() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.a(x).relu()
        n.c(n.b(t))
        return n.d(t)

    return Net(body, a=conv(3, 8, 3), b=conv(8, 8), c=conv(8, 4), d=conv(8, 6))


@micro("hourglass: down by max pool, up by nearest, added to the skip", image(3, 12))
def hourglass_nearest() -> nn.Module:
    return Net(
        lambda n, x: n.d(F.interpolate(n.c(F.max_pool2d(t := n.a(x).relu(), 2)).relu(), scale_factor=2) + n.b(t)),
        a=conv(3, 8, 3),
        b=conv(8, 8),
        c=conv(8, 8, 3),
        d=conv(8, 6),
    )


@micro("hourglass: down by average pool, up by bilinear to the size of the skip", image(3, 9))
def hourglass_bilinear() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.a(x).relu()
        low = n.c(F.avg_pool2d(t, 2)).relu()
        return n.d(F.interpolate(low, size=t.shape[-2:], mode="bilinear", align_corners=False) + n.b(t))

    return Net(body, a=conv(3, 8, 3), b=conv(8, 8), c=conv(8, 8, 3), d=conv(8, 6))


@micro("a long chain of readers of one stream without any add between them")
def fan_out() -> nn.Module:
    return Net(
        lambda n, x: n.b(t := n.a(x).relu()) + n.c(t) + n.d(t) + n.e(t),
        a=conv(3, 16, 3),
        b=conv(16, 6),
        c=conv(16, 6, 3),
        d=conv(16, 6),
        e=conv(16, 6, 3),
    )


@micro("dropout between the convs, in eval an identity")
def dropout() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3), nn.Dropout(0.5), nn.ReLU(), nn.Dropout2d(0.2), conv(8, 6))
