"""The allocation program against brute force."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from chanopt.errors import AllocationError
from chanopt.pruning import smcp
from chanopt.pruning.smcp.allocation import Allocation, Group, Instance, Layer, Product, Table, allocate
from chanopt.pruning.smcp.allocation import program as program_module
from chanopt.pruning.smcp.allocation.curves import Curves
from chanopt.pruning.smcp.allocation.relaxation import Relaxation
from tests.pruning.smcp.nets import optimum, random_instance

FAMILIES = {
    "products": (120, {"tables": 0.0}),
    "tables": (120, {"tables": 1.0}),
    "fractions": (120, {"tables": 0.5, "whole": False}),
    "single groups": (120, {"sums": 1}),
    "long sums": (100, {"tables": 0.4, "sums": 4}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_the_optimum(family: str) -> None:
    count, options = FAMILIES[family]
    rng = random.Random(sum(map(ord, family)))
    infeasible = 0
    for _ in range(count):
        instance = random_instance(rng, **options)
        best = optimum(instance)
        if best is None:
            infeasible += 1
            with pytest.raises(AllocationError, match="within the target cost"):
                allocate(instance)
            continue
        found = allocate(instance)
        found.check(instance)
        assert found.optimal, instance.to_json()
        assert found.status == "optimal"
        assert found.value == pytest.approx(best, abs=1e-8), instance.to_json()
    assert 0 < infeasible < count


def test_the_program_alone_reaches_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a relaxation there is no bound, no start by prices and no option struck."""
    monkeypatch.setattr(program_module.Relaxation, "of", lambda curves: None)
    rng, solved = random.Random(5), 0
    for _ in range(120):
        instance = random_instance(rng, tables=0.4)
        best = optimum(instance)
        if best is None:
            with pytest.raises(AllocationError, match="dearer"):
                allocate(instance)
            continue
        solved += 1
        assert allocate(instance).value == pytest.approx(best, abs=1e-8), instance.to_json()
    assert solved > 40


def test_relaxation_bounds_every_option() -> None:
    """What an option is worth at most is at least what the best choice with that option is worth."""
    rng, met = random.Random(9), 0
    for _ in range(200):
        instance = replace(random_instance(rng, tables=0.3), cuts=())
        relaxation = Relaxation.of(Curves(instance))
        assert relaxation is not None
        price = rng.uniform(0, 0.3)
        worth = relaxation.worth(price)
        assert relaxation.best(price).bound == pytest.approx(max(worth[0]))
        for kept in product(*(group.options for group in instance.groups)):
            if instance.allows(kept):
                met += 1
                places = [group.options.index(count) for group, count in zip(instance.groups, kept, strict=True)]
                least = min(float(row[place]) for row, place in zip(worth, places, strict=True))
                assert instance.value(kept) <= least + 1e-9
    assert met > 1000


def test_presolve_that_loses_solutions_is_not_believed() -> None:
    """OR-Tools 9.15 calls 53.01 optimal here if options are Booleans that pick both count and value."""
    groups = (
        Group("g0", (2, 4), (4, 22)),
        Group("g1", (4, 5, 6), (0.338820222729006, 1.6556380797986148, 9.495338729868303)),
        Group("g2", (0, 1, 2, 3), (11, 11, 15, 23)),
        Group("g3", (0, 5, 6), (3.8892802468682786, 4.357228649623247, 4.348896550761091)),
        Group("g4", (3, 6), (0, 10)),
    )
    costs = ((58, 21, 20, 44), (25, 40, 11, 0), (58, 40, 10, 3), (34, 47, 21, 59))
    layers = (
        Layer("l0", ((4, 2), (2, 2)), (), Product(4)),
        Layer("l1", ((0, 2), (4, 2)), ((3, 1), (1, 1)), Table((5, 6, 17, 20), (3, 6, 10, 12), costs)),
        Layer("l2", ((0, 1), (1, 2)), ((0, 1), (3, 1)), Product(1)),
        Layer("l4", ((2, 2),), ((4, 2),), Product(4)),
    )
    instance = Instance(groups, layers, 421, ((1, 4),))
    assert allocate(instance).value == pytest.approx(60.38461897673658) == optimum(instance)


@pytest.mark.parametrize("lie", ["INFEASIBLE", "OPTIMAL"])
def test_a_solver_that_denies_what_is_known_proves_nothing(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ortools.sat.python import cp_model

    instance = next(
        instance
        for instance in (random_instance(random.Random(seed), tables=0) for seed in range(200))
        if optimum(instance) is not None and allocate(instance).method == "program"
    )
    honest, calls = allocate(instance), []

    def solve(self: cp_model.CpSolver, model: cp_model.CpModel) -> int:
        calls.append(self.parameters.cp_model_presolve)
        return getattr(cp_model, lie)

    monkeypatch.setattr(cp_model.CpSolver, "solve", solve)
    monkeypatch.setattr(cp_model.CpSolver, "objective_value", property(lambda self: -1.0))
    found = allocate(instance)
    assert calls == [True, False]
    assert not found.optimal
    found.check(instance)
    assert found.bound >= honest.value


def test_the_bound_holds_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, cut_off = random.Random(11), 0
    groups = tuple(
        Group(f"g{g}", tuple(range(13)), tuple(sorted(rng.uniform(0, 100) for _ in range(13)))) for g in range(8)
    )
    pairs = [(a, b) for a in range(8) for b in range(8) if a != b]
    layers = tuple(Layer(f"l{a}.{b}", ((a, 1),), ((b, 1),), Product(rng.randint(1, 9))) for a, b in pairs)
    instance = Instance(groups, layers, 9000)
    short, long = allocate(instance, time_limit=0.001), allocate(instance, time_limit=0.5)
    for found in (short, long):
        found.check(instance)
        cut_off += not found.optimal
        assert found.bound >= max(short.value, long.value) - 1e-6
        assert found.status == ("optimal" if found.optimal else "feasible")
        assert 0 <= found.gap < 0.5
    assert cut_off


def test_cost_is_bilinear_and_exact_at_the_capacity() -> None:
    groups = (Group("a", (1, 2, 3, 4), (1, 2, 3, 4)), Group("b", (1, 2, 3, 4), (1, 2, 3, 4)))
    layer = Layer("ab", ((0, 1),), ((1, 1),), Product(10))
    for capacity, value in ((160, 8), (159, 7), (120, 7), (119, 6), (80, 6), (79, 5), (40, 5), (39, 4), (10, 2)):
        found = allocate(Instance(groups, (layer,), capacity))
        assert found.value == value, capacity
    with pytest.raises(AllocationError, match=r"within the target cost of 9, but the cheapest costs 10"):
        allocate(Instance(groups, (layer,), 9))


def test_infeasible_names_groups_that_must_stay() -> None:
    groups = (Group("input", (3,), (0,)), Group("conv1", (8, 16), (1, 2)))
    layer = Layer("conv1", ((0, 1),), ((1, 1),), Product(9))
    with pytest.raises(AllocationError, match=r"1 groups that must keep all their channels \(input\)"):
        allocate(Instance(groups, (layer,), 100))


def test_cuts_keep_a_channel() -> None:
    groups = (Group("a", (0, 8), (0, 1)), Group("b", (0, 8), (0, 2)))
    layers = (Layer("a", ((0, 1),), (), Product(1)), Layer("b", ((1, 1),), (), Product(2)))
    free = allocate(Instance(groups, layers, 9))
    assert free.kept == (8, 0)
    assert allocate(Instance(groups, layers, 7)).kept == (0, 0)
    with pytest.raises(AllocationError, match="no path from input to output"):
        allocate(Instance(groups, layers, 7, ((0, 1),)))


def test_json_round_trip() -> None:
    rng = random.Random(2)
    for _ in range(50):
        instance = random_instance(rng, tables=0.5, whole=rng.random() < 0.5)
        assert Instance.from_json(instance.to_json()) == instance
    found = allocate(Instance((Group("a", (1, 2), (1, 3)),), (), 5))
    assert Allocation.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Group("a", (), ()), "at least one option"),
        (lambda: Group("a", (2, 1), (1, 2)), "ascending"),
        (lambda: Group("a", (1, 2), (1,)), "2 values"),
        (lambda: Group("a", (1,), (float("nan"),)), "finite"),
        (lambda: Product(1.5), "whole number"),  # type: ignore[arg-type]
        (lambda: Table((1,), (1, 2), ((1,),)), "1 x 2 entries"),
        (lambda: Table((0, 1), (1,), ((1,), (1,))), "from 1 up"),
        (lambda: Table((1,), (1,), ((-1,),)), "not negative"),
        (lambda: Instance((Group("a", (1,), (1,)),) * 2, (), 1), "more than once"),
        (lambda: Instance((), (Layer("l", ((0, 1),), (), Product(1)),), 1), "expected groups within"),
        (lambda: Instance((), (), float("inf")), "finite capacity"),
        (
            lambda: Instance((Group("a", (9,), (1,)),), (Layer("l", ((0, 1),), (), Table((8,), (1,), ((1,),))),), 1),
            "extend the table",
        ),
        (lambda: Instance.from_json("{}"), "KeyError"),
        (lambda: Instance.from_json("nonsense"), "expected the JSON"),
        (lambda: Layer("l", ((0, 0),), (), Product(1)), "pairs"),
        (lambda: Layer("l", ((0, 1), (0, 1)), (), Product(1)), "once"),
    ],
)
def test_what_contradicts_itself_is_refused(make: object, told: str) -> None:
    assert callable(make)
    with pytest.raises(AllocationError, match=told):
        make()


def test_check_finds_what_is_wrong() -> None:
    instance = Instance((Group("a", (1, 2), (1, 3)),), (Layer("a", ((0, 1),), (), Product(4)),), 8)
    found = allocate(instance)
    found.check(instance)
    for wrong in ({"value": 2.0}, {"cost": 4.0}, {"bound": 1.0}, {"kept": (1,)}, {"capacity": 9}):
        with pytest.raises(AllocationError):
            replace(found, **wrong).check(instance)
    with pytest.raises(AllocationError, match="capacity"):
        found.check(replace(instance, capacity=7))


def test_plain_data_knows_no_torch() -> None:
    """As chanopt.solve: the program can be tested, benchmarked and fuzzed alone."""
    home = Path(smcp.__file__).parent
    files = [*(home / "allocation").glob("*.py"), *(home / f"{name}.py" for name in ("costs", "schedule", "tracking"))]
    assert len(files) > 9
    for path in files:
        code = path.read_text(encoding="utf-8").partition("if TYPE_CHECKING:")
        lines = [line for line in code[0].splitlines() if re.match(r"\s*(import|from) ", line)]
        ours = ("chanopt.errors", "chanopt.pruning.smcp.allocation")
        assert lines
        assert [n for n in lines if "torch" in n or ("chanopt" in n and not any(o in n for o in ours))] == [], path.name
