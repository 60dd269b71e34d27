"""The blocks that published networks are made of, at 8 to 24 channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.nets.base import Net, conv, conv_bn_relu, image, micro


class SqueezeExcite(nn.Module):
    """Gate per channel from the pooled channels (Hu et al. 2018, section 3)."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.reduce, self.expand = conv(width, squeezed), conv(squeezed, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class LinearSqueezeExcite(nn.Module):
    """The same gate with linear layers and a view."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(width, squeezed), nn.Linear(squeezed, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        pooled = F.adaptive_avg_pool2d(x, 1).view(batch, channels)
        gate = F.hardsigmoid(self.expand(F.relu(self.reduce(pooled))))
        return x * gate.view(batch, channels, 1, 1)


@micro("squeeze-and-excite gate of 1x1 convs")
def squeeze_excite() -> nn.Module:
    return nn.Sequential(conv_bn_relu(3, 8), SqueezeExcite(8, 4), conv(8, 6))


@micro("squeeze-and-excite gate of linear layers, hardsigmoid")
def squeeze_excite_linear() -> nn.Module:
    return nn.Sequential(conv_bn_relu(3, 8), LinearSqueezeExcite(8, 4), conv(8, 6, 3))


@micro("ECA gate: a 1-D conv that runs over the channel axis, so channels must stay in place")
def eca() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.a(x)
        gate = n.mix(t.mean((2, 3)).unsqueeze(1)).sigmoid()
        return n.b(t * gate.transpose(1, 2).unsqueeze(-1))

    return Net(body, a=conv(3, 8, 3), mix=nn.Conv1d(1, 1, 3, padding=1, bias=False), b=conv(8, 6))


@micro("spatial attention: maximum and mean over channels, conv, gate")
def spatial_attention() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.a(x)
        pooled = torch.cat([t.max(1, keepdim=True).values, t.mean(1, keepdim=True)], 1)
        return n.b(t * n.gate(pooled).sigmoid())

    return Net(body, a=conv(3, 8, 3), gate=conv(2, 1, 5), b=conv(8, 6))


@micro("global response norm (ConvNeXt V2): divides by a mean over channels")
def global_response_norm() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.a(x).relu()
        norm = torch.linalg.vector_norm(t, dim=(2, 3), keepdim=True)
        return n.b(t + n.gamma * t * (norm / (norm.mean(1, keepdim=True) + 1e-6)))

    return Net(body, a=conv(3, 8, 3), gamma=nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5), b=conv(8, 6))


class DenseLayer(nn.Module):
    """Batch norm, ReLU, conv over everything so far (Huang et al. 2017)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), conv(inputs, growth, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


@micro("dense block of three layers, then a transition with pooling")
def dense_block() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3),
        *(DenseLayer(8 + 4 * i, 4) for i in range(3)),
        nn.BatchNorm2d(20),
        nn.ReLU(),
        conv(20, 8),
        nn.AvgPool2d(2),
        conv(8, 6),
    )


@micro("a concat in the middle of a dense block is read by two layers and by the next concat")
def dense_middle() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        first = n.stem(x).relu()
        second = torch.cat([first, n.a(first).relu()], 1)
        third = torch.cat([second, n.b(second).relu(), n.c(second)], 1)
        return n.head(third)

    return Net(body, stem=conv(3, 8, 3), a=conv(8, 4, 3), b=conv(12, 4, 3), c=conv(12, 4), head=conv(20, 6))


@micro("C2f: chunk, two bottlenecks, concat of all (YOLOv8's layout)")
def c2f() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        parts = list(n.enter(x).chunk(2, 1))
        parts.append(parts[-1] + n.b1(n.a1(parts[-1])))
        parts.append(parts[-1] + n.b2(n.a2(parts[-1])))
        return n.head(n.leave(torch.cat(parts, 1)))

    inner = {name: conv_bn_relu(4, 4) for name in ("a1", "b1", "a2", "b2")}
    return Net(body, enter=conv_bn_relu(3, 8, 1), leave=conv_bn_relu(16, 8, 1), head=conv(8, 6), **inner)


@micro("SPPF: three max pools in a chain, concat of all four")
def sppf() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        levels = [n.enter(x)]
        for _ in range(3):
            levels.append(F.max_pool2d(levels[-1], 5, 1, 2))
        return n.head(n.leave(torch.cat(levels, 1)))

    return Net(body, enter=conv_bn_relu(3, 6, 1), leave=conv_bn_relu(24, 8, 1), head=conv(8, 6))


@micro("UNet with two levels, transposed convs and concats", image(3, 12))
def unet() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        first = n.down1(x)
        second = n.down2(F.max_pool2d(first, 2))
        bottom = n.bottom(F.max_pool2d(second, 2))
        level = n.up2(torch.cat([n.grow2(bottom), second], 1))
        return n.head(n.up1(torch.cat([n.grow1(level), first], 1)))

    return Net(
        body,
        down1=conv_bn_relu(3, 8),
        down2=conv_bn_relu(8, 12),
        bottom=conv_bn_relu(12, 16),
        grow2=nn.ConvTranspose2d(16, 8, 2, 2),
        up2=conv_bn_relu(20, 8),
        grow1=nn.ConvTranspose2d(8, 8, 2, 2),
        up1=conv_bn_relu(16, 8),
        head=conv(8, 2),
    )


@micro("Inception block: four branches with a pool, concat")
def inception() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.stem(x)
        pooled = n.pool(F.max_pool2d(t, 3, 1, 1))
        return n.head(torch.cat([n.one(t), n.three(t), n.five(t), pooled], 1))

    return Net(
        body,
        stem=conv_bn_relu(3, 8),
        one=conv_bn_relu(8, 4, 1),
        three=nn.Sequential(conv_bn_relu(8, 6, 1), conv_bn_relu(6, 8)),
        five=nn.Sequential(conv_bn_relu(8, 4, 1), conv_bn_relu(4, 4, 5)),
        pool=conv_bn_relu(8, 4, 1),
        head=conv(20, 6),
    )


@micro("fire module: squeeze, two expansions, concat")
def fire() -> nn.Module:
    return Net(
        lambda n, x: n.head(torch.cat([n.one(t := n.squeeze(x).relu()).relu(), n.three(t).relu()], 1)),
        squeeze=conv(3, 8),
        one=conv(8, 8),
        three=conv(8, 8, 3),
        head=conv(16, 6),
    )


@micro("inverted residual with squeeze-excite and hardswish (MobileNetV3)")
def inverted_residual() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.stem(x)
        inner = F.hardswish(n.depth_bn(n.depth(F.hardswish(n.expand_bn(n.expand(t))))))
        return n.head(F.hardswish(t + n.project_bn(n.project(n.se(inner)))))

    return Net(
        body,
        stem=conv_bn_relu(3, 8),
        expand=conv(8, 16, bias=False),
        expand_bn=nn.BatchNorm2d(16),
        depth=conv(16, 16, 3, groups=16, bias=False),
        depth_bn=nn.BatchNorm2d(16),
        se=LinearSqueezeExcite(16, 8),
        project=conv(16, 8, bias=False),
        project_bn=nn.BatchNorm2d(8),
        head=conv(8, 6),
    )


@micro("bottleneck residual block with batch norms (ResNet-50)")
def bottleneck() -> nn.Module:
    return Net(
        lambda n, x: n.head((n.expand(n.b(n.a(t := n.stem(x)))) + n.short(t)).relu()),
        stem=conv_bn_relu(3, 8),
        a=conv_bn_relu(8, 8, 1),
        b=conv_bn_relu(8, 8),
        expand=nn.Sequential(conv(8, 16, bias=False), nn.BatchNorm2d(16)),
        short=nn.Sequential(conv(8, 16, bias=False), nn.BatchNorm2d(16)),
        head=conv(16, 6),
    )


@micro("ghost module: half of the channels are a depthwise conv of the other half, cut to size")
def ghost() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        primary = n.primary(x)
        return n.head(torch.cat([primary, n.cheap(primary)], 1)[:, :11])

    return Net(body, primary=conv_bn_relu(3, 6, 1), cheap=conv_bn_relu(6, 6, 3, groups=6), head=conv(11, 6))


@micro("Res2Net: split in four, each part adds the one before, concat")
def res2net() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.stem(x)
        parts = torch.split(n.enter(t), 3, 1)
        done = [n.c0(parts[0])]
        done.append(n.c1(parts[1] + done[0]))
        done.append(n.c2(parts[2] + done[1]))
        return n.head((n.leave(torch.cat([*done, parts[3]], 1)) + t).relu())

    inner = {f"c{i}": conv_bn_relu(3, 3) for i in range(3)}
    return Net(
        body,
        stem=conv_bn_relu(3, 8),
        enter=conv_bn_relu(8, 12, 1),
        leave=conv(12, 8),
        head=conv(8, 6),
        **inner,
    )


@micro("HRNet fuse: two resolutions exchanged by strided convs and upsampling, both returned")
def hrnet_fuse() -> nn.Module:
    def body(n: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        high = n.high(x)
        low = n.low(high)
        fused_high = (high + F.interpolate(n.up(low), scale_factor=2, mode="nearest")).relu()
        fused_low = (low + n.down(high)).relu()
        return n.head_high(fused_high), n.head_low(fused_low)

    return Net(
        body,
        high=conv_bn_relu(3, 8),
        low=conv_bn_relu(8, 12, 3, stride=2),
        up=nn.Sequential(conv(12, 8, bias=False), nn.BatchNorm2d(8)),
        down=nn.Sequential(conv(8, 12, 3, stride=2, bias=False), nn.BatchNorm2d(12)),
        head_high=conv(8, 6),
        head_low=conv(12, 6),
    )


@micro("feature pyramid: lateral convs, top-down adds, one output conv a level", image(3, 12))
def feature_pyramid() -> nn.Module:
    def body(n: Net, x: Tensor) -> dict[str, Tensor]:
        first = n.c1(x)
        second = n.c2(first)
        top = n.lateral2(second)
        merged = n.lateral1(first) + F.interpolate(top, size=first.shape[-2:], mode="nearest")
        return {"fine": n.out1(merged), "coarse": n.out2(top)}

    return Net(
        body,
        c1=conv_bn_relu(3, 8),
        c2=conv_bn_relu(8, 12, 3, stride=2),
        lateral1=conv(8, 8),
        lateral2=conv(12, 8),
        out1=conv(8, 6, 3),
        out2=conv(8, 6, 3),
    )


@micro("ShuffleNetV2 unit: chunk, one half transformed, concat, channel shuffle; two in a row")
def shufflenet() -> nn.Module:
    def unit(n: Net, t: Tensor, name: str) -> Tensor:
        left, right = t.chunk(2, dim=1)
        t = torch.cat((left, n.get_submodule(name)(right)), dim=1)
        batch, channels, height, width = t.shape
        return t.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)

    def branch() -> nn.Module:
        return nn.Sequential(
            conv_bn_relu(4, 4, 1),
            conv(4, 4, 3, groups=4, bias=False),
            nn.BatchNorm2d(4),
            conv_bn_relu(4, 4, 1),
        )

    return Net(
        lambda n, x: n.head(unit(n, unit(n, n.stem(x), "first"), "second")),
        stem=conv_bn_relu(3, 8),
        first=branch(),
        second=branch(),
        head=conv(8, 6),
    )


@micro("cross-stage partial block: two 1x1 convs of one value, one goes through a residual chain, concat")
def csp() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.stem(x)
        inner = n.a(t)
        inner = inner + n.block(inner)
        return n.head(n.merge(torch.cat([inner, n.b(t)], 1)))

    return Net(
        body,
        stem=conv_bn_relu(3, 8),
        a=conv_bn_relu(8, 6, 1),
        b=conv_bn_relu(8, 6, 1),
        block=nn.Sequential(conv_bn_relu(6, 6, 1), conv_bn_relu(6, 6)),
        merge=conv_bn_relu(12, 8, 1),
        head=conv(8, 6),
    )


@micro("RepVGG block in training form: 3x3, 1x1 and identity branches, each with batch norm, added")
def repvgg() -> nn.Module:
    return Net(
        lambda n, x: n.head((n.three(t := n.stem(x)) + n.one(t) + n.identity(t)).relu()),
        stem=conv_bn_relu(3, 8),
        three=nn.Sequential(conv(8, 8, 3, bias=False), nn.BatchNorm2d(8)),
        one=nn.Sequential(conv(8, 8, bias=False), nn.BatchNorm2d(8)),
        identity=nn.BatchNorm2d(8),
        head=conv(8, 6, 3),
    )


@micro("ASPP: dilated branches and a pooled branch expanded to the map, concat", image(3, 9))
def aspp() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.stem(x)
        pooled = F.interpolate(n.pool(F.adaptive_avg_pool2d(t, 1)), size=t.shape[-2:], mode="bilinear")
        return n.head(n.merge(torch.cat([n.one(t), n.two(t), n.three(t), pooled], 1)))

    return Net(
        body,
        stem=conv_bn_relu(3, 8),
        one=conv_bn_relu(8, 6, 1),
        two=conv_bn_relu(8, 6, 3, dilation=2, padding=2),
        three=conv_bn_relu(8, 6, 3, dilation=3, padding=3),
        pool=conv_bn_relu(8, 6, 1),
        merge=conv_bn_relu(24, 8, 1),
        head=conv(8, 6),
    )


@micro("selective kernel: softmax across two branches gates each channel")
def selective_kernel() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        branches = torch.stack([n.a(x), n.b(x)], 1)
        pooled = branches.sum(1).mean((2, 3), keepdim=True)
        gates = n.expand(n.reduce(pooled).relu()).unflatten(1, (2, 8)).softmax(1)
        return n.head((branches * gates).sum(1))

    return Net(
        body,
        a=conv_bn_relu(3, 8),
        b=conv_bn_relu(3, 8, 1),
        reduce=conv(8, 4),
        expand=conv(4, 16),
        head=conv(8, 6),
    )
