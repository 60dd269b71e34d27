"""Running a network that is being trained as it would run afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from torch import nn


@contextlib.contextmanager
def in_eval(model: nn.Module) -> Generator[None, None, None]:
    """Put a network into eval mode for a while; every module is put back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
