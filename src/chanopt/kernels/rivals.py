"""Gathered convs without a kernel of ours: cuDNN after a copy, or on all channels with zeros in the weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from chanopt.kernels.call import Call
from chanopt.kernels.configs import Rival
from chanopt.kernels.reference import as_promised, channels, gather, reference


def offered(call: Call) -> tuple[Rival, ...]:
    """The ways that a call has: a prologue, or a filter for each channel, wants the copy."""
    plain = not call.depthwise and call.scale is None and call.pre_act == "none"
    return tuple(Rival) if plain else (Rival.GATHER,)


def by_rival(call: Call, rival: Rival) -> Tensor:
    """The result in one of the two ways; after the copy in ATen, where cuDNN alone does not do all of it."""
    if Rival.ZEROS not in offered(call) or call.x.numel() == 0:
        return reference(call)
    if rival is Rival.ZEROS:
        return as_promised(call, fused_conv(replace(call, weight=_spread(call)), call.x))
    return as_promised(call, fused_conv(call, gather(call.x, channels(call.groups, call.group))))


def _spread(call: Call) -> Tensor:
    """The weight over all channels of `x`; a channel that fills a group up may come twice, with zeros."""
    weight, index = call.weight, channels(call.groups, call.group).long()
    sizes = (weight.shape[0], call.x.shape[1], *weight.shape[2:])
    whole = torch.zeros(sizes, dtype=weight.dtype, device=weight.device).contiguous(memory_format=call.memory_format)
    return whole.index_add_(1, index, weight)


def fused_conv(call: Call, x: Tensor) -> Tensor:
    """A dense conv as cuDNN does it best: with bias, residual and ReLU in one kernel where it has one."""
    bias = None if call.bias is None else call.bias.to(x.dtype)
    geometry = (list(call.stride), list(call.padding), list(call.dilation), 1)
    if x.is_cuda and call.act == "relu" and call.residual is None:
        return torch.cudnn_convolution_relu(x, call.weight, bias, *geometry)
    if x.is_cuda and call.act == "relu" and call.residual is not None:
        return torch.cudnn_convolution_add_relu(x, call.weight, call.residual, 1.0, bias, *geometry)
    every = torch.arange(x.shape[1], device=x.device)
    return reference(replace(call, x=x, groups=every, group=1)) if not x.is_cuda else _eager(call, x, bias)


def _eager(call: Call, x: Tensor, bias: Tensor | None) -> Tensor:
    made = torch.conv2d(x, call.weight, bias, call.stride, call.padding, call.dilation)
    if call.residual is not None:
        made += call.residual
    in_place: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda v: v,
        "relu": torch.relu_,
        "relu6": lambda v: torch.clamp_(v, 0.0, 6.0),
        "silu": lambda v: torch.nn.functional.silu(v, inplace=True),
        "hardswish": lambda v: torch.nn.functional.hardswish(v, inplace=True),
        "sigmoid": torch.sigmoid_,
    }
    return in_place[call.act](made)
