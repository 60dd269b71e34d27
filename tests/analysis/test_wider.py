"""Blocks that grow by what their operand can bring."""

from __future__ import annotations

from collections.abc import Sequence

from chanopt.analysis.wider import wider
from chanopt.solve import Block, Edge, Instance, Pin

A, B, C = (0, 1, 2), (3, 4, 5), (6, 7)
"""What a concat grows by, one after another; channel 1 is read of the first concat only."""
FLOWS = (Edge("a", 0, 1, 1), Edge("b", 1, 2, 1), Edge("c", 2, 3, 1))


def blocks_of(instance: Instance | None) -> list[tuple[int, tuple[int, ...]]] | None:
    return None if instance is None else [(block.value, block.set) for block in instance.blocks]


def growing(*, pins: Sequence[Pin] = ()) -> Instance:
    blocks = (Block(A, 1), Block(B, 1), Block((0, 2, 3, 4, 5), 2), Block(C, 2), Block((0, 2, 3, 5, 6), 3))
    return Instance(8, blocks=blocks, pins=tuple(pins), edges=FLOWS)


LIVE = ((0, 1, 2), (*A, *B), (0, 2, *B, *C), (0, 2, 3, 5, 6))


def test_an_operand_brings_what_it_holds_parts_of() -> None:
    """The concat so far, without the channel that is not read any more, is no range: it comes whole."""
    grown = [(1, A), (1, B), (2, (*A, *B)), (2, C), (3, (*A, *B, *C))]
    assert blocks_of(wider(growing(), LIVE)) == grown


def test_it_cannot_bring_what_is_made_further_down() -> None:
    """The first block holds a part of the second's, and is made before the rest of it."""
    instance = Instance(8, blocks=(Block((0, 1, 2), 1), Block((2, 3, 4), 2)), edges=FLOWS)
    assert blocks_of(wider(instance, ((0, 1, 2), (0, 1, 2), (2, 3, 4), ()))) == [(1, (0, 1, 2)), (2, (0, 1, 2, 3, 4))]


def test_nor_what_another_operand_brings() -> None:
    instance = Instance(8, blocks=(Block((0, 1), 1), Block((1, 2), 2), Block((0, 3), 2)), edges=FLOWS)
    assert wider(instance, ((0, 1), (0, 1), (0, 1, 2, 3), ())) is None


def test_nor_what_only_the_values_before_another_operand_have() -> None:
    edges = (Edge("c", 1, 3, 1), Edge("d", 2, 3, 1), Edge("e", 1, 4, 1))
    instance = Instance(6, blocks=(Block((0, 1), 3), Block((2,), 3), Block((1, 5), 4)), edges=edges)
    found = blocks_of(wider(instance, [(), (0, 1), (2, 5), (0, 1, 2), (1, 5)]))
    assert found == [(3, (0, 1)), (3, (2,)), (4, (0, 1, 5))]


def test_a_pinned_value_keeps_its_blocks() -> None:
    pin = Pin(2, (0, 2, 3, 4, 5, 6, 7))
    found = blocks_of(wider(growing(pins=[pin]), LIVE))
    assert found is not None
    assert (2, (0, 2, 3, 4, 5)) in found


def test_nested_blocks_that_would_contradict_each_other_stay() -> None:
    """Three operands of one value in a row, each of which would bring a channel of its own."""
    here = (Block((0, 1), 1), Block((2, 3), 1), Block((4, 5), 1), Block((0, 1, 2, 3), 1), Block((2, 3, 4, 5), 1))
    there = (Block((2, 6), 2),)
    instance = Instance(7, blocks=(*here, *there), edges=FLOWS)
    assert wider(instance, ((*range(7),), (*range(6),), (2, 6), ())) is None


def test_blocks_that_do_not_cross_stay() -> None:
    assert (
        wider(Instance(4, blocks=(Block((0, 1), 1), Block((0, 1, 2), 2)), edges=FLOWS), ((0,), (0,), (0,), ())) is None
    )
