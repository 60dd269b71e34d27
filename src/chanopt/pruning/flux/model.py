"""The tutorial's model: MobileNet v1, a quarter as wide, for images of 96 x 96 pixels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

_WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


def slopehtanh(x: Tensor) -> Tensor:
    """Slope 1 within [-1, 1], slope -1/4 outside: hardtanh(x) - softshrink(x, 1) / 4.

    >>> import torch
    >>> slopehtanh(torch.tensor([-5.0, -1.0, 0.0, 0.5, 1.0, 3.0]))
    tensor([ 0.0000, -1.0000,  0.0000,  0.5000,  1.0000,  0.5000])
    """
    return functional.hardtanh(x) - functional.softshrink(x, 1.0) / 4


class SlopeHardtanh(nn.Module):
    """:func:`slopehtanh` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """As :func:`slopehtanh`."""
        return slopehtanh(x)


class MobileNet(nn.Sequential):
    """A backbone and a head: 3x3 conv, thirteen times depthwise and pointwise conv, mean, two linear layers.

    Every conv is followed by a batch norm and the activation; only pointwise convs have a bias. Input of shape
    (batch, 3, height, width), output (batch, classes).

    Attributes:
        activation: makes the activation's module.
        width: factor on the number of channels.
        fcsize: features between the two linear layers.
        nclasses: output features.
    """

    def __init__(
        self,
        activation: Callable[[], nn.Module] = SlopeHardtanh,
        width: float = 0.25,
        *,
        fcsize: int = 64,
        nclasses: int = 1,
    ) -> None:
        widths = [int(size * width) for size in _WIDTHS]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(widths[0]), activation()]
        for (before, after), stride in zip(pairwise(widths), _STRIDES, strict=True):
            layers += [nn.Conv2d(before, before, 3, stride=stride, padding=1, groups=before, bias=False)]
            layers += [nn.BatchNorm2d(before), activation(), nn.Conv2d(before, after, 1)]
            layers += [nn.BatchNorm2d(after), activation()]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], fcsize), activation()]
        super().__init__(nn.Sequential(*layers), nn.Sequential(*head, nn.Linear(fcsize, nclasses)))
