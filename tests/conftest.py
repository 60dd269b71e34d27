"""What every test runs under: one thread, a fixed seed, hypothesis without a clock."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# Several test processes share the machine; a second thread in each only makes them wait for one another.
torch.set_num_threads(1)

# Deadlines measure the machine, not the code. CI repeats the same examples: its failures are never
# coincidences.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    # copy.deepcopy of a graph module whose inputs are a pytree; raised by torch under the name of copyreg.
    config.addinivalue_line("filterwarnings", "ignore:.*LeafSpec.* is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
