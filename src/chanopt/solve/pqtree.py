"""A PQ-tree: every order of some labels in which given sets are each one run.

Booth and Lueker, "Testing for the consecutive ones property, interval graphs, and graph planarity using
PQ-tree algorithms", JCSS 13 (1976). The tree here is persistent: a node never changes, a reduction builds new
nodes along one path and shares the rest. So `copy` costs nothing, a reduction that fails leaves the tree as
it was, and the templates of the paper shrink to three functions: the root of the reduction is a P-node, or a
Q-node, and below it at most two partial nodes are flattened into a line.

One thing is new: a Q-node may be *fixed*, that is, may not be turned around. That expresses a sequence whose
order belongs to the user, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from itertools import pairwise
from typing import TypeAlias

from chanopt.errors import InstanceError

__all__ = ["Kind", "Node", "PQTree", "mask_of"]


class Kind(Enum):
    """What the children of a node may do."""

    LEAF = "leaf"
    """No children: one label."""
    P = "P"
    """Children in any order."""
    Q = "Q"
    """Children in this order or in its reverse; in this order alone if the node is fixed."""


class Node:
    """A node of a PQ-tree; never changed once built.

    `mask` has bit `l` set for every label `l` below the node. Only a fixed Q-node may have two children.
    """

    __slots__ = ("children", "fixed", "kind", "mask")

    def __init__(self, kind: Kind, children: tuple[Node, ...], mask: int, fixed: bool = False) -> None:
        self.kind = kind
        self.children = children
        self.mask = mask
        self.fixed = fixed

    def __str__(self) -> str:
        if self.kind is Kind.LEAF:
            return str(self.mask.bit_length() - 1)
        inner = " ".join(str(child) for child in self.children)
        if self.kind is Kind.P:
            return f"({inner})"
        return f"<{inner}>" if self.fixed else f"[{inner}]"


Line: TypeAlias = "tuple[list[Node], int]"
"""Nodes from empty to full, and the direction the line must keep: 0 either, 1 this one, -1 the reverse."""


def mask_of(labels: Iterable[int]) -> int:
    """Return the integer whose set bits are the labels."""
    mask = 0
    for label in labels:
        mask |= 1 << label
    return mask


class PQTree:
    """All orders of the labels 0 .. size - 1 in which every set reduced so far is one run.

    >>> tree = PQTree(4)
    >>> tree.reduce({0, 2}), tree.reduce({2, 3}), tree.reduce({0, 3})
    (True, True, False)
    >>> str(tree), tree.frontier()
    ('(1 [0 2 3])', (1, 0, 2, 3))
    """

    __slots__ = ("_root", "_size")

    def __init__(self, size: int) -> None:
        """Start with every order of `size` labels; raises InstanceError below one label."""
        if size < 1:
            raise InstanceError(f"a PQ-tree needs at least 1 label, found {size}: leave the empty set out")
        self._size = size
        self._root = _group([Node(Kind.LEAF, (), 1 << label) for label in range(size)])

    @property
    def size(self) -> int:
        """The number of labels."""
        return self._size

    @property
    def root(self) -> Node:
        """The root node."""
        return self._root

    @property
    def is_free(self) -> bool:
        """Whether every order is allowed."""
        return all(child.kind is Kind.LEAF for child in self._root.children) and self._root.kind is not Kind.Q

    def __str__(self) -> str:
        return str(self._root)

    def copy(self) -> PQTree:
        """Return an independent tree with the same orders, in constant time."""
        twin = PQTree.__new__(PQTree)
        twin._size, twin._root = self._size, self._root
        return twin

    def reduce(self, labels: Iterable[int]) -> bool:
        """Keep the orders in which the labels are one run; False, and nothing changed, if there is none.

        Raises InstanceError for a label outside 0 .. size - 1.
        """
        return self.reduce_mask(self._mask(labels))

    def reduce_mask(self, mask: int) -> bool:
        """Reduce by the set whose members are the set bits of `mask`, all below `size`."""
        if mask & (mask - 1) == 0:
            return True
        path, node = self._holder(mask)
        if node.mask == mask:
            return True
        rebuilt = _reduce_p(node, mask) if node.kind is Kind.P else _reduce_q(node, mask)
        if rebuilt is None:
            return False
        self._root = _rebuild(path, rebuilt)
        return True

    def order(self, sequence: Sequence[int]) -> bool:
        """Keep the orders in which the sequence is one run, in exactly this order; False as in `reduce`."""
        mask = self._mask(sequence)
        if mask.bit_count() != len(sequence):
            raise InstanceError(f"expected a sequence without repeats, found {list(sequence)}: drop the repeats")
        if len(sequence) < 2:
            return True
        trial = self.copy()
        if not trial.reduce_mask(mask):
            return False
        path, node = trial._holder(mask)
        rebuilt = _line_up(node, mask, sequence)
        if rebuilt is None:
            return False
        self._root = _rebuild(path, rebuilt)
        return True

    def frontier(self, positions: Sequence[float] | None = None, sizes: Sequence[int] | None = None) -> tuple[int, ...]:
        """Return one of the orders: the one nearest to `positions` (by default the labels themselves).

        Children of a P-node ascend by the mean position of the labels below them; a Q-node is turned so that
        the means ascend if it may be. `sizes` weighs the labels in the means.
        """
        return _arrange(self._root, positions or range(self._size), sizes or (1,) * self._size)

    def _mask(self, labels: Iterable[int]) -> int:
        found = list(labels)
        if found and not (min(found) >= 0 and max(found) < self._size):
            raise InstanceError(f"expected labels in 0 .. {self._size - 1}, found {found}: check the set")
        return mask_of(found)

    def _holder(self, mask: int) -> tuple[list[tuple[Node, int]], Node]:
        """Return the lowest node that holds the whole mask, and the path of (parent, index) to it."""
        path: list[tuple[Node, int]] = []
        node = self._root
        while node.mask != mask:
            index = _first(node.children, mask)
            child = node.children[index]
            if child.mask & mask != mask:
                break
            path.append((node, index))
            node = child
        return path, node


def _first(children: Sequence[Node], mask: int) -> int:
    """Return the index of the first child that has a label in the mask."""
    return next(index for index, child in enumerate(children) if child.mask & mask)


def _rebuild(path: list[tuple[Node, int]], node: Node) -> Node:
    for parent, index in reversed(path):
        children = (*parent.children[:index], node, *parent.children[index + 1 :])
        node = Node(parent.kind, children, parent.mask, parent.fixed)
    return node


def _union(children: Iterable[Node]) -> int:
    mask = 0
    for child in children:
        mask |= child.mask
    return mask


def _group(children: list[Node]) -> Node:
    """Return a P-node over the children; the child itself if there is one."""
    if len(children) == 1:
        return children[0]
    return Node(Kind.P, tuple(children), _union(children))


def _line_node(children: list[Node], direction: int) -> Node:
    """Return a Q-node over at least two children, fixed in its direction if that is not 0."""
    if len(children) == 2 and direction == 0:
        return _group(children)
    ordered = children[::-1] if direction < 0 else children
    return Node(Kind.Q, tuple(ordered), _union(children), direction != 0)


def _agree(*directions: int) -> int | None:
    """Return the direction that all keep, 0 if every one is 0, None if two are contrary."""
    return None if 1 in directions and -1 in directions else sum(set(directions))


def _sort(children: Iterable[Node], mask: int) -> tuple[list[Node], list[Node], list[Node]]:
    """Return the children without, with only, and with some labels of the mask."""
    empty: list[Node] = []
    full: list[Node] = []
    partial: list[Node] = []
    for child in children:
        common = child.mask & mask
        if not common:
            empty.append(child)
        elif common == child.mask:
            full.append(child)
        else:
            partial.append(child)
    return empty, full, partial


def _reduce_p(node: Node, mask: int) -> Node | None:
    """Reduce at a P-node with labels of the mask under two children or more (templates P2, P4, P6)."""
    empty, full, partial = _sort(node.children, mask)
    if len(partial) > 2:
        return None
    if not partial:
        return _group([*empty, _group(full)])
    left = _linear(partial[0], mask)
    right = _linear(partial[1], mask) if len(partial) == 2 else ([], 0)
    if left is None or right is None:
        return None
    direction = _agree(left[1], -right[1])
    if direction is None:
        return None
    middle = [_group(full)] if full else []
    return _group([*empty, _line_node([*left[0], *middle, *reversed(right[0])], direction)])


def _reduce_q(node: Node, mask: int) -> Node | None:
    """Reduce at a Q-node with labels of the mask under two children or more (templates Q2, Q3)."""
    children = node.children
    first = _first(children, mask)
    last = len(children) - 1 - _first(children[::-1], mask)
    inner = children[first + 1 : last]
    if any(child.mask & ~mask for child in inner):
        return None
    left, right = _linear(children[first], mask), _linear(children[last], mask)
    if left is None or right is None:
        return None
    direction = _agree(1 if node.fixed else 0, left[1], -right[1])
    if direction is None:
        return None
    line = [*children[:first], *left[0], *inner, *reversed(right[0]), *children[last + 1 :]]
    return _line_node(line, direction)


def _linear(node: Node, mask: int) -> Line | None:
    """Flatten a node into a line, labels of the mask last (templates P3, P5, Q2); None if impossible.

    A partial node has at most one partial child, so this is a walk down one path.
    """
    head: list[Node] = []
    tails: list[list[Node]] = []
    direction = 0
    while node.mask & ~mask and node.mask & mask:
        step = _linear_p(node, mask) if node.kind is Kind.P else _linear_q(node, mask)
        if step is None:
            return None
        empty, middle, full, turn = step
        agreed = _agree(direction, turn)
        if agreed is None:
            return None
        direction = agreed
        head.extend(empty)
        tails.append(full)
        if middle is None:
            break
        node = middle
    else:
        tails.append([node])
    return head + [child for tail in reversed(tails) for child in tail], direction


Step: TypeAlias = "tuple[Sequence[Node], Node | None, list[Node], int]"
"""Empty nodes, the partial node if there is one, full nodes, and the direction they must keep."""


def _linear_p(node: Node, mask: int) -> Step | None:
    empty, full, partial = _sort(node.children, mask)
    if len(partial) > 1:
        return None
    return (
        [_group(empty)] if empty else [],
        partial[0] if partial else None,
        [_group(full)] if full else [],
        0,
    )


def _linear_q(node: Node, mask: int) -> Step | None:
    for children, turn in ((node.children, 1), (node.children[::-1], -1)):
        first = _first(children, mask)
        rest = children[first + 1 :]
        if any(child.mask & ~mask for child in rest):
            continue
        direction = turn if node.fixed else 0
        if children[first].mask & ~mask:
            return children[:first], children[first], list(rest), direction
        return children[:first], None, list(children[first:]), direction
    return None


def _line_up(node: Node, mask: int, sequence: Sequence[int]) -> Node | None:
    """Replace what is below the mask by the sequence as a fixed line; None if the node does not allow it.

    The mask was reduced just now, so its labels are the whole node, or whole neighbours in a Q-node.
    """
    leaves = [Node(Kind.LEAF, (), 1 << label) for label in sequence]
    place = {label: index for index, label in enumerate(sequence)}
    if node.mask == mask:
        return Node(Kind.Q, tuple(leaves), mask, True) if _allows(node, place) else None
    run = [index for index, child in enumerate(node.children) if child.mask & mask]
    pieces = [node.children[index] for index in run]
    if not _allows(Node(Kind.Q, tuple(pieces), mask), place):
        return None
    turn = 1 if _lowest(pieces[0], place) < _lowest(pieces[-1], place) else -1
    direction = _agree(turn, 1 if node.fixed else 0)
    if direction is None:
        return None
    line = [*node.children[: run[0]], *leaves[::turn], *node.children[run[-1] + 1 :]]
    return _line_node(line, direction)


def _allows(node: Node, place: dict[int, int]) -> bool:
    """Whether the labels below the node can stand in the order of their places."""
    positions = [place.get(label, 0) for label in range(node.mask.bit_length())]
    found = [place[label] for label in _arrange(node, positions, [1] * len(positions))]
    return all(a < b for a, b in pairwise(found))


def _lowest(node: Node, place: dict[int, int]) -> int:
    return min(place[label] for label in labels_of(node.mask))


def labels_of(mask: int) -> Iterator[int]:
    """Yield the set bits of a mask in ascending order."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def post_order(root: Node) -> list[Node]:
    """Return the nodes with children before parents; without recursion, as trees may be deep."""
    found: list[Node] = []
    stack = [root]
    while stack:
        node = stack.pop()
        found.append(node)
        stack.extend(node.children)
    return found[::-1]


def _arrange(root: Node, positions: Sequence[float], sizes: Sequence[int]) -> tuple[int, ...]:
    moments: dict[int, tuple[float, int]] = {}
    for node in post_order(root):
        if node.kind is Kind.LEAF:
            label = node.mask.bit_length() - 1
            moments[id(node)] = (positions[label] * sizes[label], sizes[label])
            continue
        below = [moments[id(child)] for child in node.children]
        moments[id(node)] = (sum(total for total, _ in below), sum(count for _, count in below))

    def mean(node: Node) -> float:
        total, count = moments[id(node)]
        return total / count

    order: list[int] = []
    stack = [root]
    while stack:
        node = stack.pop()
        if node.kind is Kind.LEAF:
            order.append(node.mask.bit_length() - 1)
            continue
        stack.extend(reversed(_turned(node, [mean(child) for child in node.children])))
    return tuple(order)


def _turned(node: Node, means: list[float]) -> Sequence[Node]:
    """Return the children in the allowed order that comes nearest to ascending means."""
    if node.kind is Kind.P:
        ranks = sorted(range(len(means)), key=means.__getitem__)
        return [node.children[rank] for rank in ranks]
    middle = (len(means) - 1) / 2
    slope = sum((index - middle) * mean for index, mean in enumerate(means))
    return node.children[::-1] if slope < 0 and not node.fixed else node.children
