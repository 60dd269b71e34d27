"""One HTML page with plots of the committed JSON: bytes, latency, Pareto fronts, solver, compile time.

    python -m benchmarks page --out results.html
    python -m benchmarks page --accuracy accuracy.csv     # adds Pareto fronts

The CSV has the columns model, amount, arm and accuracy, and may have side, criterion, scope and seed; without them its
masks are those that `run` makes by default: inputs, by their L2 norm, in every layer alike. An accuracy goes to the
timed records of that network, mask and arm, and to no others. What `python -m benchmarks accuracy` writes is taken as
well: it has latencies of its own.

Self-contained: inline SVG, no script, nothing from the network. Needs the extra `report` (matplotlib, jinja2).
"""

from __future__ import annotations

import argparse
import io
import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import accuracy_given, docs, jobs, run, scale, solver, survey
from benchmarks.cases import Record

OUT = jobs.RESULTS / "page.html"
TEMPLATE = Path(__file__).resolve().parent / "page.html.jinja"

# Okabe and Ito's palette, told apart by colour-blind readers too; an arm has one colour on every plot.
COLOURS = {
    "dense": "#999999",
    "naive": "#D55E00",
    "greedy": "#E69F00",
    "upscale": "#CC79A7",
    "upscale_runs": "#8C4A6E",
    "unmasked": "#7A7A2E",
    "constrained": "#56B4E9",
    "torch_pruning": "#0072B2",
    "chanopt": "#009E73",
}
_FAMILY_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

Row = Mapping[str, Any]
Draw = Callable[[Any], None]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Plot:
    """An inline SVG and what it shows, in words."""

    svg: Any
    caption: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table to unfold."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True, slots=True)
class Part:
    """A section; `missing` is the command that would measure it."""

    heading: str
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    missing: str = ""


def drawn(caption: str, draw: Draw, size: tuple[float, float] = (9.0, 4.0)) -> Plot:
    """What a function draws on axes, as SVG. Equal data gives equal text."""
    import matplotlib as mpl
    from markupsafe import Markup
    from matplotlib.figure import Figure

    with mpl.rc_context(
        {"svg.hashsalt": caption, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    # Several drawings share one page, where ids must differ.
    prefix = f"p{zlib.crc32(caption.encode()):08x}"
    svg = re.sub(r'(id="|href="#|url\(#)', lambda match: match[0] + prefix + "-", svg[svg.index("<svg") :])
    return Plot(Markup(svg), caption)


def copies_part(rows: Sequence[Row]) -> Part:
    """Bytes against amount, and by network, over all networks that have the counts of every arm that is drawn."""
    arms = ("naive", "greedy", "chanopt")
    counted = [row for row in rows if row["side"] == "input" and all(row.get(arm) for arm in arms)]
    amounts = sorted({row["amount"] for row in counted})
    by_model: dict[str, dict[float, Row]] = {}
    for row in counted:
        by_model.setdefault(row["model"], {})[row["amount"]] = row
    # Sums are of the same networks at every amount.
    summed = [found for found in by_model.values() if len(found) == len(amounts)]

    def against_amount(axes: Any) -> None:
        for arm in arms:
            sums = [sum(found[amount][arm]["bytes"] for found in summed) / 1e6 for amount in amounts]
            axes.plot([100 * a for a in amounts], sums, marker="o", label=arm, color=COLOURS[arm])
        axes.set(xlabel="input channels masked, %", ylabel=f"MB copied, {len(summed)} networks", ylim=(0, None))
        axes.legend(frameon=False)

    half = [row for row in counted if row["amount"] == 0.5 and row["naive"]["bytes"]]
    # Of nothing there is no share.
    without = [row["model"] for row in counted if row["amount"] == 0.5 and not row["naive"]["bytes"]]

    def by_network(axes: Any) -> None:
        for shift, arm in ((0.2, "greedy"), (-0.2, "chanopt")):
            shares = [100 * row[arm]["bytes"] / row["naive"]["bytes"] for row in half]
            axes.barh([n + shift for n in range(len(half))], shares, height=0.38, label=arm, color=COLOURS[arm])
        axes.set_yticks(range(len(half)), [row["model"] for row in half])
        axes.invert_yaxis()
        axes.set(xlabel="bytes copied, % of the naive export")
        axes.legend(frameon=False)

    plots = [drawn("Bytes copied to select channels, by the share that is masked", against_amount)] if summed else []
    if half:
        told = f" (not shown, as the naive export copies nothing: {', '.join(without)})" if without else ""
        caption = f"Bytes copied by network, half masked{told}"
        plots.append(drawn(caption, by_network, (9.0, 1.0 + 0.22 * len(half))))
    lines = [docs.network_line(row) for row in rows if row["side"] == "input" and row["amount"] == 0.5]
    return Part("Copies, against UPSCALE", plots, [Table("Every network, half masked", docs.NETWORK_HEADS, lines)])


def speed_part(rows: Sequence[Row]) -> Part:
    """Latencies by arm; against amount where there are several; Pareto fronts where accuracy is given."""
    records = [Record.of(row) for row in rows]
    timed = [record for record in records if record.latency_ms]
    plots: list[Plot] = []
    for conditions, part in docs.by_conditions(timed).items():
        models = list(dict.fromkeys(docs.name_of(record) for record in part))
        caption = f"Latency as a share of the masked network's: {conditions}"
        if any("dense" in record.ratios for record in part):
            plots.append(drawn(caption, _bars(part, models), (9.0, 1.2 + 0.5 * len(models))))
    # What differs in nothing but how much is masked lies on one curve.
    curves: dict[str, list[Record]] = {}
    for record in timed:
        alike = replace(record, case=replace(record.case, mask=replace(record.case.mask, amount=0.0)))
        told = docs.conditions_of(alike).replace(" 0%", "")
        curves.setdefault(f"{docs.name_of(record)}, {told}", []).append(record)
    for what, mine in curves.items():
        if len({record.case.mask.amount for record in mine}) > 1:
            plots.append(drawn(f"Latency by the share that is masked: {what}", _lines(mine)))
        if any(record.accuracy is not None for record in mine):
            plots.append(drawn(f"Accuracy and latency: {what}", _pareto(_points(mine))))
    made = docs.by_conditions(record for record in records if record.status == "ok")
    tables = [
        Table(f"What the arms do: {way}", docs.DOING_HEADS, list(map(docs.doing, mine))) for way, mine in made.items()
    ]
    return Part("Speed", plots, tables)


def _bars(records: Sequence[Record], models: Sequence[str]) -> Draw:
    arms = [arm for arm in COLOURS if any(r.arm == arm and "dense" in r.ratios for r in records)]

    def draw(axes: Any) -> None:
        height = 0.8 / max(1, len(arms))
        for number, arm in enumerate(arms):
            found = [
                (models.index(docs.name_of(r)), r.ratios["dense"])
                for r in records
                if r.arm == arm and "dense" in r.ratios
            ]
            places = [place - 0.4 + (number + 0.5) * height for place, _ in found]
            medians = [median for _, (_, median, _) in found]
            errors = [[m - low for _, (low, m, _) in found], [high - m for _, (_, m, high) in found]]
            axes.barh(places, medians, height, xerr=errors, label=arm, color=COLOURS[arm], error_kw={"lw": 0.8})
        axes.axvline(1, color="#999999", lw=1)
        axes.set_yticks(range(len(models)), models)
        axes.invert_yaxis()
        axes.set(xlabel="time / time of the masked network, same round: median and quartiles")
        axes.legend(frameon=False, fontsize=8, loc="lower right")

    return draw


def _lines(records: Sequence[Record]) -> Draw:
    def draw(axes: Any) -> None:
        for arm, colour in COLOURS.items():
            points = sorted((100 * r.case.mask.amount, r.latency_ms) for r in records if r.arm == arm and r.latency_ms)
            if points:
                axes.plot([x for x, _ in points], [y[1] for _, y in points], marker="o", label=arm, color=colour)
        axes.set(xlabel="channels masked, %", ylabel="ms, median", ylim=(0, None))
        axes.legend(frameon=False, fontsize=8)

    return draw


def _points(records: Sequence[Record]) -> dict[str, list[Point]]:
    """Milliseconds and accuracy by arm, in the order of the colours; an arm without any is left out."""
    found: dict[str, list[Point]] = {}
    for record in sorted(records, key=lambda record: list(COLOURS).index(record.arm)):
        if record.latency_ms is not None and record.accuracy is not None:
            found.setdefault(record.arm, []).append((record.latency_ms[1], record.accuracy))
    return found


def _pareto(points: Mapping[str, Sequence[Point]]) -> Draw:
    def draw(axes: Any) -> None:
        colours = _colours(points)
        for arm, mine in points.items():
            axes.scatter([x for x, _ in mine], [y for _, y in mine], color=colours[arm], label=arm, s=18)
            front = pareto(mine)
            axes.plot([x for x, _ in front], [y for _, y in front], color=colours[arm], lw=1, drawstyle="steps-post")
        axes.set(xlabel="ms, median", ylabel="accuracy")
        axes.legend(frameon=False, fontsize=8)

    return draw


def _colours(arms: Iterable[str]) -> dict[str, str]:
    """A colour an arm: its own if it has one, another that none of these has if not."""
    names = list(arms)
    own = {arm: COLOURS[arm] for arm in names if arm in COLOURS}
    spare = itertools.cycle([colour for colour in _FAMILY_COLOURS if colour not in own.values()] or ["#000000"])
    return {arm: own[arm] if arm in own else next(spare) for arm in names}


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, value) of which no other is as cheap and as good, by cost.

    >>> pareto([(3, 5), (1, 2), (2, 2), (4, 4)])
    [(1, 2), (3, 5)]
    """
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def solver_part(rows: Sequence[Row]) -> Part:
    """Time, gap and what the others pay, against size."""
    random = [row for row in rows if row["family"] != "corpus"]
    families = list(dict.fromkeys(row["family"] for row in random))

    def against_size(value: Callable[[Row], float | None], label: str, *, log: bool) -> Draw:
        def draw(axes: Any) -> None:
            for family, colour in zip(families, _FAMILY_COLOURS, strict=False):
                points = [(row["channels"], value(row)) for row in random if row["family"] == family]
                points = [(x, y) for x, y in points if y is not None]
                axes.scatter(
                    [x for x, _ in points], [y for _, y in points], color=colour, label=family, s=16, alpha=0.8
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log" if log else "linear")
            axes.set(xlabel="channels (readers grow with them, to 128)", ylabel=label)
            axes.legend(frameon=False, fontsize=8)

        return draw

    def over_ours(row: Row) -> float | None:
        return row["greedy"] / row["objective"] if row["objective"] and row["greedy"] is not None else None

    plots = [
        drawn("Seconds to solve, by size", against_size(lambda row: max(row["seconds"], 1e-4), "seconds", log=True)),
        drawn(
            "What is not proven, by size",
            against_size(lambda row: 100 * row["gap"], "gap, % of the objective", log=False),
        ),
        drawn("What the greedy order pays, by size", against_size(over_ours, "greedy / ours", log=False)),
    ]
    return Part("Orders of channels", plots)


def scale_part(rows: Sequence[Row]) -> Part:
    """Seconds and memory against operands."""
    plots: list[Plot] = []
    for family in dict.fromkeys(row["family"] for row in rows):
        points = [row for row in rows if row["family"] == family]
        key, label = ("size", "channels") if family == "wide" else ("operands", "operands of ops")

        def draw(axes: Any, points: list[Row] = points, key: str = key, label: str = label) -> None:
            for stage, colour in zip(("capture", "solver", "rest"), _FAMILY_COLOURS, strict=False):
                seconds = [max(point[stage], 1e-4) for point in points]
                axes.loglog([p[key] for p in points], seconds, marker="o", label=stage, color=colour)
            axes.set(xlabel=label, ylabel="seconds")
            axes.legend(frameon=False)

        def draw_memory(axes: Any, points: list[Row] = points, key: str = key, label: str = label) -> None:
            axes.loglog([p[key] for p in points], [max(p["memory"], 1) / 1e6 for p in points], marker="o")
            axes.set(xlabel=label, ylabel="MB")

        plots.append(drawn(f"Compile time of the {family} nets", draw))
        plots.append(drawn(f"Memory that compiling the {family} nets takes", draw_memory))
    heads = ("family", "stage", "slope")
    lines = [
        (family, stage, f"{value:.2f}")
        for family, stages in scale.slopes(rows).items()
        for stage, value in stages.items()
        if value is not None
    ]
    return Part(
        "Compile time and memory", plots, [Table("Slopes of log time against log size; 1 is linear", heads, lines)]
    )


def accuracy_part(path: Path | None) -> Part | None:
    """Pareto fronts of a CSV file that has latencies of its own, a plot a network; None of another file."""
    lines, own = accuracy_given.read(path) if path else ([], False)
    if not own:
        return None
    by_model: dict[str, dict[str, list[Point]]] = {}
    for line in lines:
        if line.latency_ms is not None:
            by_model.setdefault(line.model, {}).setdefault(line.arm, []).append((line.latency_ms, line.accuracy))
    plots = [drawn(f"Accuracy and latency, as given: {model}", _pareto(arms)) for model, arms in by_model.items()]
    return Part("Accuracy and latency, from the file given", plots)


def html(folder: Path, accuracy: Path | None = None) -> str:
    """The whole page, of what a folder of results has."""
    import jinja2

    speed = docs.load(folder, run.OUT.name)
    found: list[tuple[str, Any, Callable[[Any], Part], str]] = [
        ("Copies, against UPSCALE", docs.load(folder, survey.OUT.name), copies_part, "survey"),
        ("Speed", accuracy_given.added(speed or [], accuracy), speed_part, "speed"),
        ("Orders of channels", docs.load(folder, solver.OUT.name), solver_part, "solver"),
        ("Compile time and memory", docs.load(folder, scale.OUT.name), scale_part, "scale"),
    ]
    parts = [
        make(rows) if rows else Part(heading, missing=f"python -m benchmarks --parts {command}")
        for heading, rows, make, command in found
    ]
    parts += [part for part in [accuracy_part(accuracy)] if part]
    about = "On the same masks: what a user could run instead of chanopt, and how far each gets."
    measured = {heading: rows for heading, rows, _, _ in found if rows}
    about = " ".join([about, *(line.removeprefix("- ") for line in docs.measured_on(measured))])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text()).render(title="chanopt: benchmarks", about=about, parts=parts)


def add_arguments(made: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    made.add_argument("--results", type=Path, default=jobs.RESULTS, help="where the JSON is")
    made.add_argument(
        "--accuracy",
        type=accuracy_given.file,
        metavar="CSV",
        help=f"columns {', '.join(accuracy_given.NEEDED)}; also side, criterion, scope, seed if masks are not the "
        "default ones; or what python -m benchmarks accuracy writes",
    )


def main(args: argparse.Namespace) -> int:
    """Write the page; returns 0."""
    if not args.results.is_dir():
        raise SystemExit(f"expected a folder with results, found none at {args.results}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(html(args.results, args.accuracy))
    print(args.out)
    return 0
