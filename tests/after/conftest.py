"""Three networks after the compiler: what the tests of this folder start from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export

import chanopt
from benchmarks import zoo
from tests.support.masks import mask_randomly

NETS = ("resnet18", "densenet121", "shufflenet_v2_x1_0")


@dataclass(frozen=True)
class Slim:
    """A masked network and what the compiler made of it.

    Attributes:
        name: its name in the zoo.
        masked: the network with zeros.
        fast: the optimised one; tests must not change it.
    """

    name: str
    masked: nn.Module
    fast: fx.GraphModule

    def inputs(self, batch: int) -> Tensor:
        """Images; shape (batch, 3, 64, 64)."""
        return zoo.example_inputs(self.name, batch, 64, seed=batch)[0]

    @functools.cached_property
    def exported(self) -> ExportedProgram:
        """By torch.export, of an open batch; tests must not change it."""
        batch = Dim("batch", min=1, max=65535)
        return export(self.fast, (self.inputs(2),), dynamic_shapes=({0: batch},), strict=False)


@functools.cache
def slim_of(name: str) -> Slim:
    with torch.random.fork_rng(devices=[]):
        masked = zoo.build(name, resolution=64)
        mask_randomly(masked, 1, side="input", mode="uniform", amount=0.5)
        zoo.settle(masked, zoo.calibration_inputs(name, 64))
        fast = chanopt.optimize(masked, zoo.example_inputs(name, 2, 64))
    assert isinstance(fast, fx.GraphModule)
    report = chanopt.explain(fast)
    assert report.macs_after < 0.8 * report.macs_before  # there is something to export
    assert report.slices + report.gathers > 0
    return Slim(name, masked, fast)


@pytest.fixture(params=NETS)
def slim(request: pytest.FixtureRequest) -> Slim:
    return slim_of(request.param)


@pytest.fixture
def net() -> Callable[[str], Slim]:
    return slim_of
