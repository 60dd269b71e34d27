"""Normalisations, statistics over channels, batch norm in unusual places, computed weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.nets.base import Net, add, conv, image, micro, parameter, tensors


def _between(norm: nn.Module, width: int = 8) -> nn.Sequential:
    return nn.Sequential(conv(3, width, 3), norm, nn.ReLU(), conv(width, 6))


for _groups in (1, 2, 4, 8):
    add(
        f"group_norm_{_groups}",
        lambda groups=_groups: _between(nn.GroupNorm(groups, 8)),
        f"group norm with {_groups} groups of 8 channels between convs; a removed channel changes the mean",
    )


@micro("layer norm over channels, axes permuted to N, H, W, C and back")
def layer_norm_channels() -> nn.Module:
    return Net(
        lambda n, x: n.b(n.norm(n.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        a=conv(3, 8, 3),
        norm=nn.LayerNorm(8),
        b=conv(8, 6),
    )


@micro("layer norm over C, H and W with affine weights of that shape")
def layer_norm_chw() -> nn.Module:
    return _between(nn.LayerNorm([8, 8, 8]))


@micro("F.layer_norm over [C, H, W] without affine weights")
def layer_norm_plain() -> nn.Module:
    return Net(lambda n, x: n.b(F.layer_norm(n.a(x), [8, 8, 8])), a=conv(3, 8, 3), b=conv(8, 6))


@micro("RMS norm over channels, written out with a parameter")
def rms_norm() -> nn.Module:
    return Net(
        lambda n, x: n.b((t := n.a(x)) * torch.rsqrt(t.square().mean(1, keepdim=True) + 1e-6) * n.gain),
        a=conv(3, 8, 3),
        gain=parameter(1, 8, 1, 1),
        b=conv(8, 6),
    )


@micro("affine instance norm: statistics per channel, so channels may go")
def instance_norm() -> nn.Module:
    return _between(nn.InstanceNorm2d(8, affine=True))


@micro("instance norm without affine weights")
def instance_norm_plain() -> nn.Module:
    return _between(nn.InstanceNorm2d(8))


@micro("local response norm reads neighbouring channels: order and count are fixed")
def local_response_norm() -> nn.Module:
    return _between(nn.LocalResponseNorm(3, alpha=0.5))


@micro("softmax over channels")
def softmax_channels() -> nn.Module:
    return Net(lambda n, x: n.b(F.softmax(n.a(x), dim=1)), a=conv(3, 8, 3), b=conv(8, 6))


@micro("log-softmax over channels at the output")
def log_softmax_output() -> nn.Module:
    return Net(lambda n, x: F.log_softmax(n.b(n.a(x).relu()), dim=1), a=conv(3, 8, 3), b=conv(8, 6))


@micro("argmax over channels is the output: integers that name channels")
def argmax_output() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).relu()).argmax(1), a=conv(3, 8, 3), b=conv(8, 6))


@micro("argmax over channels of a hidden value, returned with a conv of that value")
def argmax_hidden() -> nn.Module:
    return Net(lambda n, x: ((t := n.a(x)).argmax(1), n.b(t.relu())), a=conv(3, 8, 3), b=conv(8, 6))


@micro("t * t.mean(1, keepdim=True): the mean counts every channel")
def channel_mean_product() -> nn.Module:
    return Net(lambda n, x: n.b((t := n.a(x)) * t.mean(1, keepdim=True)), a=conv(3, 8, 3), b=conv(8, 6))


@micro("sum over channels, kept as one channel that a conv reads")
def channel_sum() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).relu().sum(1, keepdim=True)), a=conv(3, 8, 3), b=conv(1, 6))


@micro("sum over channels without the axis, returned")
def channel_sum_output() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).relu()).sum(1), a=conv(3, 8, 3), b=conv(8, 6))


@micro("unit vectors along channels (F.normalize)")
def channel_normalize() -> nn.Module:
    return Net(lambda n, x: n.b(F.normalize(n.a(x), dim=1)), a=conv(3, 8, 3), b=conv(8, 6))


@micro("variance over channels used as a gate")
def channel_variance() -> nn.Module:
    return Net(lambda n, x: n.b((t := n.a(x)) * t.var(1, keepdim=True)), a=conv(3, 8, 3), b=conv(8, 6))


@micro("cumulative sum over channels: nothing may change")
def cumsum_channels() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).cumsum(1) / 4), a=conv(3, 8, 3), b=conv(8, 6))


@micro("sort along channels: not a map, not a join")
def sort_channels() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).sort(1).values), a=conv(3, 8, 3), b=conv(8, 6))


@micro("top-k over channels")
def topk_channels() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).topk(4, 1).values), a=conv(3, 8, 3), b=conv(4, 6))


@micro("conv, batch norm, ReLU, conv")
def batch_norm() -> nn.Module:
    return _between(nn.BatchNorm2d(8))


@micro("batch norm without gamma and beta")
def batch_norm_plain() -> nn.Module:
    return _between(nn.BatchNorm2d(8, affine=False))


@micro("batch norm that keeps no running statistics: it uses those of the batch, also in eval")
def batch_norm_batch_statistics() -> nn.Module:
    return _between(nn.BatchNorm2d(8, track_running_stats=False))


@micro("batch norm after a concat: its parameters span both operands")
def batch_norm_after_cat() -> nn.Module:
    return Net(
        lambda n, x: n.c(n.bn(torch.cat([n.a(x), n.b(x)], 1)).relu()),
        a=conv(3, 8, 3),
        b=conv(3, 4),
        bn=nn.BatchNorm2d(12),
        c=conv(12, 6, 3),
    )


@micro("batch norm directly on the network input")
def batch_norm_on_input() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), conv(3, 8, 3), nn.ReLU(), conv(8, 6))


@micro("conv without bias, batch norm with beta, padded 3x3 reader: dead channels are constants, borders differ")
def batch_norm_beta_border() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3, bias=False), nn.BatchNorm2d(8), conv(8, 6, 3))


@micro("one batch norm applied to two values")
def batch_norm_twice() -> nn.Module:
    return Net(
        lambda n, x: n.c(n.bn(n.a(x)).relu() + n.bn(n.b(x))),
        a=conv(3, 8, 3),
        b=conv(3, 8),
        bn=nn.BatchNorm2d(8),
        c=conv(8, 6),
    )


@micro("two batch norms in a row")
def batch_norm_chain() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6, 3))


@micro("a conv whose output is read by two batch norms: neither may simply fold into it")
def batch_norm_fork() -> nn.Module:
    return Net(
        lambda n, x: (n.b(n.p(t := n.a(x)).relu()), n.c(n.q(t).relu())),
        a=conv(3, 8, 3),
        p=nn.BatchNorm2d(8),
        q=nn.BatchNorm2d(8),
        b=conv(8, 6),
        c=conv(8, 4),
    )


@micro("batch norm after ReLU: it cannot fold into the conv before it")
def batch_norm_after_relu() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), conv(8, 6, 3))


@micro("1-D batch norm between linear layers", tensors((6,)))
def batch_norm_1d() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))


class FrozenNorm(nn.Module):
    """Batch norm written out over buffers, as detection backbones do."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


@micro("frozen batch norm: buffers, rsqrt, mul and add instead of a batch norm op")
def frozen_norm() -> nn.Module:
    return _between(FrozenNorm(8))


@micro("weight_norm on both convs: the weight is computed from two parameters")
def weight_norm() -> nn.Module:
    wrap = nn.utils.parametrizations.weight_norm
    return nn.Sequential(wrap(conv(3, 8, 3)), nn.ReLU(), wrap(conv(8, 6)))


class StandardisedConv(nn.Conv2d):
    """Weight standardisation: zero mean and unit variance per output channel, computed in forward."""

    def forward(self, input: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, correction=0)
        weight = (self.weight - mean) * torch.rsqrt(variance * self.weight[0].numel() + 1e-5)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@micro("weight standardisation: a zero in the parameter is not a zero in the weight that is used")
def weight_standardisation() -> nn.Module:
    return nn.Sequential(StandardisedConv(3, 8, 3, padding=1), nn.ReLU(), StandardisedConv(8, 6, 1))


@micro("one constant factor per channel, shape (1, C, 1, 1)")
def channel_scale() -> nn.Module:
    return Net(
        lambda n, x: n.b((n.a(x) * n.scale).relu()),
        a=conv(3, 8, 3),
        scale=parameter(1, 8, 1, 1),
        b=conv(8, 6),
    )


@micro("layer scale: a bare (C, 1, 1) parameter on the branch of a residual block")
def layer_scale() -> nn.Module:
    return Net(
        lambda n, x: n.head((t := n.stem(x)) + n.gamma * n.b(n.a(t).relu())),
        stem=conv(3, 8, 3),
        a=conv(8, 12),
        b=conv(12, 8),
        gamma=parameter(8, 1, 1),
        head=conv(8, 6),
    )


@micro("one constant added per channel, then a padded conv: constants differ at the border", image(3, 9))
def channel_shift() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x) + n.shift), a=conv(3, 8, 3), shift=parameter(1, 8, 1, 1), b=conv(8, 6, 3))
