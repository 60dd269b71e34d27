"""Small nets with everything a structure has to get right."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two blocks that add to a stream of 8 channels, then a linear layer on 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.one = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1))
        self.two = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        y = (y + self.one(y)).relu()
        y = (y + self.two(y)).relu()
        return self.fc(self.pool(y).flatten(1))


class Dense(nn.Module):
    """Three layers that each read all that came before, side by side."""

    def __init__(self, growth: int = 4, first: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, first, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(first + k * growth, growth, 3, padding=1) for k in range(3))
        self.end = nn.Conv2d(first + 3 * growth, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x).relu()]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)).relu())
        return self.end(torch.cat(parts, 1)).mean((2, 3))


class Mobile(nn.Module):
    """Pointwise, depthwise (two channels for one), pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.middle = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.norm(self.first(x)).relu()).relu())


class Sum(nn.Module):
    """Two producers of one stream, with a border behind: an addition keeps what either makes."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 16, 1)
        self.other = nn.Conv2d(3, 16, 1)
        self.end = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end((self.one(x) + self.other(x)).relu())


class Grouped(nn.Sequential):
    """A grouped conv keeps as many channels in every group as in the fullest; a transposed one in groups keeps all."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.Conv2d(12, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1, groups=4),
            nn.Conv2d(16, 8, 1),
            nn.ConvTranspose2d(8, 8, 2, 2, groups=2),
            nn.Conv2d(8, 6, 1),
        )


class Shared(nn.Module):
    """A conv that is called twice, with a batch norm behind one call: it may become two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.shared = nn.Conv2d(12, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.out = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(self.stem(x).relu()).relu()
        return self.out(y) + self.out(self.norm(self.shared(y)).relu())


class Attention(nn.Module):
    """Projections without a module of their own, and layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 1)
        self.layer = nn.TransformerEncoderLayer(16, 4, 64, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with random batch norms, so that none of them is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.copy_(torch.rand(len(tensor), generator=generator) + 0.2)
    return model.eval()
