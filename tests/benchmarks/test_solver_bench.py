from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import solver
from chanopt.solve import Block, Edge, Instance, Pin, Reader, solve
from chanopt.solve.solution import cost


@pytest.mark.parametrize("family", [*solver.FAMILIES, *solver.GRAINED])
def test_families_are_deterministic_and_of_the_size_asked_for(family: str) -> None:
    made = solver.make(family, 48, 10, 3)
    assert made == solver.make(family, 48, 10, 3)
    assert made != solver.make(family, 48, 10, 4)
    assert (made.channels, len(made.readers)) == (48, 10)
    assert all(reader.set and reader.weight for reader in made.readers)


def test_families_are_what_they_say() -> None:
    nested = solver.make("nested", 64, 12, 0).readers
    assert all(set(nested[n + 4].set) <= set(nested[n].set) for n in range(8))
    blocks = solver.make("concat", 64, 12, 0).blocks
    assert sorted(channel for block in blocks for channel in block.set) == list(range(64))
    chain = solver.make("chain", 64, 12, 0)
    assert [(edge.source, edge.target) for edge in chain.edges] == [(n, n + 1) for n in range(5)]
    shared = {f: len(set(a.set) & set(b.set)) for f in ("independent", "correlated") for a, b, *_ in [readers(f)]}
    assert shared["correlated"] > 1.5 * shared["independent"]


def readers(family: str) -> tuple[Reader, ...]:
    return solver.make(family, 256, 4, 0).readers


@pytest.mark.parametrize("family", solver.FAMILIES)
def test_no_other_order_is_better(family: str) -> None:
    for seed in range(4):
        found = solver.compare(solver.make(family, 40, 7, seed), 10.0)
        assert found.optimal
        assert found.gap == 0
        others = [paid for paid in (found.greedy, found.natural) if paid is not None]
        assert others or family == "dual_path"  # no one order suits all of its values
        assert all(found.objective <= paid <= found.everything for paid in others)


@pytest.mark.parametrize("family", ["nested", "touched"])
def test_the_time_limit_holds_where_no_proof_is_near(family: str) -> None:
    """One round of cuts, or of exchanges, took many times the limit here."""
    solution = solve(solver.make(family, 2048, 96, 0), time_limit=1.0)
    assert not solution.optimal
    assert solution.seconds < 4


def test_touched_blocks_are_compared_with_their_floor() -> None:
    made = solver.make("touched", 96, 3, 0)
    assert {(reader.grain, reader.weight, len(reader.set)) for reader in made.readers} == {(16, 1, 48)}
    found = solver.compare(made, 10.0)
    assert found.floor == 9
    assert found.everything == 18
    assert found.natural is not None
    assert found.floor <= found.bound <= found.objective < found.natural
    assert found.over_floor == found.objective / 9
    (row,) = solver.random_rows("touched", [(96, 3)], [0], 10.0)
    assert row["over_floor"] == found.over_floor
    assert solver.differences(row) == ""
    assert solver.compare(solver.make("nested", 24, 3, 0), 10.0).over_floor is None


def test_the_greedy_order_is_a_permutation_that_keeps_blocks_together() -> None:
    made = solver.make("concat", 60, 9, 1)
    order = solver.greedily(made)
    assert sorted(order) == list(range(60))
    assert solver.paid(made, order) == cost(made, [order])[2]


def test_an_order_that_breaks_a_block_or_a_pin_is_none() -> None:
    made = Instance(4, (Reader("r", (0, 3), 2),), blocks=(Block((0, 1)),), pins=(Pin(0, (3, 2)),))
    assert solver.paid(made, (1, 0, 3, 2)) == 0
    assert solver.paid(made, (0, 1, 3, 2)) == 2
    assert solver.paid(made, (0, 3, 2, 1)) is None
    assert solver.paid(made, (0, 1, 2, 3)) is None


def test_one_order_serves_all_values_and_cuts_no_edge() -> None:
    made = Instance(3, (Reader("a", (0, 2), 1), Reader("b", (0, 2), 5, value=1)), edges=(Edge("e", 0, 1, 9),))
    assert solver.paid(made, (0, 1, 2)) == 6
    assert solver.paid(made, (0, 2, 1)) == 0


def optimum(instance: Instance) -> float:
    orders = itertools.permutations(range(instance.channels))
    return min(found for order in orders if (found := solver.paid(instance, order)) is not None)


def test_small_instances_are_solved_as_well_as_by_trying_every_order() -> None:
    for family in ("independent", "correlated", "nested", "concat"):
        made = solver.make(family, 7, 4, 5)
        assert solver.compare(made, 10.0).objective == optimum(made)


def entries() -> Iterator[Any]:
    for name, instance, known in solver.stored():
        yield pytest.param(instance, known, id=name)


# Those of dense nets take long: `python -m benchmarks solver --families corpus` has them all.
QUICK = 12


@pytest.mark.parametrize(("instance", "known"), [e for e in entries() if len(e.values[0].readers) <= QUICK])
def test_stored_optima_are_met(instance: Instance, known: float | None) -> None:
    solution = solve(instance, time_limit=60.0)
    solution.check(instance)
    assert known is not None
    assert solution.optimal
    assert solution.objective == known


def test_the_corpus_has_random_instances_and_segments_of_networks() -> None:
    stems = {path.stem for path in solver.CORPUS.glob("*.json")}
    assert {f"random_{family}" for family in solver.FAMILIES} <= stems
    assert {f"zoo_{name}" for name in solver.NETWORKS} <= stems


def test_random_instances_of_the_corpus_are_those_that_are_made() -> None:
    for family in solver.FAMILIES:
        entry = json.loads((solver.CORPUS / f"random_{family}.json").read_text())[0]
        channels, readers_ = solver.STORED_SIZES[0]
        assert Instance.from_json(entry["instance"]) == solver.make(family, channels, readers_, 0)


ROW = {"family": "chain", "channels": 8, "readers": 2, "seed": 1, "objective": 4, "optimal": True} | {
    "greedy": 5,
    "natural": None,
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"greedy": 3}, "chain 8x2 seed 1: greedy pays 3, ours 4"),
        ({"natural": 2, "greedy": 3}, "chain 8x2 seed 1: greedy pays 3 and natural pays 2, ours 4"),
        ({"name": "x", "known": 3}, "x: the least is 4, stored as 3"),
        ({"name": "x", "known": 3, "optimal": False}, ""),
        ({"name": "x", "known": None}, ""),
    ],
)
def test_a_row_that_is_not_right_is_told(changes: dict[str, Any], said: str) -> None:
    assert solver.differences({**ROW, **changes}) == said


def test_finishing_fails_on_what_is_wrong_or_lost(tmp_path: Path) -> None:
    out = tmp_path / "solver.json"
    assert solver.finish([{"job": "a", **ROW}], out) == 0
    assert json.loads(out.read_text())[0]["objective"] == 4
    assert solver.finish([{"job": "a", **ROW, "greedy": 1}], out) == 1
    assert solver.finish([{"job": "a", "status": "lost", "exception": "boom"}], out) == 1


def test_a_size_is_two_numbers() -> None:
    assert solver.size("4096x128") == (4096, 128)
    with pytest.raises(argparse.ArgumentTypeError, match="expected CHANNELSxREADERS, as in 256x16, found '4096'"):
        solver.size("4096")
