"""A greedy order of channels, after UPSCALE (Wan et al., ICML 2023, section 3), from its published description.

Consumers are nodes of a graph, joined where they share channels; along a path of it, every consumer can find its
channels as one range: first those shared with its predecessor, then its own, then those shared with its successor.
The path of the most channels is taken, then the next among the consumers that are left. A consumer whose channels
are a subset of another's is ordered inside it. Plain data: channels are numbers, no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

__all__ = ["greedy_order"]

Channels = frozenset[int]

_MOST_STEPS = 20_000
"""The search of one path visits at most so many nodes, the longest path found until then is taken: on sparse sets
their number can grow exponentially with the consumers."""


def greedy_order(readers: Sequence[Iterable[int]], block_of: Mapping[int, int]) -> list[int]:
    """Order the channels that some reader takes.

    Args:
        readers: the channels of every consumer.
        block_of: the producer of every channel; blocks of several producers lie side by side, in ascending order,
            and cannot interleave.

    Returns:
        Every channel of a reader once.
    """
    sets = [frozenset(reader) for reader in readers]
    order = _ordered([channels for channels in sets if channels], block_of)
    return sorted(order, key=lambda channel: block_of[channel])


def _ordered(sets: list[Channels], block_of: Mapping[int, int]) -> list[int]:
    parents = _parents(sets)
    left = [number for number, parent in enumerate(parents) if parent is None]
    after = _successors(left, sets, block_of)
    placed: dict[int, None] = {}
    while left:
        path = _path(left, sets, after)
        left = [number for number in left if number not in path]
        for channel in _along(path, sets, parents, block_of):
            placed.setdefault(channel)
    return list(placed)


def _parents(sets: Sequence[Channels]) -> list[int | None]:
    """The smallest other set that contains each set; None for those in no other. Of equal sets the first leads."""
    found: list[int | None] = []
    for number, channels in enumerate(sets):
        above = [
            other for other, wider in enumerate(sets) if channels < wider or (channels == wider and other < number)
        ]
        found.append(min(above, key=lambda other: len(sets[other]), default=None))
    return found


def _successors(
    nodes: Sequence[int], sets: Sequence[Channels], block_of: Mapping[int, int]
) -> dict[int, dict[int, int]]:
    """The nodes that can follow each, and the channels that each of them adds."""
    sizes = _block_sizes(sets, block_of)
    after: dict[int, dict[int, int]] = {node: {} for node in nodes}
    for one, other in combinations(nodes, 2):
        shared = sets[one] & sets[other]
        if _follows(shared, sizes, block_of):
            after[one][other] = len(sets[other]) - len(shared)
            after[other][one] = len(sets[one]) - len(shared)
    return after


def _path(nodes: Sequence[int], sets: Sequence[Channels], after: Mapping[int, Mapping[int, int]]) -> list[int]:
    """The path of the most channels, each channel counted once."""
    best: list[int] = []
    most = steps = 0
    stack = [([node], frozenset([node]), len(sets[node])) for node in reversed(nodes)]
    while stack and steps < _MOST_STEPS:
        path, barred, count = stack.pop()
        steps += 1
        if count > most:
            best, most = path, count
        adds = after[path[-1]]
        nexts = [node for node in nodes if node in adds and node not in barred]
        # The neighbours that the path does not go on to may not come later: they share channels with this node.
        barred |= adds.keys()
        stack += [([*path, node], barred, count + adds[node]) for node in reversed(nexts)]
    return best or [nodes[0]]


def _block_sizes(sets: Sequence[Channels], block_of: Mapping[int, int]) -> dict[int, int]:
    return Counter(block_of[channel] for channel in frozenset().union(*sets))


def _follows(channels: Channels, sizes: Mapping[int, int], block_of: Mapping[int, int]) -> bool:
    """Whether consumers that share these channels can follow each other: of all blocks but the first one the whole."""
    shared = Counter(map(block_of.__getitem__, channels))
    return bool(shared) and all(shared[block] == sizes[block] for block in sorted(shared)[1:])


def _along(
    path: Sequence[int], sets: Sequence[Channels], parents: Sequence[int | None], block_of: Mapping[int, int]
) -> list[int]:
    """The channels of a path: of each node those shared with the one before, its own, those shared with the next."""
    order: list[int] = []
    for place, node in enumerate(path):
        before = sets[path[place - 1]] if place else frozenset[int]()
        after = sets[path[place + 1]] if place + 1 < len(path) else frozenset[int]()
        inside = _ordered([sets[other] for other in _inside(node, parents)], block_of)
        order += _thirds([*inside, *sorted(sets[node] - set(inside))], before, after)
    return order


def _inside(node: int, parents: Sequence[int | None]) -> list[int]:
    """The sets within a set: its children, and what is within these."""
    children = [child for child, parent in enumerate(parents) if parent == node]
    return sorted({*children, *(deeper for child in children for deeper in _inside(child, parents))})


def _thirds(channels: Iterable[int], before: Channels, after: Channels) -> list[int]:
    return sorted(channels, key=lambda channel: (channel not in before) + (channel in after and channel not in before))
