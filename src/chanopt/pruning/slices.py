"""Which entries of a layer's weight belong to which channel, for convs of every kind and for linear layers."""

# torch keeps parameters and buffers of a module in dicts that have no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from chanopt.errors import MaskError

Side: TypeAlias = Literal["input", "output"]
Weighted: TypeAlias = "nn.Linear | _ConvNd"
"""A module whose weight has input and output channels."""

SIDES: tuple[Side, ...] = ("input", "output")


def weighted(model: nn.Module, name: str) -> Weighted:
    """The conv or linear layer of that name.

    Raises:
        MaskError: there is no such module, or it is neither.
    """
    found = dict(model.named_modules()).get(name)
    if found is None:
        names = [other for other, module in model.named_modules() if isinstance(module, nn.Linear | _ConvNd)]
        raise MaskError(
            f"expected the name of a conv or linear layer, found {name!r}; there are {', '.join(names[:8])}"
        )
    if not isinstance(found, nn.Linear | _ConvNd):
        raise MaskError(f"expected {name!r} to be a conv or linear layer, found a {type(found).__name__}")
    return found


def channels(module: Weighted, side: Side) -> int:
    """How many channels a layer has on a side."""
    if isinstance(module, nn.Linear):
        return module.in_features if side == "input" else module.out_features
    return module.in_channels if side == "input" else module.out_channels


def by_channel(weight: Tensor, module: Weighted, side: Side) -> Tensor:
    """A weight (or anything of its shape) as one row a channel: shape (channels of that side, entries).

    The entries of an input channel are those that multiply it; of an output channel, those that make it.
    """
    outs, ins = channels(module, "output"), channels(module, "input")
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    if isinstance(module, _ConvTransposeNd):  # (ins, outs / groups, *kernel)
        table = weight.reshape(groups, ins // groups, outs // groups, -1).transpose(1, 2)
    else:  # (outs, ins / groups, *kernel)
        table = weight.reshape(groups, outs // groups, ins // groups, -1)
    if side == "output":
        return table.reshape(outs, -1)
    return table.transpose(1, 2).reshape(ins, -1)


def pairs(weight: Tensor, module: Weighted) -> Tensor:
    """A weight as (groups, outputs per group, inputs per group, kernel entries)."""
    outs = channels(module, "output")
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    return by_channel(weight, module, "output").reshape(groups, outs // groups, channels(module, "input") // groups, -1)


def element_mask(
    module: Weighted, inputs: Collection[int] | None = None, outputs: Collection[int] | None = None
) -> Tensor:
    """The entries of the weight that are kept where these channels are: bool, shape of the weight.

    Raises:
        MaskError: a channel out of range.
    """
    shape = weight_shape(module)
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    into = _flags(inputs, module, "input").reshape(groups, 1, -1)
    out = _flags(outputs, module, "output").reshape(groups, -1, 1)
    table = into & out  # (groups, outputs per group, inputs per group)
    if isinstance(module, _ConvTransposeNd):
        flat = table.transpose(1, 2).reshape(shape[0], shape[1])
    else:
        flat = table.reshape(shape[0], shape[1])
    return flat.reshape(*flat.shape, *[1] * (len(shape) - 2)).expand(shape).clone()


def weight_shape(module: Weighted) -> torch.Size:
    """The shape of a layer's weight."""
    return original(module).shape


def original(module: nn.Module, name: str = "weight") -> nn.Parameter:
    """The trainable tensor behind a parameter: itself, or what a mask or another parametrisation is put on.

    Raises:
        MaskError: the parameter is missing, or is made of several tensors.
    """
    if parametrize.is_parametrized(module, name):
        table: Any = module.parametrizations
        found = getattr(table[name], "original", None)
    else:
        found = module._parameters.get(name)
        found = module._parameters.get(f"{name}_orig") if found is None else found  # torch.nn.utils.prune
    if not isinstance(found, nn.Parameter):
        raise MaskError(f"expected {type(module).__name__}.{name} to be made of one parameter, found none or several")
    return found


def effective(module: nn.Module, name: str = "weight") -> Tensor:
    """The value that the layer computes with, detached; also where torch.nn.utils.prune has set it aside."""
    mask, plain = module._buffers.get(f"{name}_mask"), module._parameters.get(f"{name}_orig")
    if mask is not None and plain is not None:
        return (plain * mask).detach()
    return getattr(module, name).detach()


def _flags(kept: Collection[int] | None, module: Weighted, side: Side) -> Tensor:
    """Shape (channels,): whether each is kept."""
    count = channels(module, side)
    if kept is None:
        return torch.ones(count, dtype=torch.bool)
    numbers = sorted({int(channel) for channel in kept})
    wrong = [channel for channel in numbers if not 0 <= channel < count]
    if wrong:
        raise MaskError(f"expected kept {side} channels within 0..{count - 1}, found {wrong[:8]}")
    flags = torch.zeros(count, dtype=torch.bool)
    flags[numbers] = True
    return flags
