"""Small networks of one feature each, through the backend: the outputs of the masked network, and fewer operations."""

from __future__ import annotations

import copy

import pytest
import torch

import chanopt
from chanopt.frontend.compiled import graphs
from tests.backend.small import compiled, error
from tests.support.masks import mask_randomly
from tests.support.micro import MICRO

QUICK = sorted(MICRO)[::16]
REST = sorted(set(sorted(MICRO)[::4]) - set(QUICK))


def _check(name: str) -> None:
    micro = MICRO[name]
    model = micro.build().double()
    mask_randomly(model, seed=3)
    fast = compiled(model)
    with torch.no_grad():
        for seed in range(2):
            inputs = micro.inputs(micro.fixed_batch or 2, torch.float64, seed)
            other = copy.deepcopy(inputs)
            assert error(model(*inputs), fast(*other)) < 1e-10
    made = graphs(fast)
    if made:
        report = chanopt.explain(fast)
        assert report.macs_after <= report.macs_before


@pytest.mark.parametrize("name", QUICK)
def test_outputs_are_those_of_the_masked_network(name: str) -> None:
    _check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_outputs_are_those_of_the_masked_network_on_more(name: str) -> None:
    _check(name)
