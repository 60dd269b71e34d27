"""One order of channels and a window in it for every reader."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest

from chanopt.errors import InstanceError
from chanopt.pruning.windows import Reader, Windows, choose
from chanopt.solve import Instance, solve
from chanopt.solve import Reader as Wanted


def best_by_hand(channels: int, readers: Sequence[Reader]) -> float:
    """The most importance over all orders and all windows."""
    best = 0.0
    for order in permutations(range(channels)):
        total = 0.0
        for reader in readers:
            scores = dict(zip(reader.region, reader.scores, strict=True))
            row = [scores[channel] for channel in order]
            total += max(sum(row[start : start + reader.count]) for start in range(channels - reader.count + 1))
        best = max(best, total)
    return best


def common_set(channels: int, count: int, scores: np.ndarray) -> list[int]:
    return sorted(np.argsort(-scores.sum(0), kind="stable")[:count].tolist())


def whole_readers(scores: np.ndarray, counts: Sequence[int]) -> list[Reader]:
    channels = tuple(range(scores.shape[1]))
    return [
        Reader(str(k), channels, count, tuple(row)) for k, (row, count) in enumerate(zip(scores, counts, strict=True))
    ]


def value(readers: Sequence[Reader], kept: Sequence[Sequence[int]]) -> float:
    return sum(
        dict(zip(reader.region, reader.scores, strict=True))[channel]
        for reader, channels in zip(readers, kept, strict=True)
        for channel in channels
    )


def check(found: Windows, readers: Sequence[Reader], common: Sequence[int]) -> None:
    """Every window is as long as asked, in its region, and side by side; and it pays."""
    place = {channel: position for position, channel in enumerate(found.order)}
    assert len(place) == len(found.order)
    for reader, kept in zip(readers, found.kept, strict=True):
        assert len(set(kept)) == reader.count
        assert set(kept) <= set(reader.region)
        positions = sorted(place[channel] for channel in kept)
        assert positions == list(range(positions[0], positions[0] + len(kept))) if kept else True
    assert set(found.order) == {channel for kept in found.kept for channel in kept}
    assert found.importance == pytest.approx(value(readers, found.kept))
    assert found.importance >= value(readers, [sorted(set(common) & set(r.region)) for r in readers]) * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("channels", "count", "readers"), [(6, 3, 3), (6, 4, 4), (6, 2, 3)])
def test_small_instances_are_as_good_as_all_orders(seed: int, channels: int, count: int, readers: int) -> None:
    scores = np.random.default_rng(seed).random((readers, channels))
    common = common_set(channels, count, scores)
    asked = whole_readers(scores, [count] * readers)
    found = choose(channels, asked, common)
    check(found, asked, common)
    assert found.importance == pytest.approx(best_by_hand(channels, asked))


@pytest.mark.parametrize("seed", range(3))
def test_two_readers_get_what_each_would_choose_alone(seed: int) -> None:
    scores = np.random.default_rng(seed).random((2, 60))
    common = common_set(60, 30, scores)
    found = choose(60, whole_readers(scores, [30, 30]), common)
    assert found.importance == pytest.approx(np.sort(scores, 1)[:, 30:].sum())


def test_wide_instances_gain_over_the_common_set() -> None:
    scores = np.random.default_rng(0).random((5, 96)) ** 2
    common = common_set(96, 48, scores)
    asked = whole_readers(scores, [48] * 5)
    found = choose(96, asked, common, effort=60)
    check(found, asked, common)
    alone, together = np.sort(scores, 1)[:, 48:].sum(), scores[:, common].sum()
    assert (found.importance - together) / (alone - together) > 0.4
    sets = [Wanted(reader.name, kept, 1) for reader, kept in zip(asked, found.kept, strict=True)]
    assert solve(Instance(96, tuple(sets))).objective == 0


def test_readers_that_agree_keep_the_common_set() -> None:
    scores = np.tile(np.arange(8.0), (3, 1))
    found = choose(8, whole_readers(scores, [4, 4, 4]), [4, 5, 6, 7])
    assert [sorted(kept) for kept in found.kept] == [[4, 5, 6, 7]] * 3
    assert sorted(found.order) == [4, 5, 6, 7]


def test_the_number_of_live_channels_can_be_bounded() -> None:
    scores = np.random.default_rng(1).random((3, 40))
    common = common_set(40, 20, scores)
    asked = whole_readers(scores, [20] * 3)
    free, bound, none = (choose(40, asked, common, live=live) for live in (None, 25, 1))
    assert len(free.order) > 25 >= len(bound.order) > 20 == len(none.order)
    assert free.importance > bound.importance > none.importance
    for found in (bound, none):
        check(found, asked, common)


def prefixes(
    seed: int, first: int = 12, growth: int = 4, layers: int = 5
) -> tuple[int, list[Reader], list[int], list[tuple[int, ...]]]:
    """Readers of a dense block: each reads all that came before."""
    channels = first + growth * layers
    scores = np.random.default_rng(seed).random((layers + 1, channels)) ** 2
    for number in range(layers + 1):
        scores[number, first + growth * number :] = 0
    common = common_set(channels, channels // 2, scores)
    readers = []
    for number, row in enumerate(scores):
        region = tuple(range(first + growth * number))
        count = len(set(common) & set(region))
        readers.append(Reader(str(number), region, count, tuple(row[: len(region)])))
    spans = [tuple(range(first)), *(tuple(range(first + growth * k, first + growth * (k + 1))) for k in range(layers))]
    return channels, readers, common, spans


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_a_concat_stay_together(seed: int) -> None:
    channels, readers, common, spans = prefixes(seed)
    found = choose(channels, readers, common, spans=spans)
    check(found, readers, common)
    assert found.importance > value(readers, [sorted(set(common) & set(r.region)) for r in readers]) * (1 + 1e-6)
    for span in spans:
        places = [position for position, channel in enumerate(found.order) if channel in span]
        assert places == list(range(places[0], places[0] + len(places))) if places else True


def test_where_no_order_serves_all_regions_one_set_is_kept() -> None:
    regions, counts = [(0, 1), (1, 2), (0, 2)], [2, 1, 1]
    readers = [Reader(str(k), r, n, (1.0, 5.0)) for k, (r, n) in enumerate(zip(regions, counts, strict=True))]
    found = choose(3, readers, [0, 1])
    assert found.kept == ((0, 1), (1,), (0,))
    assert found.order == (0, 1)
    assert found.importance == 1 + 5 + 1 + 1


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InstanceError, match="reader 'a': expected a count within its 2 channels and a score for each"):
        Reader("a", (0, 1), 3, (1.0, 1.0))
    with pytest.raises(InstanceError, match="as many channels as it reads of the common set, 1, found 2"):
        choose(3, [Reader("a", (0, 1), 2, (1.0, 1.0))], [0, 2])
