"""The solver on the sizes it was made for, at twice the time it should take."""

from __future__ import annotations

import random
import statistics
import time

import pytest

from benchmarks.solver import make
from chanopt.solve import Edge, Instance, Reader, solve

pytestmark = pytest.mark.slow


def independent(channels: int, readers: int, seed: int) -> Instance:
    """Independent readers of half the channels each."""
    rng = random.Random(seed)
    half = channels // 2
    sets = [tuple(rng.sample(range(channels), half)) for _ in range(readers)]
    return Instance(channels, tuple(Reader(f"r{i}", s, rng.randint(1, 1000)) for i, s in enumerate(sets)))


def stage(channels: int, values: int, seed: int) -> Instance:
    """A residual stage: one reader per value, and a re-layout at a join costs what is still to be read."""
    rng = random.Random(seed)
    sets = [tuple(rng.sample(range(channels), channels // 2)) for _ in range(values)]
    readers = tuple(Reader(f"r{i}", s, len(s) * rng.choice((1, 2, 4)), i) for i, s in enumerate(sets))
    later = [set().union(*sets[i + 1 :]) for i in range(values - 1)]
    return Instance(channels, readers, edges=tuple(Edge(f"e{i}", i, i + 1, len(s)) for i, s in enumerate(later)))


def seconds(instance: Instance) -> float:
    start = time.perf_counter()
    solution = solve(instance, time_limit=60)
    taken = time.perf_counter() - start
    solution.check(instance)
    assert solution.optimal
    return taken


@pytest.fixture(autouse=True)
def warm() -> None:
    """The first use imports OR-Tools."""
    solve(stage(16, 4, 0))


def test_widest_layer() -> None:
    assert min(seconds(independent(2048, 37, seed)) for seed in range(2)) < 2


def test_ordinary_segments() -> None:
    assert statistics.median(seconds(independent(128, 8, seed)) for seed in range(15)) < 0.04
    assert statistics.median(seconds(independent(64, 8, seed)) for seed in range(15)) < 0.04


def test_pieces_of_a_concat() -> None:
    assert statistics.median(seconds(independent(32, 23, seed)) for seed in range(15)) < 0.2


def test_chains_of_nested_sets() -> None:
    """Whose conflicts are of four sets and more."""
    assert min(seconds(make("nested", 512, 32, seed)) for seed in range(2)) < 2


def test_dual_path_stage() -> None:
    """Whose values mostly hand channels on."""
    assert min(seconds(make("dual_path", 512, 32, seed)) for seed in range(2)) < 1.5


def test_residual_stage_that_may_be_laid_out_anew() -> None:
    assert seconds(stage(1024, 37, 0)) < 10


def test_small_residual_stage() -> None:
    assert seconds(stage(16, 12, 0)) < 5
