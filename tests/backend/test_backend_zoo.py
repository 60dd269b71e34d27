"""Networks of the zoo through the backend: one graph, fewer operations, the outputs of the masked network."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import chanopt
from benchmarks import zoo
from benchmarks.masks import Setting, build_masked
from benchmarks.measure import MAX_ERROR32, relative_error
from tests.backend.small import compiled

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_a_network_of_the_zoo(name: str) -> None:
    size = zoo.entry(name).small
    model = build_masked(name, Setting("both", 0.5), size)
    counters.clear()
    fast = compiled(model)
    with torch.no_grad():
        for batch in (1, 2, 3, 4):
            inputs = zoo.example_inputs(name, batch, size, seed=batch)
            assert relative_error(model, fast, inputs) < MAX_ERROR32
    report = chanopt.explain(fast)
    assert report.macs_after < 0.7 * report.macs_before
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # the first batch, any batch


def test_resnet18_through_inductor() -> None:
    model = build_masked("resnet18", Setting("input", 0.5), 64)
    fast = torch.compile(model, backend="chanopt")
    with torch.inference_mode():
        for seed in range(2):
            assert relative_error(model, fast, zoo.example_inputs("resnet18", 1, 64, seed=seed)) < MAX_ERROR32
    report = chanopt.explain(fast)
    assert report.macs_after < 0.6 * report.macs_before
