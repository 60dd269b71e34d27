"""S10, S11, S19: which layers prune together, and which groups cut the network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chanopt.errors import AllocationError
from chanopt.pruning.smcp import Groups, discover_groups, input_groups, output_groups
from chanopt.torchvision_shim import ensure_torchvision


def by_name(groups: Groups) -> dict[str, int]:
    return {group.name: number for number, group in enumerate(groups.groups)}


@pytest.fixture(scope="module")
def resnet50() -> Groups:
    ensure_torchvision()
    from torchvision.models import resnet50 as build

    return discover_groups(build(weights=None).eval(), (torch.randn(1, 3, 64, 64),))


def expected_resnet50() -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """The 38 groups of layers that share an input, and the 38 whose outputs meet, from the architecture."""
    inputs, outputs = {("conv1",)}, {("conv1",), ("fc",)}
    stream: tuple[str, ...] = ()
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        names = [f"layer{stage}.{block}" for block in range(blocks)]
        for name in names:
            inputs |= {(f"{name}.conv2",), (f"{name}.conv3",)}
            outputs |= {(f"{name}.conv1",), (f"{name}.conv2",)}
        inputs.add((*stream, f"{names[0]}.conv1", f"{names[0]}.downsample.0"))
        stream = tuple(f"{name}.conv1" for name in names[1:])
        meeting = [f"{name}.conv3" for name in names]
        outputs.add((meeting[0], f"{names[0]}.downsample.0", *meeting[1:]))
    return {*inputs, (*stream, "fc")}, outputs


@pytest.mark.slow
def test_s10_resnet50_has_38_groups_on_either_side(resnet50: Groups) -> None:
    inputs, outputs = expected_resnet50()
    assert len(inputs) == len(outputs) == 38
    assert set(input_groups(resnet50.structure)) == inputs
    assert set(output_groups(resnet50.structure)) == outputs


@pytest.mark.slow
def test_s11_resnet50_has_6_cuts(resnet50: Groups) -> None:
    read = [group for group in resnet50.groups if group.consumers]
    assert len(read) == 38
    cuts = {next(iter(group.consumers)) for group in read if group.cut}
    heads = {"conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.1.conv1", "layer3.1.conv1", "layer4.1.conv1"}
    assert cuts == heads
    assert resnet50.norms["layer1.0.downsample.0"] == ("layer1.0.downsample.1",)
    assert sum(len(norms) for norms in resnet50.norms.values()) == 53
    sizes = resnet50.input_sizes()
    assert (sizes["conv1"], sizes["layer1.0.conv1"], sizes["layer4.2.conv3"]) == ((64, 64), (16, 16), (2, 2))


def test_s10_groups_of_a_small_net(residual: Groups) -> None:
    names = {group.name: (set(group.producers), set(group.consumers)) for group in residual.groups}
    assert names["stem"] == ({"stem", "conv2"}, {"conv1", "last"})
    assert names["conv1"] == ({"conv1"}, {"conv2"})
    assert names["last"] == ({"last"}, {"fc"})
    stem, last = (residual.groups[by_name(residual)[name]] for name in ("stem", "last"))
    assert set(stem.through) == {"deep", "norm", "norm2"}
    assert last.consumers["fc"][3] == (12, 13, 14, 15)
    assert [group.prunable for group in residual.groups] == [False, True, True, True, False]


def test_s10_concats_are_groups_of_their_own(branches: Groups) -> None:
    """SMCP's discovery takes a concat for one list of channels, and is silently wrong."""
    places = by_name(branches)
    halves = [branches.groups[n] for name, n in places.items() if set(branches.groups[n].consumers) == {"head"}]
    assert [set(group.producers) for group in halves] == [{"after_left"}, {"after_right"}]
    assert [group.channels for group in halves] == [8, 8]
    assert halves[1].consumers["head"][0] == (8,)


def test_s11_cuts_of_small_nets(residual: Groups, branches: Groups) -> None:
    assert {group.name for group in residual.groups if group.cut and group.prunable} == {"stem", "last"}
    assert residual.norms["conv1"] == ("norm1",)
    places = by_name(branches)
    left, right = places["left"], places["right"]
    assert not branches.groups[left].cut
    assert not branches.groups[right].cut
    assert branches.groups[places["stem"]].cut
    assert branches.connected([left])
    assert not branches.connected([left, right])
    assert branches.cut_in([left]) is None
    assert branches.cut_in([left, right]) == (left, right)


def test_s19_layers_by_name_or_pattern_with_what_they_feed(residual: Groups) -> None:
    def kept(*patterns: str) -> set[str]:
        return {group.name for group in residual.protect(patterns).groups if not group.prunable}

    always = kept()
    assert kept("conv1") - always == {"stem", "conv1"}
    assert kept("stem") - always == {"stem"}
    assert kept(r"conv\d", "fc") - always == {"stem", "conv1", "last"}
    assert kept("deep") - always == {"stem"}
    why = {group.name: group.kept for group in residual.protect(["conv1"]).groups}
    assert why["conv1"] == "conv1 must not be pruned"


def test_s19_a_name_that_matches_nothing_is_an_error(residual: Groups) -> None:
    """In SMCP a stem that is spelled otherwise is pruned although it is meant to be protected."""
    with pytest.raises(AllocationError, match="found 'conv'; nearest: conv"):
        residual.protect(["conv"])


def test_grouped_convs_keep_what_they_touch() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    groups = discover_groups(net.eval(), (torch.randn(1, 3, 4, 4),))
    assert {group.name: group.prunable for group in groups.groups if group.consumers}["2"]
    assert {group.kept for group in groups.groups} >= {"1 works in groups"}
