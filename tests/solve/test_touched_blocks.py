"""Readers that pay for the aligned blocks they touch: against brute force, against other orders, on wide layers."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chanopt.errors import InstanceError
from chanopt.solve import Block, Edge, Instance, Pin, Reader, Solution, solve
from chanopt.solve.columns import Priced, bound_of, dive, quick_bound
from chanopt.solve.exact import prove
from chanopt.solve.exchange import COARSE, Bins, exchange
from chanopt.solve.packing import cost_of, floor_of, gray_bins, grown_bins, packing_of, unions
from chanopt.solve.touched import _Division
from tests.solve.brute import optimum, random_instances

FOREVER = float("inf")


def blocks_of(order: Sequence[int], members: Sequence[int], grain: int) -> int:
    """How many aligned blocks hold a member, counted block by block."""
    held = [set(order[start : start + grain]) for start in range(0, len(order), grain)]
    return sum(bool(block & set(members)) for block in held)


def paid(instance: Instance, order: Sequence[int]) -> float:
    """What the readers with a grain pay if all values have one order."""
    return sum(r.weight * blocks_of(order, r.set, r.grain) for r in instance.readers if r.grain)


def halves(channels: int, readers: int, seed: int, grain: int = 16) -> Instance:
    """Independent readers of half the channels each."""
    rng = random.Random(seed)
    sets = [tuple(rng.sample(range(channels), channels // 2)) for _ in range(readers)]
    return Instance(channels, tuple(Reader(f"r{i}", s, 1, grain=grain) for i, s in enumerate(sets)))


def floors(instance: Instance) -> int:
    return sum(-(-len(reader.set) // reader.grain) for reader in instance.readers)


# Plain instances: one value, one grain, nothing hard.


@pytest.mark.parametrize("grain", [1, 2, 3, 4, 9])
def test_plain_instances_reach_the_optimum(grain: int) -> None:
    proven = 0
    for count in (2, 3, 5):
        for instance in random_instances(grain, 25, channels=(2, 7), readers=(0, 0), grains=[grain] * count):
            solution = solve(instance)
            solution.check(instance)
            best = optimum(instance)
            assert solution.bound <= best <= solution.objective, instance.to_json()
            assert solution.optimal, instance.to_json()
            assert solution.objective == best
            proven += solution.objective > sum(r.weight * -(-len(r.set) // grain) for r in instance.readers)
    assert proven or grain in (1, 9)


def test_eight_channels_reach_the_optimum() -> None:
    for instance in random_instances(3, 12, channels=(8, 8), readers=(0, 0), grains=(3,) * 4):
        solution = solve(instance)
        assert solution.optimal
        assert solution.objective == optimum(instance), instance.to_json()


def test_fractions_of_weights() -> None:
    weights = {"weight": lambda rng: rng.choice([0.1, 0.25, 1e-3, 2.5])}
    for instance in random_instances(4, 40, channels=(3, 6), readers=(0, 0), grains=(2,) * 3, **weights):
        solution = solve(instance)
        solution.check(instance)
        assert solution.objective == pytest.approx(optimum(instance), rel=1e-12)
        assert solution.optimal


def test_huge_weights_keep_the_bound() -> None:
    for instance in random_instances(5, 20, channels=(4, 6), readers=(0, 0), grains=(2,) * 3):
        large = replace(instance, readers=tuple(replace(r, weight=r.weight * 10**30) for r in instance.readers))
        solution = solve(large)
        solution.check(large)
        assert solution.objective == 10**30 * int(optimum(instance))
        assert solution.bound <= solution.objective


def test_many_readers_have_a_bound_by_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of many readers, on instances small enough for brute force."""
    for name, value in {"_GREEDY": 0, "_GROUP": 3, "_SMALL": 2}.items():
        monkeypatch.setattr(f"chanopt.solve.pack.{name}", value)
    above = met = 0
    for instance in random_instances(6, 60, channels=(5, 7), readers=(0, 0), grains=(2,) * 7):
        solution = solve(instance)
        solution.check(instance)
        best = optimum(instance)
        assert solution.bound <= best <= solution.objective, instance.to_json()
        above += solution.bound > sum(r.weight * -(-len(r.set) // 2) for r in instance.readers)
        met += solution.objective == best
    assert above > 10
    assert met > 40


# Everything that a program may hold besides.

FAMILIES = {
    "blocks and pins": {"blocks": 2, "pins": 1, "readers": (0, 0), "grains": (2, 2, 2)},
    "two grains": {"blocks": 1, "readers": (0, 0), "grains": (2, 4, 2, 3)},
    "range readers": {"readers": (1, 4), "grains": (2, 2, 3), "ordered": 0.3},
    "values": {"channels": (2, 5), "values": 2, "edges": 1, "readers": (0, 2), "grains": (2, 2, 2)},
    "everything": {
        "channels": (3, 5), "values": 3, "edges": 3, "readers": (0, 3), "blocks": 2, "pins": 1, "prefer": 1,
        "grains": (2, 2, 3),
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_bound_and_objective_enclose_the_optimum(family: str) -> None:
    met = count = 0
    for instance in random_instances(7, 60, **{"channels": (2, 6), **FAMILIES[family]}):
        solution = solve(instance)
        solution.check(instance)
        best = optimum(instance)
        assert solution.bound <= best * (1 + 1e-12), instance.to_json()
        assert best <= solution.objective, instance.to_json()
        assert not solution.optimal or solution.objective == best
        met += solution.objective == best
        count += 1
    assert met > 0.75 * count


def test_blocks_that_begin_with_an_aligned_block_are_packed_inside() -> None:
    """Two blocks of 128 channels, two readers each: as good as each block by itself."""
    alone = [halves(128, 3, seed) for seed in range(2)]
    apart = sum(solve(instance).objective for instance in alone)
    readers = [
        Reader(f"{r.name}.{n}", tuple(128 * n + c for c in r.set), 1, grain=16)
        for n, instance in enumerate(alone)
        for r in instance.readers
    ]
    blocks = (Block(tuple(range(128))), Block(tuple(range(128, 256))))
    whole = Instance(256, tuple(readers), blocks)
    solution = solve(whole)
    solution.check(whole)
    assert solution.objective <= apart < paid(whole, range(256))


def test_a_pin_of_everything_leaves_nothing_to_choose() -> None:
    sequence = tuple(random.Random(1).sample(range(40), 40))
    instance = Instance(40, (Reader("a", tuple(range(20)), 3, grain=8),), pins=(Pin(0, sequence),))
    solution = solve(instance)
    assert solution.order == sequence
    assert solution.touched == {"a": blocks_of(sequence, range(20), 8)}


def test_a_range_that_pays_off_is_kept() -> None:
    """A dear reader of a range keeps it; a cheap one gives it up for touched blocks."""
    sets = [(0, 4), (1, 5), (2, 6), (3, 7)]
    readers = tuple(Reader(f"g{i}", s, 10, grain=2) for i, s in enumerate(sets))
    instance = Instance(8, (*readers, Reader("range", (0, 1, 2), 100)))
    dear = solve(instance)
    assert dear.gathered == ()
    assert dear.objective == optimum(instance) == 60
    cheap = solve(Instance(8, (*readers, Reader("range", (0, 1, 2), 1))))
    assert (cheap.gathered, cheap.objective) == (("range",), 41)


def test_an_edge_is_cut_where_two_orders_save_more() -> None:
    first = tuple(Reader(f"a{i}", (i, i + 4), 10, grain=2) for i in range(4))
    second = tuple(Reader(f"b{i}", (i, 7 - i), 10, 1, grain=2) for i in range(4))
    cheap = solve(Instance(8, (*first, *second), edges=(Edge("join", 0, 1, 5),)))
    assert (cheap.objective, cheap.cut) == (85, ("join",))
    assert (cheap.bound, cheap.optimal) == (85, True)  # one order for both pays more than the cut
    free = solve(Instance(8, (*first, *second), edges=(Edge("join", 0, 1, 0),)))
    assert (free.objective, free.optimal) == (80, True)
    dear = solve(Instance(8, (*first, *second), edges=(Edge("join", 0, 1, 1000),)))
    assert dear.cut == ()


def test_values_in_a_chain_are_proven() -> None:
    """Where to cut is a part of the bound: whatever stays together has one order."""
    proven = count = 0
    for instance in random_instances(9, 60, channels=(3, 6), values=3, edges=3, readers=(0, 0), grains=(2,) * 5):
        solution = solve(instance)
        solution.check(instance)
        best = optimum(instance)
        assert solution.bound <= best <= solution.objective, instance.to_json()
        proven += solution.optimal
        count += 1
    assert proven > 0.9 * count


def test_values_whose_blocks_contradict_each_other_have_no_order_in_common() -> None:
    """Also if the time was out before that was noticed."""
    readers = (Reader("first", (0, 3), 5, 0, grain=2), Reader("second", (0, 2), 5, 1, grain=2))
    blocks = (Block((0, 1), 0), Block((1, 2), 0), Block((0, 2), 1))
    instance = Instance(4, readers, blocks, edges=(Edge("edge", 0, 1, 3),))
    for limit in (10.0, 0.0):
        solution = solve(instance, time_limit=limit)
        solution.check(instance)
        assert solution.cut == ("edge",)
    assert solve(instance).optimal
    assert solve(instance).objective == optimum(instance)


def test_only_divisions_that_seem_the_cheapest_are_priced() -> None:
    """Seven values that each pay 10; from two on, values with one order pay 5 more, and a cut costs 3."""
    asked: list[frozenset[int]] = []

    def price(values: frozenset[int]) -> int:
        asked.append(values)
        return 10 * len(values) + 5 * (len(values) > 1)

    division = _Division(range(7), [3] * 6)
    assert division.least(price, FOREVER) == (75, [frozenset(range(7))])
    assert len(asked) < 7 + 21  # not all of the 21 intervals
    assert _Division(range(7), [0] * 6).least(price, FOREVER) == (70, [frozenset([value]) for value in range(7)])
    assert _Division(range(7), [1] * 6).least(price, FOREVER)[0] == 75
    late, _ = _Division(range(7), [3] * 6).least(price, 0.0)
    assert late == 70


def test_a_range_is_tried_at_either_end() -> None:
    """Only a range behind the others leaves five channels of the other reader in one block of six."""
    instance = Instance(8, (Reader("block", (0, 2, 4, 6, 7), 5, grain=6), Reader("range", (1, 3, 5, 6, 7), 3)))
    solution = solve(instance)
    solution.check(instance)
    assert (solution.objective, solution.optimal) == (optimum(instance), True) == (5, True)


@pytest.mark.parametrize("seed", range(4))
def test_exchanges_keep_every_cell_in_its_place(seed: int) -> None:
    """Also where a cell lies in two pieces, or cells do not lie by number."""
    rng = np.random.default_rng(seed)
    cells = np.repeat([2, 0, 2, 1], [5, 7, 9, 11])
    order = rng.permutation(len(cells))
    members = rng.random((len(cells), 3)) < 0.5
    cell_of = [0] * len(cells)
    for place, channel in enumerate(order.tolist()):
        cell_of[channel] = int(cells[place])
    found = exchange(order.tolist(), cell_of, [Bins(4, members, (3, 2, 1))], COARSE, FOREVER)
    assert sorted(found) == list(range(len(cells)))
    assert [cell_of[channel] for channel in found] == cells.tolist()


# Properties on instances too wide for brute force.


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    channels = draw(st.integers(1, 40))
    some = st.lists(st.integers(0, channels - 1), unique=True).map(tuple)
    grain = draw(st.sampled_from((2, 4, 8, 16)))
    touching = draw(st.lists(st.tuples(some, st.integers(0, 9)), max_size=6))
    ranges = draw(st.lists(st.tuples(some, st.integers(0, 9)), max_size=2))
    readers = [Reader(f"g{i}", s, w, grain=grain) for i, (s, w) in enumerate(touching)]
    readers += [Reader(f"r{i}", s, w) for i, (s, w) in enumerate(ranges)]
    blocks = draw(st.lists(some, max_size=1))
    return Instance(channels, tuple(readers), tuple(Block(block) for block in blocks))


@settings(max_examples=60, deadline=None)
@given(instances())
def test_never_above_the_natural_order_or_that_of_the_ranges(instance: Instance) -> None:
    solution = solve(instance)
    solution.check(instance)
    assert solution.touched == {r.name: blocks_of(solution.order, r.set, r.grain) for r in instance.readers if r.grain}
    gathered = sum(r.weight for r in instance.readers if r.name in solution.gathered)
    assert solution.objective == paid(instance, solution.order) + gathered
    assert solution.bound <= solution.objective
    ranges = replace(instance, readers=tuple(r for r in instance.readers if not r.grain))
    by_ranges = solve(ranges)
    assert solution.objective <= by_ranges.objective + paid(instance, by_ranges.order)
    if not instance.blocks:
        natural = sum(r.weight for r in ranges.readers if r.set and max(r.set) - min(r.set) + 1 != len(r.set))
        assert solution.objective <= natural + paid(instance, range(instance.channels))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 17), st.integers(0, 99))
def test_bins_hold_every_channel_once_and_bounds_lie_below(channels: int, readers: int, grain: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    members = rng.random((channels, readers)) < 0.5
    packing, class_of = packing_of(members, rng.integers(1, 9, readers).tolist(), grain)
    if not packing.weights:
        return
    assert (np.bincount(class_of) == packing.counts).all()
    found = unions(packing.signatures, 100)
    made = [gray_bins(packing, packing.counts, packing.rest > 0), grown_bins(packing, 0.3)]
    bounds = [floor_of(packing)]
    if found is not None:
        priced = Priced(packing, found)
        bound, columns = bound_of(priced, FOREVER)
        made.append(dive(priced, columns, 0.6, FOREVER))
        made.append(dive(priced, columns, 0.6, 0))
        bounds += [bound, bound_of(priced, 0)[0], quick_bound(priced, (0.5, 1.0, 2.0))[0]]
    for bins in made:
        assert (bins.sum(axis=0) == packing.counts).all()
        assert (bins[: packing.full].sum(axis=1) == grain).all()
        assert max(bounds) <= cost_of(packing, bins)


def test_the_program_in_whole_numbers_meets_its_bound_without_help() -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        packing, _ = packing_of(rng.random((60 + seed, 3)) < 0.5, [3, 1, 2], 7)
        found = unions(packing.signatures, 100)
        assert found is not None
        start = gray_bins(packing, packing.counts, packing.rest > 0)
        proven = prove(Priced(packing, found), start, 0, FOREVER, 1)
        assert proven is not None
        assert (proven.bins.sum(axis=0) == packing.counts).all()
        assert proven.bound == cost_of(packing, proven.bins) <= cost_of(packing, start)


def test_exchanges_stay_within_cells_and_never_cost_more() -> None:
    rng = np.random.default_rng(5)
    kinds = [Bins(grain, rng.random((96, 4)) < 0.5, (1, 2, 3, 4)) for grain in (16, 8)]
    cells = [channel // 40 for channel in range(96)]
    order = exchange(range(96), cells, kinds, COARSE, FOREVER)
    assert sorted(order) == list(range(96))
    assert [cells[channel] for channel in order] == cells

    def bill(places: Sequence[int]) -> int:
        return sum(
            weight * blocks_of(places, np.flatnonzero(kind.members[:, reader]).tolist(), kind.grain)
            for kind in kinds
            for reader, weight in enumerate(kind.weights)
        )

    assert bill(order) < 0.95 * bill(range(96))
    assert bill(exchange(range(96), cells, kinds, COARSE, 0)) == bill(range(96))


# Wide layers.


def test_seven_independent_readers_of_half_of_1024_channels() -> None:
    """The natural order touches 2.0 times the floors, the order of a Gray code 1.25."""
    for seed in range(2):
        instance = halves(1024, 7, seed)
        floor = floors(instance)
        assert floor == 224
        assert paid(instance, range(1024)) > 1.99 * floor
        solution = solve(instance, time_limit=60)
        solution.check(instance)
        assert solution.objective <= 1.16 * floor
        assert 1.1 * floor <= solution.bound
        assert solution.objective <= 1.04 * solution.bound


@pytest.mark.parametrize(("readers", "most"), [(2, 1.04), (3, 1.04), (4, 1.05), (5, 1.07)])
def test_few_independent_readers_are_proven(readers: int, most: float) -> None:
    for channels in (1024, 1000):
        instance = halves(channels, readers, 3)
        solution = solve(instance, time_limit=60)
        solution.check(instance)
        assert solution.optimal
        assert solution.objective <= most * floors(instance)


@pytest.mark.slow
@pytest.mark.parametrize(("readers", "most", "proven"), [(12, 1.5, 1.1), (24, 1.72, 1.1)])
def test_many_independent_readers(readers: int, most: float, proven: float) -> None:
    instance = halves(1024, readers, 0)
    solution = solve(instance, time_limit=60)
    solution.check(instance)
    assert proven * floors(instance) <= solution.bound
    assert solution.objective <= most * floors(instance)


def test_nested_sets_reach_the_floors() -> None:
    channels = random.Random(4).sample(range(512), 512)
    readers = tuple(Reader(f"r{i}", tuple(channels[: 16 * i + 5]), 1, grain=16) for i in range(30))
    solution = solve(Instance(512, readers))
    assert (solution.objective, solution.optimal) == (sum(range(1, 31)), True)


def test_without_time_the_answer_is_valid() -> None:
    instance = halves(256, 7, 1)
    solution = solve(instance, time_limit=0)
    solution.check(instance)
    assert floors(instance) <= solution.bound <= solution.objective <= 1.5 * floors(instance)


# Order, data, errors.


def test_the_natural_order_is_kept_where_it_is_as_good() -> None:
    readers = (Reader("a", tuple(range(16)), 1, grain=16), Reader("b", tuple(range(40, 48)), 1, grain=8))
    assert solve(Instance(64, readers)).order == tuple(range(64))


def test_blocks_stay_near_their_natural_places() -> None:
    readers = (Reader("a", tuple(range(0, 32, 2)), 1, grain=16), Reader("b", tuple(range(33, 64, 2)), 1, grain=16))
    solution = solve(Instance(64, readers))
    assert solution.objective == 2
    assert sorted(solution.order[:32]) == list(range(32))


def test_runs_are_few_within_a_block() -> None:
    instance = halves(64, 3, 2, grain=16)
    order = solve(instance).order
    for start in range(0, 64, 16):
        block = order[start : start + 16]
        told = [[channel in r.set for r in instance.readers] for channel in block]
        changes = sum(before != after for before, after in pairwise(told))
        assert changes == len({tuple(row) for row in told}) - 1


def test_same_instance_same_answer() -> None:
    for instance in (halves(200, 7, 1), halves(200, 12, 1), halves(96, 3, 1)):
        assert solve(instance, time_limit=60) == solve(Instance.from_json(instance.to_json()), time_limit=60)


def test_json_round_trip() -> None:
    instance = Instance(4, (Reader("a", (2, 0), 3, grain=2), Reader("b", (1, 2), 1)))
    assert Instance.from_json(instance.to_json()) == instance
    assert json.loads(instance.to_json())["readers"] == [
        {"name": "a", "set": [0, 2], "weight": 3, "grain": 2},
        {"name": "b", "set": [1, 2], "weight": 1},
    ]
    solution = solve(instance)
    again = Solution.from_json(solution.to_json())
    assert again == solution
    assert again.touched == {"a": 1}
    again.check(instance)


def test_a_solution_from_before_touched_blocks_is_read() -> None:
    instance = Instance(4, (Reader("a", (2, 0), 3),))
    table = json.loads(solve(instance).to_json())
    del table["touched"]
    old = Solution.from_json(table)
    assert old.touched == {}
    old.check(instance)


def test_check_catches_what_is_not_touched() -> None:
    instance = Instance(4, (Reader("a", (2, 0), 3, grain=2),))
    solution = solve(instance)
    assert (solution.objective, solution.gathered) == (3, ())
    with pytest.raises(InstanceError, match="touched: expected {'a': 1} from the orders, found {'a': 2}"):
        replace(solution, touched={"a": 2}).check(instance)
    with pytest.raises(InstanceError, match="objective: expected 3"):
        replace(solution, objective=4, bound=4).check(instance)


@pytest.mark.parametrize("grain", [-1, 1.5, "16"])
def test_refuses_a_grain_that_is_none(grain: object) -> None:
    with pytest.raises(InstanceError, match="reader 'a': expected a grain as a number of positions"):
        Reader("a", (0,), 1, grain=grain)  # pyright: ignore[reportArgumentType]


def test_refuses_an_ordered_reader_with_a_grain() -> None:
    with pytest.raises(InstanceError, match="reader 'a': expected either `ordered` or a grain"):
        Reader("a", (0,), 1, ordered=True, grain=16)
