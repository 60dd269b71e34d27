"""IndexMap and Layout: properties, and the errors of their checks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chanopt.errors import IRError
from chanopt.ir import IndexMap, Layout

NUMBERS = st.lists(st.integers(-1, 40), max_size=30)
CHANNELS = st.lists(st.integers(0, 40), max_size=30)
RUNS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=6)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    channels = draw(st.integers(0, 24))
    order = draw(st.permutations(range(channels)))
    return Layout(channels, IndexMap(order[: draw(st.integers(0, channels))]))


@given(NUMBERS)
def test_text_reads_back(numbers: list[int]) -> None:
    index = IndexMap(numbers)
    assert IndexMap.parse(str(index)) == index
    assert repr(index) == f"IndexMap({str(index)!r})"
    assert index.tolist() == numbers


@given(RUNS)
def test_text_of_long_runs_and_repeats_reads_back(runs: list[tuple[int, int]]) -> None:
    ascending = IndexMap([n for start, size in runs for n in range(start, start + size)])
    repeated = IndexMap([start for start, size in runs for _ in range(size)])
    assert IndexMap.parse(str(ascending)) == ascending
    assert IndexMap.parse(str(repeated)) == repeated


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([3], "3"),
        ([0, 1, 2], "0:3"),
        ([4, 5, 6, 1], "4:7,1"),
        ([2, 1, 0], "2,1,0"),
        ([5, 5, 5], "5x3"),
        ([-1, -1, 0, 1], "-1,-1:2"),
        ([0, 2, 3, 9], "0,2:4,9"),
    ],
)
def test_str(numbers: list[int], text: str) -> None:
    assert IndexMap.parse(str(IndexMap(numbers))).tolist() == numbers
    if -1 not in numbers:
        assert str(IndexMap(numbers)) == text


def test_str_writes_repeats_of_every_channel() -> None:
    """What a flatten of 4x4 maps does to channels."""
    assert str(IndexMap(np.repeat([0, 1, 5], 16))) == "0x16,1x16,5x16"


@pytest.mark.parametrize("text", [" 0:3 , 7 ", "0:3,,7", "0:3,7,"])
def test_parse_is_lenient_with_spaces_and_commas(text: str) -> None:
    assert IndexMap.parse(text).tolist() == [0, 1, 2, 7]


@given(NUMBERS)
def test_runs_are_maximal_and_cover(numbers: list[int]) -> None:
    runs = IndexMap(numbers).runs()
    assert [n for start, stop in runs for n in range(start, stop)] == numbers
    assert all(start < stop for start, stop in runs)
    absent = (IndexMap.ABSENT, IndexMap.ABSENT + 1)  # which is no channel, so nothing continues it
    assert all(left[1] != right[0] or left == absent for left, right in itertools.pairwise(runs))


@given(CHANNELS)
def test_predicates_say_what_their_names_say(numbers: list[int]) -> None:
    index = IndexMap(numbers)
    assert index.is_distinct() == (len(set(numbers)) == len(numbers))
    assert index.is_range() == (len(index.runs()) <= 1)
    assert index.is_identity(len(numbers)) == (numbers == list(range(len(numbers))))
    assert not index.is_identity(len(numbers) + 1)


@given(CHANNELS, st.data())
def test_composition(numbers: list[int], data: st.DataObject) -> None:
    assume(numbers)
    index = IndexMap(numbers)
    positions = st.lists(st.integers(0, len(numbers) - 1), max_size=20)
    first = IndexMap(data.draw(positions))
    assert index[first].tolist() == [numbers[i] for i in first]
    assert index[IndexMap.identity(len(index))] == index
    assume(len(first))
    second = IndexMap(data.draw(st.lists(st.integers(0, len(first) - 1), max_size=20)))
    assert index[first][second] == index[first[second]]
    assert [index[i] for i in range(len(index))] == list(index)


@given(CHANNELS, CHANNELS)
def test_equality_and_hash(left: list[int], right: list[int]) -> None:
    assert (IndexMap(left) == IndexMap(right)) == (left == right)
    assert hash(IndexMap(left)) == hash(IndexMap(np.array(left, dtype=np.int32)))
    assert IndexMap(left) != left


def test_the_array_is_a_read_only_copy() -> None:
    source = np.arange(4)
    index = IndexMap(source)
    source[0] = 9
    assert index.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        index.array[0] = 7


def test_numbers_below_absent_are_refused() -> None:
    with pytest.raises(IRError, match="expected channel numbers of at least 0, found -2"):
        IndexMap([0, -2])


@given(layouts(), st.data())
def test_positions_invert_the_layout(layout: Layout, data: st.DataObject) -> None:
    assume(len(layout))
    wanted = IndexMap(data.draw(st.lists(st.sampled_from(layout.live.tolist()), max_size=20)))
    assert layout.live[layout.positions(wanted)] == wanted
    assert layout.positions(layout.live).is_identity(len(layout))


@given(layouts())
def test_masks_hold_the_live_channels(layout: Layout) -> None:
    mask = layout.mask()
    assert mask.shape == (layout.channels,)
    assert set(np.flatnonzero(mask)) == set(layout.live)
    assert layout.is_identity == (layout == Layout.identity(layout.channels))


def test_a_layout_holds_a_channel_once() -> None:
    with pytest.raises(IRError, match="expected every channel of a layout once, found one twice"):
        Layout(4, IndexMap([0, 1, 0]))


@pytest.mark.parametrize("live", [[0, 4], [-1, 0]])
def test_a_layout_holds_channels_that_exist(live: list[int]) -> None:
    with pytest.raises(IRError, match=r"expected channels within 0\.\.3, found "):
        Layout(4, IndexMap(live))


def test_only_live_channels_have_positions() -> None:
    layout = Layout(6, IndexMap([4, 0, 2]))
    with pytest.raises(IRError, match="expected only live channels to be read, found 1,3 missing from the layout"):
        layout.positions(IndexMap([0, 3, 1]))
    with pytest.raises(IRError, match="expected channels below 6, found 6"):
        layout.positions(IndexMap([0, 6]))
