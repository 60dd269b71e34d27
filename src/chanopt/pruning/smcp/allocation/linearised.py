"""SMCP's own allocation, as a check: every group's cost with all other groups as they are now (section 3.3).

A layer's cost is bilinear in its kept inputs and outputs; here the outputs are those of the masks before. The knapsack
then holds its capacity at the old outputs, and far undershoots it at the new ones: SMCP solves again every few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chanopt.pruning.smcp.allocation.instance import Instance, Layer
from chanopt.pruning.smcp.allocation.knapsack import Knapsack, Pick, solve_pareto

__all__ = ["Linearised", "group_cost", "linearise", "solve_linearised"]


@dataclass(frozen=True, slots=True)
class Linearised:
    """What the linearised allocation keeps.

    Attributes:
        kept: channels per group.
        value: what they are worth.
        estimate: the cost that the linearised program counts.
        cost: the true cost.
    """

    kept: tuple[int, ...]
    value: float
    estimate: float
    cost: float


def group_cost(instance: Instance, group: int, count: int, kept: Sequence[int], doublesided: float = 1.0) -> float:
    """What a group costs with so many kept channels, while all other counts, and all layers' other sides, stay.

    Args:
        instance: the program.
        group: the group.
        count: channels that it keeps.
        kept: channels that every group keeps now.
        doublesided: the share of the layers that read the group; the rest is of those that make it (1 is SMCP's
            default, 0 is HALP's). Layers that channels pass through count in full.
    """
    total = 0.0
    for layer in instance.layers:
        reads, makes = (any(g == group for g, _ in side) for side in (layer.inputs, layer.outputs))
        if reads and not layer.outputs:
            total += _marginal(layer, group, count, kept, "inputs")
            continue
        if reads:
            total += doublesided * _marginal(layer, group, count, kept, "inputs")
        if makes:
            total += (1 - doublesided) * _marginal(layer, group, count, kept, "outputs")
    return total


def linearise(instance: Instance, kept: Sequence[int], doublesided: float = 1.0) -> Knapsack:
    """The knapsack of all groups at the present counts."""
    groups = tuple(
        tuple(
            (value, group_cost(instance, number, count, kept, doublesided))
            for count, value in zip(group.options, group.values, strict=True)
        )
        for number, group in enumerate(instance.groups)
    )
    return Knapsack(groups, instance.capacity)


def solve_linearised(
    instance: Instance,
    kept: Sequence[int] | None = None,
    *,
    doublesided: float = 1.0,
    solver: Callable[[Knapsack], Pick] = solve_pareto,
) -> Linearised:
    """One solve of the linearised allocation.

    Args:
        instance: the program.
        kept: channels that every group keeps now; all of them by default.
        doublesided: as for :func:`group_cost`.
        solver: one of the knapsack's.

    Raises:
        AllocationError: nothing fits at the present counts.
    """
    now = [group.options[-1] for group in instance.groups] if kept is None else list(kept)
    pick = solver(linearise(instance, now, doublesided))
    chosen = tuple(
        group.options[item] for group, item in zip(instance.groups, pick.items, strict=True) if item is not None
    )
    return Linearised(chosen, instance.value(chosen), pick.cost, instance.cost(chosen))


def _marginal(layer: Layer, group: int, count: int, kept: Sequence[int], side: str) -> float:
    """What the group's channels on one side add to the layer's cost, the other side as it is."""
    inputs, outputs = layer.counts(kept)
    times = sum(m for g, m in getattr(layer, side) if g == group)
    if side == "inputs":
        rest = inputs - times * kept[group]
        return layer.cost.at(rest + times * count, outputs) - layer.cost.at(rest, outputs)
    rest = outputs - times * kept[group]
    return layer.cost.at(inputs, rest + times * count) - layer.cost.at(inputs, rest)
