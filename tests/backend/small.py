"""Small networks for the backend's tests, and how compiled outputs are compared with the network's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import chanopt
from chanopt.backend.slim import SlimGraph
from chanopt.frontend.compiled import graphs
from tests.support.nets.base import randomise

EAGER: dict[str, Any] = {"compiler": "eager"}


class Branches(nn.Module):
    """A stem with a batch norm, two branches that read different halves of it, a head: everything in small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 6, 1)
        self.right = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        z = self.left(y) + self.right(y)
        return self.head(z.mean((2, 3)))


class Broken(Branches):
    """Branches with a graph break between the stem and the rest."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        torch._dynamo.graph_break()
        z = self.left(y) + self.right(y)
        return self.head(z.mean((2, 3)))


def masked(make: Callable[[], nn.Module] = Branches) -> nn.Module:
    """A network in eval mode with random statistics; of one with ``left`` and ``right``, half of their inputs zero."""
    torch.manual_seed(1)
    model = randomise(make()).eval()
    with torch.no_grad():
        for name, dead in (("left", slice(0, 4)), ("right", slice(2, 6))):
            if hasattr(model, name):
                getattr(model, name).weight[:, dead] = 0
    return model


def images(batch: int = 2, seed: int = 0, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="chanopt", options={**EAGER, **options})


def slim(function: Any) -> tuple[SlimGraph, ...]:
    """The graphs of a compiled function that are optimised now."""
    return tuple(graph for graph in graphs(function) if isinstance(graph, SlimGraph))


def macs(function: Any) -> tuple[int, int]:
    """Multiply-accumulates before and after, over all graphs of a compiled function."""
    report = chanopt.explain(function)
    return report.macs_before, report.macs_after


def error(expected: Any, found: Any) -> float:
    """The greatest relative error over all tensors of two outputs of one structure."""
    reference, spec = pytree.tree_flatten(expected)
    outputs, other = pytree.tree_flatten(found)
    assert spec == other
    return max((_error(a, b) for a, b in zip(reference, outputs, strict=True)), default=0.0)


def _error(expected: Any, found: Any) -> float:
    if not isinstance(expected, Tensor):
        assert expected == found
        return 0.0
    assert expected.shape == found.shape
    assert expected.dtype == found.dtype
    if expected.numel() == 0:
        return 0.0
    if not expected.is_floating_point():
        return float((expected != found).double().mean())
    expected, found = expected.detach(), found.detach()
    scale = float(expected.double().abs().nan_to_num().max()) or 1.0
    gap = (expected.double() - found.double()).abs()
    same = (expected == found) | (expected.isnan() & found.isnan())
    return float(torch.where(same, 0.0, gap).max()) / scale
