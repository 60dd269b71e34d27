"""What several files look at: captured once."""

from __future__ import annotations

import pytest
import torch

from chanopt.pruning.smcp import Groups, discover_groups
from chanopt.torchvision_shim import ensure_torchvision
from tests.pruning.smcp.nets import Branches, Residual


@pytest.fixture(scope="session")
def residual() -> Groups:
    return discover_groups(Residual().eval(), (torch.randn(1, 3, 8, 8),))


@pytest.fixture(scope="session")
def branches() -> Groups:
    return discover_groups(Branches().eval(), (torch.randn(1, 3, 8, 8),))


@pytest.fixture(scope="session")
def resnet18() -> tuple[torch.nn.Module, Groups]:
    ensure_torchvision()
    from torchvision.models import resnet18 as build

    torch.manual_seed(0)
    model = build(weights=None).eval()
    return model, discover_groups(model, (torch.randn(1, 3, 64, 64),))
