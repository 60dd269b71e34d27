"""The PQ-tree against brute force over all orders."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chanopt.errors import InstanceError
from chanopt.solve import PQTree
from chanopt.solve.pqtree import Kind, Node
from tests.solve.brute import FUZZ, is_run, is_sequence, orders, some_set


def frontiers(node: Node) -> Iterator[tuple[int, ...]]:
    """Every order that a tree stands for, by the definition of its nodes."""
    if node.kind is Kind.LEAF:
        yield (node.mask.bit_length() - 1,)
        return
    below = [list(frontiers(child)) for child in node.children]
    turns = [below] if node.fixed else [below, below[::-1]]
    for arranged in itertools.permutations(below) if node.kind is Kind.P else turns:
        for pieces in itertools.product(*arranged):
            yield tuple(itertools.chain(*pieces))


def well_formed(node: Node) -> bool:
    """Masks are unions; P-nodes have two children or more, Q-nodes three, or two if they are fixed."""
    if node.kind is Kind.LEAF:
        return node.mask.bit_count() == 1 and not node.children and not node.fixed
    least = 3 if node.kind is Kind.Q and not node.fixed else 2
    total = sum(child.mask for child in node.children)
    return (
        len(node.children) >= least
        and node.mask == total
        and node.mask.bit_count() == sum(child.mask.bit_count() for child in node.children)
        and not (node.fixed and node.kind is Kind.P)
        and all(map(well_formed, node.children))
    )


@pytest.mark.parametrize(("channels", "count", "ordered"), [(4, 800, 0), (5, 800, 0), (5, 800, 0.4), (6, 150, 0.3)])
def test_tree_stands_for_exactly_the_orders_that_are_left(channels: int, count: int, ordered: float) -> None:
    rng = random.Random(channels)
    for _ in range(count * FUZZ):
        tree, left = PQTree(channels), np.ones(len(orders(channels)), dtype=bool)
        for _ in range(rng.randint(1, 6)):
            members = some_set(rng, channels)
            before, text = tree.root, str(tree)
            if members and rng.random() < ordered:
                found, now = tree.order(members), left & is_sequence(channels, members)
            else:
                found, now = tree.reduce(members), left & is_run(channels, members)
            assert found == bool(now.any()), (text, members)
            if not found:
                assert tree.root is before
                assert str(tree) == text
                continue
            left = now
            stood = list(frontiers(tree.root))
            assert sorted(stood) == [order for order, kept in zip(orders(channels), left, strict=True) if kept]
            assert tree.frontier() in set(stood)
            assert well_formed(tree.root)


def test_seven_labels_answer_as_brute_force_does() -> None:
    rng = random.Random(7)
    answers = set[bool]()
    for _ in range(1500 * FUZZ):
        tree, left = PQTree(7), np.ones(5040, dtype=bool)
        for _ in range(rng.randint(3, 9)):
            members = tuple(rng.sample(range(7), rng.randint(2, 6)))
            now = left & is_run(7, members)
            assert tree.reduce(members) == bool(now.any())
            answers.add(bool(now.any()))
            left = now if now.any() else left
        place = {label: position for position, label in enumerate(tree.frontier())}
        assert left[orders(7).index(tree.frontier())], place
    assert answers == {True, False}


@given(st.integers(1, 60), st.randoms(use_true_random=False))
def test_ranges_of_one_hidden_order_always_fit(channels: int, rng: random.Random) -> None:
    hidden = rng.sample(range(channels), channels)
    tree = PQTree(channels)
    ranges = [sorted(rng.sample(range(channels + 1), 2)) for _ in range(12)]
    assert all(tree.reduce(hidden[start:stop]) for start, stop in ranges)
    assert tree.order(hidden)
    assert tree.frontier() == tuple(hidden)
    for start, stop in ranges:
        assert tree.reduce(hidden[start:stop])


def test_prints_as_it_is_read() -> None:
    tree = PQTree(5)
    assert str(tree) == "(0 1 2 3 4)"
    assert tree.reduce({1, 2})
    assert tree.reduce({2, 3})
    assert str(tree) == "(0 4 [1 2 3])"
    assert tree.order((4, 0))
    assert str(tree) == "([1 2 3] <4 0>)"


def test_contrary_sequences_of_one_line_conflict() -> None:
    tree = PQTree(4)
    assert tree.order((0, 1))
    assert tree.order((3, 2))
    assert tree.copy().reduce((1, 3)), "0 1 3 2 is in order"
    assert not tree.reduce((1, 2)), "0 1 2 3 turns the second sequence"
    assert not tree.order((1, 0))


def test_copy_is_independent() -> None:
    tree = PQTree(4)
    twin = tree.copy()
    assert twin.reduce({0, 3})
    assert str(tree) == "(0 1 2 3)"
    assert twin.frontier() != tree.frontier()


def test_frontier_is_near_the_positions() -> None:
    tree = PQTree(4)
    assert tree.frontier([3, 2, 1, 0]) == (3, 2, 1, 0)
    assert tree.reduce({0, 1})
    assert tree.reduce({1, 2})
    assert tree.frontier([3, 2, 1, 0]) == (3, 2, 1, 0)
    assert tree.frontier([0, 1, 2, 0.5], [1, 1, 1, 9]) == (3, 0, 1, 2)


def test_deep_trees_need_no_recursion() -> None:
    tree = PQTree(3000)
    assert all(tree.reduce(range(size)) for size in range(2, 3000))
    assert tree.frontier() == tuple(range(3000))
    assert tree.reduce({1, 2}), "a set across the bottom"
    assert not tree.reduce({1, 2500})


def test_all_orders_are_counted_before_any_set() -> None:
    assert len(set(frontiers(PQTree(5).root))) == math.factorial(5)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InstanceError, match="at least 1 label, found 0"):
        PQTree(0)
    with pytest.raises(InstanceError, match=r"expected labels in 0 \.\. 2, found \[1, 3\]"):
        PQTree(3).reduce([1, 3])
    with pytest.raises(InstanceError, match=r"expected labels in 0 \.\. 2, found \[-1\]"):
        PQTree(3).reduce([-1])
    with pytest.raises(InstanceError, match=r"without repeats, found \[1, 1\]"):
        PQTree(3).order([1, 1])
