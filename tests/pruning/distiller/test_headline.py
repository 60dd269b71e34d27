"""The counts that Distiller publishes with its schedules: every one comes out (section 4c of the survey of peers).

Only the structure counts, so the weights are random and nothing is trained. Where Distiller ships a schedule that
forgets a leader, it is mended; as many filters go, and the network is right.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from chanopt import torchvision_shim
from chanopt.pruning.distiller import StructureRemover, load_schedule
from chanopt.pruning.distiller.summaries import total_macs, total_weights
from tests.pruning.distiller.networks import SCHEDULES, cifar, play, resnet20_cifar, resnet56_cifar

CIFAR: list[tuple[str, Callable[[], nn.Module], int, int, int, int]] = [
    ("resnet20_filters.schedule_agp", resnet20_cifar, 50, 30_655_104, 223_536, 120_000),
    ("resnet20_filters.schedule_agp_2", resnet20_cifar, 40, 30_638_720, 246_704, 143_488),
    ("resnet20_filters.schedule_agp_4", resnet20_cifar, 50, 24_723_776, 130_544, 78_776),
    ("resnet56_cifar_filter_rank", resnet56_cifar, 1, 78_856_832, 634_640, 634_640),
    ("resnet56_cifar_filter_rank_v2", resnet56_cifar, 1, 67_797_632, 570_704, 570_704),
    ("resnet56_cifar_channel_rank", resnet56_cifar, 1, 66_592_384, 566_887, 566_887),
]
DENSE = {resnet20_cifar: (40_813_184, 270_896), resnet56_cifar: (125_747_840, 851_504)}

IMAGENET = [
    ("resnet50.schedule_agp.filters", 1_822_031_872, 12_335_296, 12_335_296),
    ("resnet50.schedule_agp.filters_2", 2_037_186_560, 12_671_168, 12_671_168),
    ("resnet50.schedule_agp.filters_3", 2_753_298_432, 17_329_344, 17_329_344),
    ("resnet50.schedule_agp.filters_with_FC", 1_822_031_872, 12_335_296, 12_335_296 - int(0.7 * 2_048_000)),
]


@pytest.mark.parametrize("build", [resnet20_cifar, resnet56_cifar])
def test_d17_the_dense_networks(build: Callable[[], nn.Module]) -> None:
    model = build()
    assert (total_macs(model, cifar()), total_weights(model)[0]) == DENSE[build]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "build", "epochs", "macs", "weights", "nonzero"), CIFAR)
def test_headline_cifar(
    name: str, build: Callable[[], nn.Module], epochs: int, macs: int, weights: int, nonzero: int
) -> None:
    model, inputs = build(), cifar()
    schedule = load_schedule(SCHEDULES / f"{name}.yaml")
    scheduler = schedule.build(model, inputs=inputs, skip={"lr_schedulers"}, on_conflict="leader")
    play(scheduler, epochs)
    assert total_macs(model, inputs) == macs
    assert total_weights(model) == (weights, nonzero)
    (remover,) = (policy for policy in scheduler.policies if isinstance(policy, StructureRemover))
    assert [done.conflicts for done in remover.thinnings] == [()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "macs", "weights", "nonzero"), IMAGENET)
def test_headline_resnet50(name: str, macs: int, weights: int, nonzero: int) -> None:
    torchvision_shim.ensure_torchvision()
    from torchvision.models import resnet50

    model, image = resnet50(weights=None), (torch.randn(1, 3, 224, 224),)
    assert total_weights(model)[0] == 25_502_912
    assert total_macs(model, image) == 4_089_184_256
    schedule = load_schedule(SCHEDULES / f"{name}.yaml")
    small = (torch.randn(1, 3, 64, 64),)
    scheduler = schedule.build(model, inputs=small, skip={"lr_schedulers"})
    play(scheduler, 32)
    found, alive = total_weights(model)
    assert total_macs(model, image) == macs
    assert found == weights
    # A few of 25 million random weights may be exactly zero by themselves.
    assert nonzero - 50 <= alive <= nonzero
