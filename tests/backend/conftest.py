"""Every test compiles anew: Dynamo keeps what it compiled for a class, whatever the instance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import chanopt.backend  # noqa: F401  (registers the backend where the package is not installed)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
