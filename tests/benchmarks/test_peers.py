"""UPSCALE side by side: its counts must be those of a survey of its exporter (torchvision 0.28, 224 px)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import peers, zoo
from benchmarks.masks import Setting, build_masked
from benchmarks.measure import relative_error
from benchmarks.peers import Counts

# Network: selections, whole views, proper views, copies, channels and bytes copied; parameters; the
# baseline's copies and bytes. Input masks of 50 %.
SURVEY = {
    "resnet18": (Counts(20, 9, 7, 4, 256, 1103872), 4840770, 19, 4064256),
    "mobilenet_v2": (Counts(34, 19, 10, 5, 208, 153664), 2088886, 34, 5748288),
    "googlenet": (Counts(56, 20, 2, 34, 9120, 6849024), 9885416, 56, 9023840),
    "densenet121": (Counts(120, 59, 4, 57, 16176, 20246016), 3480052, 119, 29628928),
}


def masked(name: str, resolution: int | None = None) -> nn.Module:
    return build_masked(name, Setting("input", 0.5), resolution)


@pytest.mark.parametrize("name", ["resnet18", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_counts_are_those_of_the_survey(name: str) -> None:
    check_survey(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "densenet121"])
def test_counts_of_large_networks_are_those_of_the_survey(name: str) -> None:
    check_survey(name)


def check_survey(name: str) -> None:
    counts, parameters, baseline_copies, baseline_bytes = SURVEY[name]
    model, inputs = masked(name), zoo.example_inputs(name)
    exported, baseline = peers.export(model, inputs), peers.export(model, inputs, "baseline")
    assert exported.counts == counts
    assert exported.parameters == parameters
    assert (baseline.counts.n_copies, baseline.counts.bytes_copied) == (baseline_copies, baseline_bytes)
    assert exported.seconds > 0


@pytest.mark.parametrize("mode", ["index", "runs", "no_reorder", "baseline"])
def test_every_mode_computes_the_masked_network_and_leaves_it_alone(mode: peers.Mode) -> None:
    model, inputs = masked("resnet18", 64), zoo.example_inputs("resnet18", 1, 64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    exported = peers.export(model, inputs, mode)
    assert relative_error(model, exported.module, zoo.example_inputs("resnet18", 2, 64, seed=3)) < 1e-5
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in exported.module.modules())


def test_ordering_saves_copies() -> None:
    model, inputs = masked("resnet18", 64), zoo.example_inputs("resnet18", 1, 64)
    counts = {mode: peers.export(model, inputs, mode).counts for mode in ("index", "no_reorder", "baseline")}
    assert counts["index"].bytes_copied < counts["no_reorder"].bytes_copied < counts["baseline"].bytes_copied


def test_auxiliary_heads_are_not_counted_as_used() -> None:
    model, inputs = masked("googlenet", 64), zoo.example_inputs("googlenet", 1, 64)
    heads = sum(p.numel() for name, p in model.named_parameters() if name.startswith("aux"))
    assert heads > 0
    total = sum(p.numel() for p in model.parameters())
    assert peers.parameters_used(model, inputs) == total - heads


def test_what_it_cannot_export_is_one_kind_of_error() -> None:
    model = build_masked("resnet18", Setting("output", 0.5), 64)
    with pytest.raises(peers.PeerError, match="RuntimeError: running_mean should contain"):
        peers.export(model, zoo.example_inputs("resnet18", 1, 64))
