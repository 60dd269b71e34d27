"""Running one layer alone, on random numbers, with as many channels as a pruner might leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from chanopt.pruning.structure import Layer

__all__ = ["call_of"]


def call_of(
    layer: Layer,
    inputs: int,
    outputs: int,
    groups: int,
    batch: int,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Callable[[], Tensor]:
    """What runs a conv or linear layer with so many channels.

    Args:
        layer: the layer as it is.
        inputs: input channels, over all groups.
        outputs: output channels, over all groups.
        groups: of the conv.
        batch: samples.
        device: where.
        dtype: of everything.
        channels_last: whether images are laid out channels last.
    """

    def random(*shape: int) -> Tensor:
        made = torch.randn(*shape, device=device, dtype=dtype)
        return made.contiguous(memory_format=torch.channels_last) if channels_last and made.ndim == 4 else made

    bias = random(outputs) if layer.bias else None
    if layer.kind == "linear":
        rows, dense = random(batch, *layer.input_size, inputs), random(outputs, inputs)
        return lambda: functional.linear(rows, dense, bias)
    per_group = (inputs, outputs // groups) if "transpose" in layer.kind else (outputs, inputs // groups)
    x, weight = random(batch, inputs, *layer.input_size), random(*per_group, *layer.kernel)
    op = getattr(functional, layer.kind)
    options: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    return lambda: op(x, weight, bias, groups=groups, **options)
