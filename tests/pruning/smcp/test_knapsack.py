"""S15: three exact knapsack solvers, the allocation program, and brute force agree."""

from __future__ import annotations

import itertools
import random

import pytest

from chanopt.errors import AllocationError
from chanopt.pruning.smcp.allocation import (
    Group,
    Instance,
    Knapsack,
    Layer,
    Table,
    allocate,
    condense,
    solve_dp,
    solve_halving,
    solve_pareto,
)

SOLVERS = (solve_pareto, solve_dp, solve_halving)


def brute(knapsack: Knapsack) -> float | None:
    none = [] if knapsack.require_item else [(0.0, 0.0)]
    choices = itertools.product(*([*group, *none] for group in knapsack.groups))
    fitting = [sum(v for v, _ in choice) for choice in choices if sum(c for _, c in choice) <= knapsack.capacity]
    return max(fitting, default=None)


@pytest.mark.parametrize("solver", SOLVERS)
def test_s15_solvers_find_the_optimum(solver: object) -> None:
    assert callable(solver)
    rng, infeasible = random.Random(3), 0
    for _ in range(400):
        groups = [
            [(rng.choice([rng.randint(0, 9), rng.random()]), rng.randint(0, 12)) for _ in range(rng.randint(1, 4))]
            for _ in range(rng.randint(1, 5))
        ]
        knapsack = Knapsack(tuple(map(tuple, groups)), rng.randint(0, 25), rng.random() < 0.5)
        best = brute(knapsack)
        if best is None:
            infeasible += 1
            with pytest.raises(AllocationError, match="within the capacity"):
                solver(knapsack)
            continue
        pick = solver(knapsack)
        assert pick.value == pytest.approx(best)
        taken = [group[item] for group, item in zip(knapsack.groups, pick.items, strict=True) if item is not None]
        assert sum(cost for _, cost in taken) == pick.cost <= knapsack.capacity
        assert sum(value for value, _ in taken) == pytest.approx(pick.value)
        assert not knapsack.require_item or None not in pick.items
    assert infeasible


def test_s15_fractions_need_the_pareto_solver() -> None:
    rng = random.Random(4)
    for _ in range(200):
        groups = tuple(
            tuple((rng.random(), rng.random() * 5) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 5))
        )
        knapsack = Knapsack(groups, rng.uniform(5, 20))
        best = brute(knapsack)
        if best is not None:
            assert solve_pareto(knapsack).value == pytest.approx(best)
    with pytest.raises(AllocationError, match="solve_pareto"):
        solve_dp(knapsack)


@pytest.mark.parametrize("groups", [2, 46, 64])
def test_s15_program_and_dynamic_programs_agree(groups: int) -> None:
    """A network in which every layer's cost depends on one group alone."""
    rng = random.Random(groups)
    items = []
    for _ in range(groups):
        count = rng.randint(2, 12)
        values, costs = ([rng.randint(0, 50) for _ in range(count)] for _ in range(2))
        items.append(tuple(zip(values, costs, strict=True)))
    capacity = int(sum(max(cost for _, cost in group) for group in items) * 0.4)
    knapsack = Knapsack(tuple(items), capacity)
    picks = [solver(knapsack) for solver in SOLVERS]
    instance = Instance(
        tuple(
            Group(f"g{n}", tuple(range(1, len(group) + 1)), tuple(value for value, _ in group))
            for n, group in enumerate(items)
        ),
        tuple(
            Layer(f"g{n}", ((n, 1),), (), Table(tuple(range(1, len(group) + 1)), (1,), tuple((c,) for _, c in group)))
            for n, group in enumerate(items)
        ),
        capacity,
    )
    found = allocate(instance)
    assert found.optimal
    assert [pick.value for pick in picks] == [found.value] * len(SOLVERS)


def test_s15_groups_are_condensed_to_their_front() -> None:
    group = [(5, 5), (4, 6), (1, 1), (1, 0.5), (9, 9), (5, 5), (0, 7), (20, 99)]
    assert condense(group, 50) == [3, 0, 4]
    assert condense(group) == [3, 0, 4, 7]
    assert condense([]) == []


def test_a_knapsack_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(AllocationError, match="not negative"):
        Knapsack((((1, -1),),), 3)
    with pytest.raises(AllocationError, match="empty group"):
        Knapsack(((),), 3)
    assert solve_pareto(Knapsack(((),), 3, require_item=False)).items == (None,)
