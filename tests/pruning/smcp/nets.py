"""Small networks with everything that a group can be, and random allocation instances."""

from __future__ import annotations

import itertools
import random

import torch
from torch import Tensor, nn

from chanopt.pruning.smcp.allocation import Group, Instance, Layer, Product, Table


class Residual(nn.Module):
    """A stem, one residual block with a bypass, a depthwise conv, and a linear layer after flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.last = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        y = (y + self.norm2(self.conv2(self.norm1(self.conv1(y)).relu()))).relu()
        y = self.last(self.deep(y)).relu()
        return self.fc(nn.functional.adaptive_avg_pool2d(y, 2).flatten(1))


class Branches(nn.Module):
    """Two branches side by side, read by one conv: each may go, but not both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 16, 3, padding=1)
        self.after_left = nn.Conv2d(8, 8, 1)
        self.after_right = nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        left, right = self.left(y).relu(), self.right(y).relu()
        return self.head(torch.cat([self.after_left(left), self.after_right(right)], 1))


def trained_norms(model: nn.Module) -> nn.Module:
    """The model in eval mode with random statistics, so that batch norms are no identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def random_instance(rng: random.Random, *, tables: float = 0.3, whole: bool = True, sums: int = 2) -> Instance:
    """A small instance; costs are whole or fractions, layers read and make up to `sums` groups."""
    groups = []
    for number in range(rng.randint(1, 5)):
        options = sorted(rng.sample(range(9), rng.randint(1, 4)))
        steps = [rng.randint(0, 30) if rng.random() < 0.5 else rng.uniform(0, 10) for _ in options]
        groups.append(Group(f"g{number}", tuple(options), tuple(steps)))
    layers = [_random_layer(rng, number, groups, tables, whole, sums) for number in range(rng.randint(1, 6))]
    full = int(sum(layer.at([group.options[-1] for group in groups]) for layer in layers))
    cuts = [tuple(rng.sample(range(len(groups)), 2))] if rng.random() < 0.3 and len(groups) > 1 else []
    capacity = rng.randint(0, full + 1) if whole else rng.uniform(0, full)
    return Instance(tuple(groups), tuple(layers), capacity, tuple(cuts))


def _random_layer(rng: random.Random, number: int, groups: list[Group], tables: float, whole: bool, sums: int) -> Layer:
    most = min(len(groups), sums)
    inputs, outputs = (
        tuple((group, rng.randint(1, 2)) for group in rng.sample(range(len(groups)), rng.randint(least, most)))
        for least in (1, 0)
    )
    if rng.random() >= tables:
        return Layer(f"l{number}", inputs, outputs, Product(rng.randint(0, 5)))
    ends = [sum(times * groups[group].options[-1] for group, times in side) or 1 for side in (inputs, outputs)]
    rows, columns = (sorted({end, *(rng.randint(1, end) for _ in range(3))}) for end in ends)
    columns = columns if outputs else [1]
    costs = tuple(tuple(rng.randint(0, 60) if whole else rng.uniform(0, 60) for _ in columns) for _ in rows)
    return Layer(f"l{number}", inputs, outputs, Table(tuple(rows), tuple(columns), costs))


def optimum(instance: Instance) -> float | None:
    """The best value by trying everything; None if nothing is allowed."""
    choices = itertools.product(*(group.options for group in instance.groups))
    return max((instance.value(kept) for kept in choices if instance.allows(kept)), default=None)
