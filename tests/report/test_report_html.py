"""The report as a page: well-formed, alone, escaped, and with pictures that show the orders."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest

from chanopt.errors import ChanoptError
from chanopt.report import Report, SegmentReport, html
from chanopt.report.views import branching, rows
from chanopt.solve import Instance, Reader, Solution
from tests.report import samples

VOID = {"meta", "link", "br", "hr", "img", "input"}
SIDES = ("before", "after")
Attributes = list[tuple[str, "str | None"]]


@dataclass
class Svg:
    """A picture as it stands in the page: its texts, and its strips as (class, path)."""

    size: tuple[int, int]
    labelled_by: list[str]
    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    strips: list[tuple[str, str]] = field(default_factory=list)


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags, ids, texts and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.svgs: list[Svg] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Attributes) -> None:
        table = dict(attrs)
        self._see(tag, table)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Attributes) -> None:
        self._see(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "svg" in self.open and self.open[-1] in ("title", "desc"):
            self.svgs[-1].texts.append(data)

    def _see(self, tag: str, table: dict[str, str | None]) -> None:
        self.tags.append((tag, table))
        if tag == "svg":
            _, _, width, height = (table["viewbox"] or "").split()
            self.svgs.append(Svg((int(width), int(height)), (table["aria-labelledby"] or "").split()))
        elif tag in ("title", "desc") and "svg" in self.open and table.get("id"):
            self.svgs[-1].ids.append(str(table["id"]))
        elif tag == "path" and table["class"] != "track":
            self.svgs[-1].strips.append((str(table["class"]), str(table["d"])))

    def attributes(self, name: str) -> list[str]:
        return [str(table[name]) for _, table in self.tags if name in table]


def columns(path: str) -> list[int]:
    """The columns that a strip fills."""
    runs = re.fullmatch(r"M(\d+) \d+h(\d+)((?:m\d+ 0h\d+)*)", path)
    assert runs, path
    start, length = int(runs[1]), int(runs[2])
    filled = list(range(start, start + length))
    for gap, further in re.findall(r"m(\d+) 0h(\d+)", runs[3]):
        assert int(gap) > 0  # neighbours are merged
        start, length = start + length + int(gap), int(further)
        filled += range(start, start + length)
    return filled


def expected(segment: SegmentReport, side: str) -> dict[str, list[int]]:
    """Where every reader's channels stand, from the definition."""
    found: dict[str, list[int]] = {}
    for reader in segment.instance.readers:
        order = segment.solution.orders[reader.value] if side == "after" else range(segment.instance.channels)
        found[reader.name] = [place for place, channel in enumerate(order) if channel in reader.set]
    return found


MAKERS = [samples.by_hand, samples.hostile, samples.empty, samples.large, samples.by_chanopt]
Maker = Callable[[], Report]


@pytest.mark.parametrize("make", MAKERS)
def test_well_formed_with_two_pictures_a_segment(make: Maker) -> None:
    report = make()
    page = Page(html.render(report))
    assert len(page.svgs) == 2 * len(branching(report))
    assert len(page.attributes("id")) == len(set(page.attributes("id")))


@pytest.mark.parametrize("make", MAKERS)
def test_self_contained(make: Maker) -> None:
    text = html.render(make())
    page = Page(text)
    assert not re.search(r"https?:|//|url\(|@import", text.replace("</", ""))
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not {"src", "href", "xlink:href"} & {name for _, table in page.tags for name in table}
    assert not [name for _, table in page.tags for name in table if name.startswith("on")]


def test_names_are_escaped_wherever_they_stand() -> None:
    text = html.render(samples.hostile())
    assert "<script" not in text
    shown = [data for data in Page(text).texts if samples.EVIL in data]
    # Page title, heading, summary, label, four in pictures, cut, layer, read, reason, refusal (4), stage.
    assert len(shown) >= 14
    assert samples.EVIL in Page(text).attributes("title")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("seed", range(4))
def test_pictures_show_where_the_channels_stand(side: str, seed: int) -> None:
    segment = samples.drawn(40, 7, seed, values=4)
    report = replace(samples.by_hand(), segments=(segment,))
    svg = Page(html.render(report)).svgs[SIDES.index(side)]
    where = expected(segment, side)
    found = {row.name: columns(path) for row, (_, path) in zip(rows(segment, 40), svg.strips, strict=True)}
    assert found == where
    assert svg.size[0] == 40


def test_free_readers_are_one_run_and_paying_ones_are_not() -> None:
    before, after = Page(html.render(samples.by_hand())).svgs[:2]
    assert [kind for kind, _ in before.strips] == ["free", "free", "pay", "pay", "free"]
    assert [kind for kind, _ in after.strips] == ["free", "free", "free", "free", "pay"]
    for kind, path in (*before.strips, *after.strips):
        assert (path.count("h") == 1) == (kind == "free")


def test_a_cut_stands_between_the_readers_it_parts() -> None:
    report = samples.by_hand()
    text = html.render(report)
    assert text.count('<p class="cut"') == 1
    assert "<span>re-laid out: 2.00 kB</span>" in text
    assert "<li>re-laid out between relu and relu_1: 2.00 kB</li>" in text
    svg = Page(text).svgs[1]
    tops = [int(path[1:].split("h")[0].split()[1]) for _, path in svg.strips]
    steps = [below - above for above, below in pairwise(tops)]
    assert steps == [html.ROW, html.ROW + html.GAP, html.ROW, html.ROW]
    line = int(re.findall(r'<p class="cut" style="top:(\d+)px"', text)[0])
    assert tops[1] + html.ROW // 2 < line < tops[2] - html.ROW // 2


def test_many_channels_share_columns_and_free_readers_stay_one_run() -> None:
    sets = {
        "first": range(1024),
        "second": range(512, 2500),
        "one": range(2047, 2048),
        "odd": range(1, 4096, 2),
    }
    instance = Instance(4096, tuple(Reader(name, tuple(these), len(these)) for name, these in sets.items()))
    order = tuple(range(4096))
    solution = Solution(order, (order,), (0,), ("odd",), (), 2048, 2048, True, 0.1)
    report = replace(samples.by_hand(), segments=(samples.segment("wide", instance, solution),))
    text = html.render(report)
    svg = Page(text).svgs[1]
    assert "each column stands for 3 channels" in text
    assert svg.size[0] == 1366 <= html.COLUMNS
    assert [(kind, path.count("h")) for kind, path in svg.strips[:3]] == [("free", 1)] * 3
    assert [len(columns(path)) for _, path in svg.strips[:3]] == [341, 662, 1]
    assert svg.strips[3][0] == "pay"


def test_pictures_have_names_and_descriptions() -> None:
    page = Page(html.render(samples.by_hand()))
    for svg in page.svgs:
        assert svg.labelled_by == svg.ids
        assert len(svg.ids) == 2
    assert "joined: which channels each reader takes, in the original order" in page.svgs[0].texts
    assert "narrow: 2 channels, gathered, 1.00 kB" in page.svgs[1].texts
    assert "wide: 3 channels, one range, free" in page.svgs[1].texts


def test_figures_of_the_page() -> None:
    words = " ".join(" ".join(Page(html.render(samples.by_hand())).texts).split())
    for figure in (
        "647 M of 4.09 G: 6.3x fewer",
        "3.10 kB against 13.1 kB in the original order: 4.2x fewer",
        "2 of 3 segments whose order is proven optimal, in 12.6 ms",
        "optimal",
        "gap 60.0 %",
        "3.00 kB gathered; proven lower bound 3.00 kB.",
        "Original order: 3 of 5 free, 13.0 kB",
        "Order found: 4 of 5 free, 3.00 kB",
        "1 more with a single reader.",
        "aten.argmax.default head model.py:12",
        "capture 1.50 s",
    ):
        assert figure in words


def test_only_the_pictures_with_most_at_stake_are_open() -> None:
    text = html.render(samples.large())
    assert text.count('<details class="segment" open>') == html.OPEN
    widest = text.index('<span class="shape">37 readers, 2048 channels')
    assert text.rindex("<details", 0, widest) == text.rindex('<details class="segment" open>', 0, widest)


def test_a_large_report_is_a_small_file(tmp_path: Path) -> None:
    path = samples.large().to_html(tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    assert path.stat().st_size < 3_000_000


def test_tables_have_headers() -> None:
    page = Page(html.render(samples.by_hand()))
    assert sum(tag == "table" for tag, _ in page.tags) == 3
    scopes = [table.get("scope") for tag, table in page.tags if tag == "th"]
    assert set(scopes) == {"col", "row"}


def test_without_jinja2_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    html._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ChanoptError, match=r"pip install 'chanopt\[report\]'"):
        html.render(samples.empty())
    monkeypatch.undo()
    assert "Empty" in html.render(samples.empty())


def schemes() -> dict[str, dict[str, str]]:
    style = resources.files("chanopt.report").joinpath("page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    return {name: dict(re.findall(r"--([\w-]+): (#\w{6})", text)) for name, text in (("light", light), ("dark", dark))}


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2.2, relative luminance)."""
    lights = sorted(map(luminance, (one, other)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(scheme: str) -> None:
    colour = schemes()[scheme]
    pairs = [(ink, ground) for ink in ("ink", "quiet", "accent") for ground in ("card", "page")]
    pairs += [
        ("free", "card"),
        ("free", "free-soft"),
        ("pay", "card"),
        ("pay", "pay-soft"),
        ("quiet", "plain-soft"),
    ]
    poor = {pair: contrast(colour[pair[0]], colour[pair[1]]) for pair in pairs}
    assert not {pair: ratio for pair, ratio in poor.items() if ratio < 4.5}
    assert min(contrast(colour[name], colour["track"]) for name in ("free", "pay")) > 3
