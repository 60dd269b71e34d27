"""Brute force over all orders, and random instances small enough for it. Shares no code with the solver."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import permutations, product

import numpy as np
import numpy.typing as npt

from chanopt.solve import Block, Edge, Instance, Pin, Preference, Reader

FUZZ = int(os.environ.get("CHANOPT_FUZZ", "1"))
"""Multiplies the number of random cases."""

Rows = npt.NDArray[np.bool_]


@cache
def orders(channels: int) -> list[tuple[int, ...]]:
    return list(permutations(range(channels)))


@cache
def places(channels: int) -> npt.NDArray[np.int8]:
    """Row r: the position of every channel in order r."""
    return np.argsort(np.array(orders(channels), dtype=np.int8), axis=1).astype(np.int8)


def is_run(channels: int, members: Sequence[int]) -> Rows:
    """In which orders the members are one range."""
    table = places(channels)
    if not members:
        return np.ones(len(table), dtype=bool)
    found = table[:, list(members)]
    return found.max(axis=1) - found.min(axis=1) == len(members) - 1


def is_sequence(channels: int, members: Sequence[int]) -> Rows:
    """In which orders the members are one range, as they stand."""
    found = places(channels)[:, list(members)]
    return (np.diff(found, axis=1) == 1).all(axis=1)


def touched(channels: int, members: Sequence[int], grain: int) -> npt.NDArray[np.intp]:
    """How many aligned blocks of positions hold a member, in every order."""
    blocks = places(channels)[:, list(members)] // grain
    return np.array([(blocks == block).any(axis=1) for block in range(-(-channels // grain))]).sum(axis=0)


def value_costs(instance: Instance, value: int) -> npt.NDArray[np.float64]:
    """What the readers of a value pay in every order; infinity where a block or pin is broken."""
    n = instance.channels
    paid = np.zeros(len(orders(n)))
    for reader in instance.readers:
        if reader.value == value and reader.grain:
            paid += reader.weight * touched(n, reader.set, reader.grain)
        elif reader.value == value:
            free = is_sequence(n, reader.set) if reader.ordered else is_run(n, reader.set)
            paid += np.where(free, 0.0, reader.weight)
    for block in instance.blocks:
        if block.value == value:
            paid[~is_run(n, block.set)] = np.inf
    for pin in instance.pins:
        if pin.value == value:
            paid[~is_sequence(n, pin.sequence)] = np.inf
    return paid


def optimum(instance: Instance) -> float:
    """The least objective over all subsets of cut edges and all orders of every part."""
    costs = [value_costs(instance, value) for value in range(instance.values)]
    best = np.inf
    for cut in product((False, True), repeat=len(instance.edges)):
        total = sum(edge.weight for edge, gone in zip(instance.edges, cut, strict=True) if gone)
        joined = [(e.source, e.target) for e, gone in zip(instance.edges, cut, strict=True) if not gone]
        for part in components(len(costs), joined):
            total += sum(costs[value] for value in part).min()
        best = min(best, total)
    return float(best)


def components(count: int, joined: Sequence[tuple[int, int]]) -> list[list[int]]:
    label = list(range(count))
    for first, second in joined:
        old, new = label[second], label[first]
        label = [new if name == old else name for name in label]
    return [[value for value in range(count) if label[value] == name] for name in sorted(set(label))]


def some_set(rng: random.Random, channels: int, least: int = 0) -> tuple[int, ...]:
    return tuple(rng.sample(range(channels), rng.randint(min(least, channels), channels)))


def random_instance(
    rng: random.Random,
    *,
    channels: tuple[int, int] = (1, 6),
    readers: tuple[int, int] = (0, 8),
    blocks: int = 0,
    pins: int = 0,
    ordered: float = 0.0,
    values: int = 1,
    edges: int = 0,
    prefer: int = 0,
    grains: Sequence[int] = (),
    weight: Callable[[random.Random], float] = lambda rng: rng.randint(0, 9),
) -> Instance | None:
    """A random instance; None where its blocks and pins happen to contradict each other."""
    n = rng.randint(*channels)
    value = (lambda: rng.randrange(values)) if values > 1 else (lambda: 0)
    pairs = [rng.sample(range(values), 2) for _ in range(edges)]
    parts = {
        "readers": tuple(
            Reader(f"r{i}", some_set(rng, n), weight(rng), value(), rng.random() < ordered)
            for i in range(rng.randint(*readers))
        )
        + tuple(Reader(f"g{i}", some_set(rng, n), weight(rng), value(), grain=g) for i, g in enumerate(grains)),
        "blocks": tuple(Block(some_set(rng, n), value()) for _ in range(rng.randint(0, blocks))),
        "pins": tuple(Pin(value(), some_set(rng, n)) for _ in range(rng.randint(0, pins))),
        "edges": tuple(Edge(f"e{i}", *pair, weight(rng)) for i, pair in enumerate(pairs)),
        "prefer": tuple(Preference(some_set(rng, n), value(), weight(rng)) for _ in range(prefer)),
    }
    for at in range(values):
        hard = np.ones(len(orders(n)), dtype=bool)
        for block in parts["blocks"]:
            hard &= is_run(n, block.set) | (block.value != at)
        for pin in parts["pins"]:
            hard &= is_sequence(n, pin.sequence) | (pin.value != at)
        if not hard.any():
            return None
    return Instance(channels=n, **parts)


def random_instances(seed: int, count: int, **options: object) -> Iterator[Instance]:
    """`count` times CHANOPT_FUZZ random instances."""
    rng = random.Random(seed)
    found = 0
    while found < count * FUZZ:
        instance = random_instance(rng, **options)  # pyright: ignore[reportArgumentType]
        if instance is not None:
            found += 1
            yield instance
