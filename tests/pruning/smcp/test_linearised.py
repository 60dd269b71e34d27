"""S13, S14: SMCP's own allocation, and what one solve with the true cost makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import chanopt
from chanopt.pruning.importance import Magnitude
from chanopt.pruning.smcp import Groups, MacCost, Options, ParameterCost, choose, instance_of
from chanopt.pruning.smcp.allocation import (
    Group,
    Instance,
    Layer,
    Product,
    Table,
    allocate,
    group_cost,
    linearise,
    solve_dp,
    solve_linearised,
)
from chanopt.pruning.smcp.pruner import _members

CHAIN = Instance(
    (Group("in", (3,), (0,)), Group("ab", (4, 8), (4, 8)), Group("bc", (8, 16), (8, 16)), Group("out", (4,), (0,))),
    (
        Layer("a", ((0, 1),), ((1, 1),), Product(1)),
        Layer("b", ((1, 1),), ((2, 1),), Product(1)),
        Layer("c", ((2, 1),), ((3, 1),), Product(1)),
    ),
    1000,
)


@pytest.mark.parametrize(("side", "cost"), [(1.0, 4 * 16), (0.0, 3 * 4), (0.5, 0.5 * 4 * 16 + 0.5 * 3 * 4)])
def test_s13_group_cost_by_hand(side: float, cost: float) -> None:
    full = [3, 8, 16, 4]
    assert group_cost(CHAIN, 1, 4, full, side) == cost
    deep = Layer("deep", ((1, 1),), (), Product(9))
    with_deep = Instance(CHAIN.groups, (*CHAIN.layers, deep), 1000)
    assert group_cost(with_deep, 1, 4, full, side) == cost + 36
    assert group_cost(CHAIN, 1, 4, [3, 8, 8, 4]) == 4 * 8


def test_s13_sums_of_groups_count_their_share() -> None:
    table = Table((4, 12), (4,), ((1.0,), (7.0,)))
    instance = Instance(
        (Group("a", (4,), (0,)), Group("b", (0, 8), (0, 1)), Group("c", (4,), (0,))),
        (Layer("l", ((0, 1), (1, 1)), ((2, 1),), table),),
        10,
    )
    assert group_cost(instance, 1, 8, [4, 8, 4]) == 6.0
    assert group_cost(instance, 1, 0, [4, 8, 4]) == 0.0


def scores_of(model: nn.Module, groups: Groups) -> dict[str, list[float]]:
    importance = Magnitude(1)
    return {
        group.name: importance.score(_members(model, group, groups), group.channels).tolist()
        for group in groups.groups
        if group.prunable
    }


def test_s14_options_of_groups(residual: Groups) -> None:
    groups = {group.name: group for group in residual.groups}
    options = Options(layer_pruning=True)
    assert options.of(groups["conv1"]) == (0, 8, 16, 24)
    assert options.of(groups["stem"]) == (8, 16)
    assert Options().of(groups["conv1"]) == (8, 16, 24)
    assert Options(multiple=16).of(groups["conv1"]) == tuple(range(1, 25))
    assert Options(multiple=16, chunk=4).of(groups["conv1"]) == tuple(range(4, 25, 4))
    assert Options().of(groups["fc"]) == (5,)
    with pytest.raises(chanopt.errors.AllocationError, match="divides"):
        Options(multiple=8, chunk=3)


def test_s14_chunks_stay_together(residual: Groups) -> None:
    scores = {group.name: [float(n % 7) for n in range(group.channels)] for group in residual.groups}
    kept = choose(residual, scores, ratio=0.5, options=Options(chunk=4)).kept
    for group, channels in zip(residual.groups, kept, strict=True):
        assert not group.prunable or {c // 4 for c in channels} == {c // 4 for c in channels if c % 4 == 0}
        assert not group.prunable or len(channels) % 8 == 0


def test_s14_scores_are_checked(residual: Groups) -> None:
    with pytest.raises(chanopt.errors.AllocationError, match="expected 16 scores of group 'stem', found none"):
        choose(residual, {})
    scores = {group.name: [1.0] * group.channels for group in residual.groups}
    with pytest.raises(chanopt.errors.AllocationError, match="finite"):
        choose(residual, {**scores, "stem": [float("nan")] * 16})


@pytest.mark.slow
def test_s14_acceptance_one_solve_lands_on_the_target(resnet18: tuple[nn.Module, Groups]) -> None:
    """resnet18, half the weights: SMCP estimates 5.836 of 5.840 and really lands at 3.35."""
    model, groups = resnet18
    scores = scores_of(model, groups)
    choice = choose(groups, scores, ParameterCost(), 0.5)
    assert choice.target == pytest.approx(5.840, abs=1e-3)
    assert 0.99 * choice.target <= choice.cost <= choice.target
    assert choice.allocation.optimal
    choice.allocation.check(choice.instance)
    assert all(count % 8 == 0 for count, g in zip(choice.allocation.kept, groups.groups, strict=True) if g.prunable)

    check = solve_linearised(choice.instance)
    assert check.estimate * 1e-6 == pytest.approx(5.836, abs=1e-3)
    assert check.estimate <= choice.instance.capacity
    assert check.cost * 1e-6 == pytest.approx(3.35, abs=0.01)
    assert choice.allocation.value > 1.2 * check.value
    assert solve_dp(linearise(choice.instance, [g.channels for g in groups.groups])).value == pytest.approx(check.value)

    fast = chanopt.optimize(model, (torch.randn(1, 3, 64, 64),), masks=choice.masks)
    weights = sum(p.numel() for p in fast.parameters() if p.ndim > 1)
    assert weights == choice.allocation.cost


@pytest.mark.slow
def test_s14_macs_land_on_the_target_too(resnet18: tuple[nn.Module, Groups]) -> None:
    model, groups = resnet18
    choice = choose(groups, scores_of(model, groups), MacCost(), 0.5)
    assert 0.99 * choice.target <= choice.cost <= choice.target
    assert choice.allocation.value > solve_linearised(choice.instance).value


def test_true_cost_beats_the_linearised_one(residual: Groups) -> None:
    """At any ratio: the linearised choice is one of those that the program chooses from."""
    torch.manual_seed(3)
    for ratio in (0.2, 0.4, 0.6):
        scores = {group.name: torch.rand(group.channels).tolist() for group in residual.groups}
        instance = instance_of(residual, scores, ParameterCost(), ratio, Options(multiple=4))
        ours, theirs = allocate(instance), solve_linearised(instance)
        assert ours.optimal
        assert theirs.estimate <= instance.capacity
        assert theirs.cost <= instance.capacity
        assert ours.value >= theirs.value
