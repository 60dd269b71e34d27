"""Values that become one before anything is decided, and readers of which it is known that they pay."""

from __future__ import annotations

import random

import pytest

from benchmarks.solver import make
from chanopt.errors import InstanceError
from chanopt.solve import Block, Edge, Instance, Pin, Reader, solve
from chanopt.solve.conflicts import forbidden
from chanopt.solve.contract import contract
from chanopt.solve.problem import Problem, Scale, restrict, split
from tests.solve.brute import FUZZ, optimum, some_set


def problem_of(instance: Instance) -> Problem:
    (problem,) = split(instance, Scale(1))
    return problem


def handed_on(rng: random.Random) -> Instance | None:
    """Values that mostly hand channels on: few sets, each a block of several; None where blocks contradict a pin."""
    channels, values = 5, rng.randint(2, 5)
    pool = [some_set(rng, channels, 2) for _ in range(rng.randint(1, 3))]
    ends = [(rng.randrange(value), value) for value in range(1, values)]
    ends += [(first, second) for first, second in [rng.sample(range(values), 2) for _ in range(rng.randint(0, 2))]]
    readers = [
        Reader(f"r{i}", some_set(rng, channels, 2), rng.randint(1, 9), rng.randrange(values), rng.random() < 0.1)
        for i in range(3)
    ]
    try:
        return Instance(
            channels,
            tuple(readers),
            tuple(Block(block, value) for value in range(values) for block in pool if rng.random() < 0.6),
            tuple(Pin(rng.randrange(values), some_set(rng, channels, 2)) for _ in range(rng.random() < 0.2)),
            edges=tuple(Edge(f"e{i}", *pair, rng.randint(0, 9)) for i, pair in enumerate(ends)),
        )
    except InstanceError:
        return None


def test_the_optimum_stays() -> None:
    rng, fewer, paying = random.Random(0), 0, 0
    for _ in range(400 * FUZZ):
        instance = handed_on(rng)
        if instance is None:
            continue
        solution = solve(instance)
        solution.check(instance)
        assert (solution.objective, solution.optimal) == (optimum(instance), True), instance.to_json()
        for problem in split(instance, Scale(1)):
            fewer += len(contract(problem).values) < len(problem.values)
            paying += bool(forbidden(problem))
    assert fewer > 100
    assert paying > 30


def test_a_value_that_hands_channels_on_joins_the_dearer_side() -> None:
    readers = (Reader("left", (0, 2), 9, 0), Reader("right", (1, 2), 9, 2), Reader("both", (0, 1), 9, 2))
    edges = (Edge("cheap", 0, 1, 1), Edge("dear", 1, 2, 5))
    problem = contract(problem_of(Instance(4, readers, edges=edges)))
    assert problem.values == (0, 2)
    assert [(link.ends, link.weight, link.edges) for link in problem.links] == [((0, 2), 1, (0,))]


def test_links_that_become_parallel_are_one() -> None:
    """A sum and a concat that take two slices of one value: to part them is to cut what each of the two hands on."""
    readers = (Reader("a", (0, 2), 9, 0), Reader("b", (1, 2), 9, 3), Reader("c", (0, 1), 9, 3))
    edges = (Edge("0 1", 0, 1, 1), Edge("0 2", 0, 2, 2), Edge("1 3", 1, 3, 4), Edge("2 3", 2, 3, 4))
    problem = contract(problem_of(Instance(4, readers, edges=edges)))
    assert [(link.ends, link.weight, sorted(link.edges)) for link in problem.links] == [((0, 3), 3, [0, 1])]


def test_a_block_that_something_beyond_overlaps_keeps_its_value() -> None:
    """Joined, the block would stand in the way of a reader that pays 9, to spare a cut of 1."""
    edges = (Edge("0 1", 0, 1, 1), Edge("1 2", 1, 2, 1))
    readers = (Reader("a", (0, 1), 9, 0), Reader("b", (1, 2), 9, 0))
    crossed = Instance(5, readers, (Block((0, 2), 2), Block((1, 3), 2)), edges=edges)
    assert len(contract(problem_of(crossed)).values) == 2
    assert solve(crossed).objective == optimum(crossed) == 1
    shared = Instance(5, readers, (Block((1, 3), 0), Block((1, 3), 2)), edges=edges)
    assert len(contract(problem_of(shared)).values) == 1


def test_a_reader_that_blocks_of_its_value_forbid_is_not_searched_for() -> None:
    """A part of each of three operands is no range, whatever else there is; two operands may lie end to end."""
    blocks = tuple(Block(block) for block in ((0, 1), (2, 3), (4, 5)))
    solution = solve(Instance(6, (Reader("three", (0, 2, 4), 7), Reader("two", (1, 2), 5)), blocks))
    assert (solution.objective, solution.optimal, solution.gathered) == (7, True, ("three",))
    assert solution.stats["masters"] == 0


def test_fewer_items_tell_fewer_atoms_apart() -> None:
    problem = problem_of(Instance(6, (Reader("a", (0, 1, 2), 3), Reader("b", (2, 3), 2), Reader("c", (0, 3, 4), 1))))
    assert problem.atoms == 6
    fewer = restrict(problem, [0, 1])
    assert fewer.atoms == 4  # {0, 1}, {2}, {3} and the others
    assert [item.readers for item in fewer.items] == [(0,), (1,)]


@pytest.mark.parametrize("seed", range(3))
def test_a_dual_path_stage_is_few_values(seed: int) -> None:
    """Of seven for every unit, nearly all hand on: what is left are the concats and some of their slices."""
    problem = problem_of(make("dual_path", 128, 16, seed))
    assert len(problem.values) == 112
    assert len(contract(problem).values) <= 32
