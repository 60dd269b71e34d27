"""What an op costs is told for the example's batch, wherever a reshape has moved the batch to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import chanopt


class Tokens(nn.Module):
    """A linear layer whose tokens come before the batch, and one on both merged."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mixed, self.merged = nn.Conv2d(3, 8, 1), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.mixed(self.patches(x).flatten(2).permute(2, 0, 1))
        return self.merged(tokens.transpose(0, 1).reshape(-1, 6))


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_multiplications_are_those_of_the_batch(batch: int) -> None:
    report = chanopt.explain(chanopt.optimize(Tokens().eval(), (torch.randn(batch, 3, 5, 5),)))
    assert report.macs_before == batch * 25 * (3 * 8 + 8 * 6 + 6 * 4)
