"""The solver against brute force over all orders and all cuts."""

from __future__ import annotations

import itertools
import random

import pytest

from chanopt.solve import Block, Edge, Instance, Pin, Preference, Reader, solve
from chanopt.solve.conflicts import _conflicting_regions, shrink, widen
from chanopt.solve.master import Master
from chanopt.solve.pqtree import PQTree, mask_of
from chanopt.solve.problem import Item, Scale, insert, split
from chanopt.solve.search import _Search
from tests.solve.brute import is_run, optimum, random_instances

FAMILIES = {
    "readers": (1500, {}),
    "many small sets": (300, {"channels": (5, 7), "readers": (6, 12)}),
    "eight channels": (40, {"channels": (8, 8), "readers": (3, 9)}),
    "equal weights": (300, {"channels": (5, 6), "readers": (5, 10), "weight": lambda rng: 1}),
    "fractions": (300, {"weight": lambda rng: rng.choice([0.1, 0.2, 0.3, 1e-3, 2.5])}),
    "blocks": (1000, {"blocks": 3}),
    "pins": (600, {"pins": 2, "blocks": 1}),
    "ordered": (600, {"ordered": 0.5, "blocks": 1}),
    "ordered and pins": (600, {"ordered": 0.5, "blocks": 1, "pins": 2, "channels": (2, 6)}),
    "two values": (600, {"channels": (2, 5), "values": 2, "edges": 1, "blocks": 2}),
    "three values": (600, {"channels": (3, 5), "values": 3, "edges": 2, "readers": (4, 10)}),
    "cycles": (600, {"channels": (3, 5), "values": 3, "edges": 4, "readers": (4, 10), "blocks": 2}),
    "everything": (
        600,
        {
            "channels": (3, 5), "values": 3, "edges": 3, "readers": (3, 9),
            "blocks": 2, "pins": 2, "ordered": 0.3, "prefer": 2,
        },
    ),
    "four values": (60, {"channels": (4, 6), "values": 4, "edges": 4, "readers": (8, 14)}),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_objective_is_the_optimum(family: str) -> None:
    count, options = FAMILIES[family]
    for instance in random_instances(hash_of(family), count, **options):
        solution = solve(instance)
        solution.check(instance)
        assert solution.optimal, instance.to_json()
        assert solution.objective == pytest.approx(optimum(instance), rel=1e-12), instance.to_json()


def hash_of(name: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 2**31


def test_master_and_separation_alone_reach_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without triples, families and a good start, every cut must come from the trees."""
    monkeypatch.setattr("chanopt.solve.search.triples", lambda problem: None)
    options = {"channels": (4, 6), "values": 3, "edges": 3, "readers": (5, 10), "blocks": 1, "ordered": 0.2}
    rounds = 0
    for instance in random_instances(5, 150, **options):
        solution = solve(instance)
        solution.check(instance)
        rounds += solution.stats["masters"]
        assert solution.optimal
        assert solution.objective == optimum(instance), instance.to_json()
    assert rounds > 150


CHAINS = {
    "channels": (3, 5),
    "values": 3,
    "readers": (4, 10),
    "blocks": 2,
    "pins": 1,
    "ordered": 0.2,
    "edges": 2,
}


def test_chains_by_intervals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chain by the dynamic program, in time and out of it."""
    monkeypatch.setattr("chanopt.solve.search._FEW_FAMILIES", -1)
    cuts = 0
    for instance in random_instances(6, 300, **CHAINS):
        best = optimum(instance)
        solution = solve(instance)
        solution.check(instance)
        assert (solution.objective, solution.optimal) == (best, True), instance.to_json()
        cuts += len(solution.cut)
        hasty = solve(instance, time_limit=0)
        hasty.check(instance)
        assert hasty.bound <= best <= hasty.objective
    assert cuts


def residual_stage(channels: int, values: int, seed: int) -> Instance:
    rng = random.Random(seed)
    sets = [tuple(rng.sample(range(channels), rng.randint(2, channels - 1))) for _ in range(values)]
    readers = tuple(Reader(f"r{i}", s, len(s), i) for i, s in enumerate(sets))
    return Instance(
        channels, readers, edges=tuple(Edge(f"e{i}", i, i + 1, rng.randint(3, 12)) for i in range(values - 1))
    )


@pytest.mark.parametrize("seed", range(6))
def test_master_and_intervals_agree(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = residual_stage(10, 9, seed)
    monkeypatch.setattr("chanopt.solve.search._FEW_FAMILIES", 10**9)
    by_master = solve(instance)
    monkeypatch.setattr("chanopt.solve.search._FEW_FAMILIES", -1)
    by_intervals = solve(instance)
    assert by_master.optimal
    assert by_intervals.optimal
    assert by_master.objective == by_intervals.objective


@pytest.mark.parametrize("values", [3, 4])
def test_flows_and_cycles_keep_the_optimum(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family as a flow, in trees and cycles, with a start too poor to hide a wrong bound."""
    monkeypatch.setattr("chanopt.solve.search._FEW_FAMILIES", 10**9)
    monkeypatch.setattr("chanopt.solve.search._Search.greedy", _nothing_joined)
    options = {"channels": (4, 5), "values": values, "edges": values + 1, "readers": (6, 12), "blocks": 1}
    for instance in random_instances(values, 120, **options):
        solution = solve(instance)
        solution.check(instance)
        assert (solution.objective, solution.optimal) == (optimum(instance), True), instance.to_json()


def _nothing_joined(self: _Search, best: object) -> object:
    return self._choice([(value,) for value in self.problem.values])


def test_splitting_keeps_the_optimum() -> None:
    """Nested and disjoint sets are decided apart: the sum of the parts is the optimum of the whole."""
    seen = 0
    for instance in random_instances(11, 400, channels=(6, 7), readers=(4, 7), weight=lambda rng: rng.randint(1, 9)):
        problems = split(instance, Scale(1))
        seen += len(problems) > 1
        assert solve(instance).objective == optimum(instance), instance.to_json()
    assert seen


def test_table_of_three_sets() -> None:
    """Three sets conflict by their regions as brute force over the orders of the regions says."""
    for code, found in enumerate(_conflicting_regions()):
        regions = [region for region in range(1, 8) if code >> (region - 1) & 1]
        if not regions:
            assert not found
            continue
        rows = [
            is_run(len(regions), [atom for atom, region in enumerate(regions) if region >> s & 1]) for s in range(3)
        ]
        assert found == (not (rows[0] & rows[1] & rows[2]).any())


@pytest.mark.parametrize("seed", range(40))
def test_regions_and_trees_tell_the_same_families(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every minimal conflict of nested and of free sets is widened alike."""
    rng = random.Random(seed)
    chain = rng.sample(range(24), 24)
    sets = [rng.sample(range(24), rng.randint(2, 20)) for _ in range(6)] + [chain[: 3 * i] for i in range(1, 7)]
    items = [Item(mask_of(members), (), 0, 1, (n,)) for n, members in enumerate(sets)]
    tree, held, cores = PQTree(24), list[int](), list[list[int]]()
    for number, item in enumerate(items):
        if insert(tree, item):
            held.append(number)
        else:
            cores.append(shrink(PQTree(24), number, held, items))
    assert cores
    by_regions = [widen(PQTree(24), core, range(len(items)), items) for core in cores]
    monkeypatch.setattr("chanopt.solve.conflicts._MOST_SETS", 0)
    assert by_regions == [widen(PQTree(24), core, range(len(items)), items) for core in cores]
    assert max(map(len, by_regions)) > 3


@pytest.mark.parametrize("length", [8, 9, 10, 60])
def test_a_long_cycle_of_sets_is_one_conflict(length: int) -> None:
    readers = [Reader(f"r{i}", (i, (i + 1) % length), 10 + i) for i in range(length)]
    solution = solve(Instance(length, tuple(readers)))
    assert (solution.gathered, solution.optimal) == (("r0",), True)


# Tucker, "A structure theorem for the consecutive 1's property", J. Combin. Theory B 12 (1972), theorem 9.
TUCKER = {
    "M_I(1)": (3, [[0, 1], [1, 2], [0, 2]]),
    "M_I(2)": (4, [[0, 1], [1, 2], [2, 3], [0, 3]]),
    "M_I(4)": (6, [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [0, 5]]),
    "M_II(1)": (4, [[0, 1], [1, 2], [0, 1, 3], [1, 2, 3]]),
    "M_II(2)": (5, [[0, 1], [1, 2], [2, 3], [0, 1, 2, 4], [1, 2, 3, 4]]),
    "M_III(1)": (4, [[0, 1], [1, 2], [1, 3]]),
    "M_III(2)": (5, [[0, 1], [1, 2], [2, 3], [1, 2, 4]]),
    "M_IV": (6, [[0, 1], [2, 3], [4, 5], [1, 3, 5]]),
    "M_V": (5, [[0, 1], [2, 3], [0, 1, 2, 3], [0, 2, 4]]),
}


@pytest.mark.parametrize("name", TUCKER)
def test_forbidden_configuration_costs_its_lightest_set(name: str) -> None:
    """Every forbidden configuration is minimal: whichever set is the lightest, it alone pays."""
    channels, sets = TUCKER[name]
    for light in range(len(sets)):
        readers = [Reader(f"r{i}", tuple(s), 3 if i == light else 5 + i) for i, s in enumerate(sets)]
        solution = solve(Instance(channels, tuple(readers)))
        assert (solution.objective, solution.gathered, solution.optimal) == (3, (f"r{light}",), True)


def test_nested_sets_are_free() -> None:
    rng = random.Random(3)
    channels = rng.sample(range(200), 200)
    readers = tuple(Reader(f"r{i}", tuple(channels[: 5 * i]), 1) for i in range(40))
    solution = solve(Instance(200, readers))
    assert (solution.objective, solution.gathered, solution.optimal) == (0, (), True)


def test_generic_sets_leave_the_two_heaviest_free() -> None:
    rng = random.Random(4)
    readers = tuple(Reader(f"r{i}", tuple(rng.sample(range(256), 128)), 10 + i, ordered=False) for i in range(7))
    solution = solve(Instance(256, readers))
    assert solution.gathered == ("r0", "r1", "r2", "r3", "r4")
    assert solution.optimal


def test_a_paying_reader_of_no_weight_is_made_free_where_it_can() -> None:
    sets = [(0, 1), (1, 2), (0, 2), (2, 3)]
    readers = tuple(Reader(f"r{i}", s, 0 if i in (2, 3) else 1) for i, s in enumerate(sets))
    assert solve(Instance(4, readers)).gathered == ("r2",)


def test_large_integer_weights_are_exact() -> None:
    big = 2**40
    readers = tuple(Reader(f"r{i}", s, big + i) for i, s in enumerate([(0, 1), (1, 2), (0, 2)]))
    solution = solve(Instance(3, readers))
    assert (solution.objective, solution.bound, solution.gathered) == (big, big, ("r0",))
    assert isinstance(solution.objective, int)


def test_huge_integer_weights_are_scaled() -> None:
    readers = tuple(Reader(f"r{i}", s, 10**30 * (1 + i)) for i, s in enumerate([(0, 1), (1, 2), (0, 2)]))
    assert solve(Instance(3, readers)).gathered == ("r0",)


def test_an_edge_is_cut_where_it_is_cheaper_than_a_reader() -> None:
    triangle = [((0, 1), 0), ((1, 2), 1), ((0, 2), 1)]
    readers = tuple(Reader(f"r{i}", s, 5, value) for i, (s, value) in enumerate(triangle))
    cheap = solve(Instance(3, readers, edges=(Edge("join", 0, 1, 4),)))
    assert (cheap.cut, cheap.gathered, cheap.parts, cheap.objective) == (("join",), (), (0, 1), 4)
    dear = solve(Instance(3, readers, edges=(Edge("join", 0, 1, 6),)))
    assert (dear.cut, len(dear.gathered), dear.parts, dear.objective) == ((), 1, (0, 0), 5)
    assert dear.orders[0] is dear.orders[1]


def test_contrary_pins_force_a_cut() -> None:
    pins = (Pin(0, (0, 1)), Pin(1, (1, 0)))
    solution = solve(Instance(3, pins=pins, edges=(Edge("join", 0, 1, 7),)))
    assert (solution.objective, solution.cut) == (7, ("join",))


def test_preferences_hold_where_they_cost_nothing_heaviest_first() -> None:
    readers = (Reader("r", (0, 1, 2, 3), 1),)
    wishes = (Preference((0, 2), weight=1), Preference((1, 2), weight=3), Preference((0, 1), weight=2))
    order = solve(Instance(6, readers, prefer=wishes)).order
    assert abs(order.index(1) - order.index(2)) == 1
    assert abs(order.index(0) - order.index(1)) == 1
    assert solve(Instance(6, readers, prefer=(Preference((3, 4)),))).objective == 0
    blocked = Instance(6, readers, prefer=(Preference((0, 4, 5)), Preference((3, 4), weight=0)))
    assert solve(blocked).gathered == ()


def test_paying_readers_have_few_runs() -> None:
    rng = random.Random(8)
    sets = [tuple(sorted(rng.sample(range(128), 64))) for _ in range(8)]
    readers = tuple(Reader(f"r{i}", s, 64) for i, s in enumerate(sets))
    order = solve(Instance(128, readers)).order
    assert total_runs(order, sets) < 0.75 * total_runs(tuple(range(128)), sets)


def total_runs(order: tuple[int, ...], sets: list[tuple[int, ...]]) -> int:
    place = {channel: position for position, channel in enumerate(order)}
    positions = [sorted(place[channel] for channel in s) for s in sets]
    return sum(1 + sum(b != a + 1 for a, b in itertools.pairwise(p)) for p in positions)


def test_the_order_stays_near_the_natural_one() -> None:
    assert solve(Instance(9)).order == tuple(range(9))
    assert solve(Instance(9, (Reader("r", (2, 3, 4), 1),))).order == tuple(range(9))
    assert solve(Instance(6, (Reader("r", (0, 5), 1),))).order == (1, 2, 0, 5, 3, 4)
    assert solve(Instance(4, blocks=(Block((0, 3)), Block((1, 2))))).order in {(1, 2, 0, 3), (0, 3, 1, 2)}


def test_pin_of_the_whole_value_is_the_order() -> None:
    rng = random.Random(2)
    sequence = tuple(rng.sample(range(300), 300))
    readers = (Reader("inside", sequence[10:20], 1), Reader("outside", (sequence[0], sequence[9]), 1))
    solution = solve(Instance(300, readers, pins=(Pin(0, sequence),)))
    assert solution.order == sequence
    assert solution.gathered == ("outside",)


def test_no_channels_and_no_readers() -> None:
    solution = solve(Instance(0, (Reader("none", (), 3),)))
    assert (solution.order, solution.orders, solution.objective, solution.optimal) == ((), ((),), 0, True)


def test_same_instance_same_answer() -> None:
    options = {"channels": (5, 7), "values": 3, "edges": 3, "readers": (6, 12), "blocks": 1, "prefer": 2}
    for instance in random_instances(21, 60, **options):
        assert solve(instance) == solve(Instance.from_json(instance.to_json()))


def hard_instance() -> Instance:
    rng = random.Random(1)
    readers = tuple(
        Reader(f"r{i}", tuple(rng.sample(range(24), rng.randint(2, 5))), rng.randint(1, 50)) for i in range(24)
    )
    return Instance(24, readers)


def test_without_time_the_answer_is_valid_and_not_called_optimal() -> None:
    instance = hard_instance()
    solution = solve(instance, time_limit=0)
    solution.check(instance)
    assert not solution.optimal
    assert 0 <= solution.bound <= solve(instance).objective < solution.objective
    assert solution.stats["masters"] == 0


def test_time_that_runs_out_between_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A master that finds nothing in time ends the search with what is known."""
    monkeypatch.setattr(Master, "solve", lambda self, seconds: None)
    solution = solve(hard_instance())
    solution.check(hard_instance())
    assert not solution.optimal
    assert solution.bound < solution.objective


def test_bound_holds_without_time() -> None:
    options = {"channels": (4, 6), "readers": (5, 10), "values": 3, "edges": 3, "blocks": 1}
    for instance in random_instances(31, 150, **options):
        solution = solve(instance, time_limit=0)
        solution.check(instance)
        best = optimum(instance)
        assert solution.bound <= best <= solution.objective
        assert not solution.optimal or solution.objective == best
