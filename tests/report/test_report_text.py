"""The report as text: tables whose columns stand under one another, and the figures in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from chanopt.report import Report
from chanopt.report.text import WIDTH, render
from chanopt.report.units import count, duration, ratio, shortened, size, tail
from chanopt.report.views import original_bytes
from tests.report import samples

RULE = re.compile(r"-+(  -+)*")


def tables(text: str) -> dict[str, list[str]]:
    """Heading, rule and rows of every table, by the first word of its heading."""
    found: dict[str, list[str]] = {}
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if not RULE.fullmatch(line):
            continue
        last = next((n for n in range(number, len(lines)) if not lines[n]), len(lines))
        rows = [row for row in lines[number + 1 : last] if not re.match(r"\.\.\. and|\d+ more with", row)]
        found[lines[number - 1].split()[0]] = [lines[number - 1], line, *rows]
    return found


def cells(table: list[str]) -> list[list[str]]:
    spans = [match.span() for match in re.finditer("-+", table[1])]
    return [[row[start:stop].strip() for start, stop in spans] for row in table[2:]]


@pytest.fixture(scope="module")
def text() -> str:
    return render(samples.by_hand())


@pytest.mark.parametrize("make", [samples.by_hand, samples.hostile, samples.empty, samples.large, samples.by_chanopt])
def test_columns_stand_under_one_another(make: Callable[[], Report]) -> None:
    for heading, rule, *rows in tables(render(make())).values():
        gaps = [match.start() for match in re.finditer(" ", rule)]
        for row in (heading, *rows):
            assert len(row) <= len(rule)
            assert all(row[gap : gap + 1] in ("", " ") for gap in gaps), (rule, row)
        assert rows


@pytest.mark.parametrize("make", [samples.by_hand, samples.hostile, samples.empty, samples.large, samples.by_chanopt])
@pytest.mark.parametrize("rows", [30, None])
def test_no_line_is_too_long_or_ends_in_spaces(make: Callable[[], Report], rows: int | None) -> None:
    for line in render(make(), rows).split("\n"):
        assert len(line) <= WIDTH
        assert line == line.rstrip()


def test_str_of_a_report_is_the_text(text: str) -> None:
    assert str(samples.by_hand()) == text
    assert text.isascii()


def test_headline(text: str) -> None:
    assert cells(tables(text)["Sample"]) == [
        ["multiply-accumulates", "4.09 G", "647 M", "6.3x fewer"],
        ["parameters", "25.6 M", "5.77 M", "4.4x fewer"],
        ["bytes gathered", "13.1 kB", "3.10 kB", "4.2x fewer"],
    ]
    assert "9 consumers: 6 slices, 2 with a gather; 3 copies of 2793 channels, 3.10 kB" in text


def test_segments_with_their_proof(text: str) -> None:
    assert cells(tables(text)["segment"]) == [
        ["joined", "5", "5", "1", "1", "13.0 kB", "3.00 kB", "3.00 kB", "yes", "4.2 ms"],
        ["open", "3", "3", "1", "0", "100 B", "100 B", "40 B", "gap 60.0 %", "4.2 ms"],
    ]
    assert "1 more with a single reader" in text


def test_cuts_say_where_and_what(text: str) -> None:
    assert cells(tables(text)["cut"]) == [["joined", "re-laid out between relu and relu_1: 2.00 kB"]]
    uncut = replace(samples.by_hand(), segments=samples.by_hand().segments[1:])
    assert "re-laid out" not in render(uncut)


def test_layers_with_their_main_reasons(text: str) -> None:
    assert cells(tables(text)["layer"]) == [
        ["conv1", "64 ->   32", "128 ->   64", "range", "6.42 M", "conv2 (17), the model's output (2)"],
        ["conv2", "64 ->   32", "128 ->   64", "gather", "6.42 M", "c (20), a (8), +1"],
        ["conv3", "64 ->    0", "64 ->    0", "gone", "0", ""],
    ]


def test_refusals_and_timings(text: str) -> None:
    assert "  aten.argmax.default in head from model.py:12\n      no channel rule for it\n" in text
    assert cells(tables(text)["stage"]) == [["capture", "1.50 s"], ["optimize", "250.0 ms"]]


def test_long_tables_are_cut_and_say_so() -> None:
    report = samples.large()
    short, full = render(report), render(report, rows=None)
    assert len(tables(short)["layer"]) == len(tables(short)["segment"]) == 32
    assert "... and 170 more" in short
    assert len(tables(full)["layer"]) == 2 + len(report.layers)
    assert len(tables(full)["segment"]) == 2 + len(report.segments)
    assert "... and" not in full


def test_sections_without_content_are_left_out() -> None:
    text = render(samples.empty())
    assert "Segments: none has two readers" in text
    assert not {"layer", "stage", "cut", "segment"} & set(tables(text))
    assert "Refusals" not in text


def test_original_bytes_are_what_the_readers_pay_in_the_order_of_the_channels() -> None:
    joined, open_, flat = samples.by_hand().segments
    assert original_bytes(joined) == 6_000 + 7_000
    assert (original_bytes(open_), original_bytes(flat)) == (100, 0)


def test_units() -> None:
    assert [count(n) for n in (9_999, 10_000, 999_499, 999_500, 1.5e9)] == [
        "9999",
        "10.0 k",
        "999 k",
        "1.00 M",
        "1.50 G",
    ]
    assert [size(n) for n in (0, 999.4, 999.6, 99_960, 2.5e6)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "100 kB",
        "2.50 MB",
    ]
    assert [duration(s) for s in (0.0123, 0.99, 1)] == ["12.3 ms", "990.0 ms", "1.00 s"]
    assert [ratio(*pair) for pair in ((4, 2), (2, 2), (2, 0), (0, 2), (2, 4))] == [
        "2.0x fewer",
        "unchanged",
        "none left",
        "new",
        "2.0x more",
    ]


@pytest.mark.parametrize("width", range(1, 30))
def test_shortened_names_fit_and_keep_their_end(width: int) -> None:
    name = "features.denseblock1.layer12.conv1"
    assert len(shortened(name, width)) == width
    assert len(tail(name, width)) <= width
    if width >= 5:
        assert tail(name, width).endswith(name[-2:])
    assert shortened("conv1", max(width, 5)) == tail("conv1", max(width, 5)) == "conv1"
