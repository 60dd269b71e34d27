"""The tables and the plot of `benchmarks.accuracy`, from its records alone."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sklearn.isotonic import IsotonicRegression

from benchmarks.grid import table

if TYPE_CHECKING:
    from benchmarks.accuracy import Record

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = {
    "dense": "#999999",
    "constrained": "#56B4E9",
    "consecutive": "#009E73",
    "unconstrained": "#D55E00",
    "one-shot": "#E69F00",
    "agp": "#CC79A7",
    "smcp": "#0072B2",
}

ARMS = {
    "ratio": ("constrained", "consecutive", "unconstrained"),
    "method": ("one-shot", "agp", "smcp"),
}
"""Arms that are compared at equal latency, by part; the first is what the others are compared with."""
TIMES = (0.8, 0.6, 0.4)
"""Shares of the whole network's time."""

Records = Sequence["Record"]
Value = Callable[["Record"], float]


def mean_and_deviation(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """The mean, and the sample's standard deviation if there are two values.

    >>> mean_and_deviation([0.9, 0.8], 1, 100), mean_and_deviation([0.9], 1, 100)
    ('85.0 ± 7.1', '90.0')
    """
    scaled = [scale * value for value in values]
    told = f"{statistics.fmean(scaled):.{digits}f}"
    return told if len(scaled) < 2 else f"{told} ± {statistics.stdev(scaled):.{digits}f}"


def closed(records: Records, value: Value) -> tuple[float, float, float | None]:
    """How far `consecutive` comes from `constrained` to `unconstrained`, over networks, seeds and ratios.

    Args:
        records: of part `ratio`, each arm as often as the others.
        value: what is compared.

    Returns:
        The mean gains of `consecutive` and of `unconstrained` over `constrained`, and the share that the first is of
        the second; None if `unconstrained` gains nothing.
    """
    means = {
        arm: statistics.fmean(value(record) for record in records if record.arm == arm)
        for arm in ("constrained", "consecutive", "unconstrained")
    }
    ours, free = (means[arm] - means["constrained"] for arm in ("consecutive", "unconstrained"))
    return ours, free, ours / free if free > 0 else None


# -- tables -----------------------------------------------------------------------------------------------------------


def markdown(records: Records, wrong: Sequence[str] = ()) -> str:
    """The page.

    Args:
        records: of `benchmarks.accuracy`, at least one.
        wrong: what is not right with them, in words.
    """
    nets = _distinct(r.net for r in records)
    seeds = len({r.seed for r in records})
    parts = [
        "# Does removing constraints pay?",
        f"Small networks on scikit-learn's digits, {seeds} seed{'s' if seeds > 1 else ''} each: mean ± standard "
        "deviation over seeds. Accuracies, in percent of 599 test images, are of the modules that `chanopt.optimize` "
        "made, for a network right after pruning and after a short training with its masks held. *Importance* is the "
        "share, in percent, of the L2 norms that every layer keeps. *Latency* is the median share of the time that "
        "the whole network takes (it, too, as chanopt makes it), in large batches on one thread. *MMACs* and *bytes "
        "copied* are for one image. `benchmarks/accuracy.py` tells how everything is done.",
        "\n".join(f"- {key}: {value}" for key, value in records[0].machine.items()),
        "## The networks",
        table(("network", "accuracy", "MMACs", "parameters", "µs an image"), _dense_lines(records, nets)),
        "## At equal ratio",
        "In every layer all three scopes keep as many channels as the constrained one; they differ in which.",
        table((*_HEADS[:2], "scope", *_HEADS[2:]), _lines(records, "ratio", lambda r: f"{r.amount:.0%}")),
        "How far `consecutive` closes the gap between `constrained` and `unconstrained`: the mean gains of both over "
        "`constrained`, in points, and the share. Of all ratios in the table; after training, of those trained.",
        table(_GAP_HEADS, _gap_lines(records, nets)),
        _in_one_figure(records),
        "## At equal latency",
        "The accuracy after training that an arm would have at a share of the whole network's time: between the "
        "networks of its curve that are a little slower and a little faster, accuracy never falling with time "
        "(isotonic regression, then linear). *over* is the difference in points to the first arm, seed by seed; "
        "*seeds*: in which the curves reach that time. The three ways to train took "
        f"{_epochs(records)} epochs, the scopes fewer.",
        table(("network", "time", "arm", "accuracy", "over the first", "seeds"), _equal_lines(records, nets)),
        _equal_in_one_figure(records),
        "## Ways to train",
        "The ratio of SMCP is of the latency that its table tells.",
        table((*_HEADS[:2], "way", *_HEADS[2:]), _lines(records, "method", lambda r: f"{r.amount:.0%}")),
        "## What is not right",
        "\n".join(f"- {told}" for told in wrong) or "Nothing: all slim modules tell what their masked networks tell.",
    ]
    return "\n\n".join(parts) + "\n"


_HEADS = ("network", "ratio", "importance", "accuracy", "trained", "latency", "MMACs", "gathers", "bytes copied")
_GAP_HEADS = (
    *("network", "importance: consecutive", "unconstrained", "closed"),
    *("accuracy: consecutive", "unconstrained", "closed"),
    *("trained: consecutive", "unconstrained", "closed"),
)


def _dense_lines(records: Records, nets: Iterable[str]) -> Iterable[list[str]]:
    for net in nets:
        mine = [r for r in records if r.net == net and r.part == "dense"]
        if mine:
            accuracies, milliseconds = [r.accuracy for r in mine], [r.latency_ms[1] for r in mine if r.latency_ms]
            told = mean_and_deviation(accuracies, 1, 100), f"{mine[0].macs / 1e6:.2f}", f"{mine[0].parameters:,}"
            yield [net, *told, mean_and_deviation(milliseconds, 1, 1000)]


def _lines(records: Records, part: str, setting: Callable[[Record], str]) -> Iterable[list[str]]:
    """A line for every network, setting and arm of a part."""
    mine = [r for r in records if r.part == part]
    for key in _distinct((r.net, setting(r), r.arm) for r in _sorted(mine)):
        alike = [r for r in mine if (r.net, setting(r), r.arm) == key]
        longest = max(r.epochs for r in alike)
        after = [r for r in alike if r.epochs and r.epochs == longest]
        before = [r for r in alike if not r.epochs]
        told = before or after
        yield [*key, *_figures(told, before, after)]


def _figures(told: Records, before: Records, after: Records) -> list[str]:
    return [
        mean_and_deviation([r.importance for r in told], 1, 100),
        mean_and_deviation([r.accuracy for r in before], 1, 100) if before else "-",
        mean_and_deviation([r.accuracy for r in after], 1, 100) if after else "-",
        mean_and_deviation([r.latency[1] for r in told if r.latency], 2),
        mean_and_deviation([r.macs for r in told], 2, 1e-6),
        mean_and_deviation([r.gathers for r in told], 1),
        mean_and_deviation([r.copied_bytes for r in told], 0),
    ]


def _gap_lines(records: Records, nets: Sequence[str]) -> Iterable[list[str]]:
    ratio = [r for r in records if r.part == "ratio"]
    for name, mine in [*((net, [r for r in ratio if r.net == net]) for net in nets), ("all", ratio)]:
        before, after = [r for r in mine if not r.epochs], [r for r in mine if r.epochs]
        cells = [_gap(before, lambda r: r.importance), _gap(before, lambda r: r.accuracy)]
        yield [name, *cells[0], *cells[1], *_gap(after, lambda r: r.accuracy)]


def _in_one_figure(records: Records) -> str:
    ratio = [r for r in records if r.part == "ratio"]
    before, after = [r for r in ratio if not r.epochs], [r for r in ratio if r.epochs]
    importance, accuracy = _gap(before, lambda r: r.importance), _gap(after, lambda r: r.accuracy)
    return f"In one figure, of the gap in importance: {importance[2]}; in accuracy after training: {accuracy[2]}."


def _gap(records: Records, value: Value) -> list[str]:
    if {r.arm for r in records} < {"constrained", "consecutive", "unconstrained"}:
        return ["-", "-", "-"]
    ours, free, share = closed(records, value)
    return [f"{100 * ours:+.2f}", f"{100 * free:+.2f}", "no gap" if share is None else f"{share:.0%}"]


def at_latency(records: Records, time: float) -> float | None:
    """The accuracy of an arm at a latency, between its networks that are a little slower and a little faster.

    Args:
        records: of one network, seed and arm, at least one, with latencies.
        time: share of the whole network's.

    Returns:
        The accuracy; None if all are faster, or all slower.
    """
    points = [(r.latency[1], r.accuracy) for r in records if r.latency]
    curve = IsotonicRegression(out_of_bounds="nan").fit(*zip(*points, strict=True))
    (found,) = curve.predict([time]).tolist()
    return None if math.isnan(found) else found


Equal = dict[tuple[str, float, str], dict[int, float]]


def at_equal_latency(records: Records) -> Equal:
    """Accuracies after training, by network, latency and arm, and by seed; only where all arms of a part have one."""
    found: Equal = {}
    trained = [r for r in records if r.epochs]
    for part, net, seed, time in itertools.product(
        ARMS, _distinct(r.net for r in trained), _distinct(r.seed for r in trained), TIMES
    ):
        mine = [r for r in trained if (r.part, r.net, r.seed) == (part, net, seed)]
        arms = {arm: [r for r in mine if r.arm == arm] for arm in ARMS[part]}
        accuracies = {arm: at_latency(alike, time) if alike else None for arm, alike in arms.items()}
        if None not in accuracies.values():
            for arm, accuracy in accuracies.items():
                found.setdefault((net, time, arm), {})[seed] = cast(float, accuracy)
    return found


def _equal_lines(records: Records, nets: Sequence[str]) -> Iterable[list[str]]:
    found = at_equal_latency(records)
    for net, arms, time in itertools.product(nets, ARMS.values(), TIMES):
        first = found.get((net, time, arms[0]), {})
        for arm in arms if first else ():
            by_seed = found[net, time, arm]
            over = "" if arm == arms[0] else mean_and_deviation([by_seed[s] - first[s] for s in by_seed], 1, 100)
            told = mean_and_deviation(list(by_seed.values()), 1, 100)
            yield [net, f"{time:.0%}", arm, told, over, str(len(by_seed))]


def _equal_in_one_figure(records: Records) -> str:
    found, lines = at_equal_latency(records), list[str]()
    for first, *others in ARMS.values():
        for arm in others:
            gains = [
                found[net, time, arm][seed] - accuracy
                for (net, time, known), by_seed in found.items()
                for seed, accuracy in by_seed.items()
                if known == first
            ]
            told = f"{mean_and_deviation(gains, 2, 100)} points over `{first}`" if gains else "nowhere as fast"
            lines.append(f"- `{arm}`: {told}")
    return "Over all networks, times and seeds in which all arms of a kind reach the time:\n" + "\n".join(lines)


def _epochs(records: Records) -> str:
    return " or ".join(map(str, sorted({r.epochs for r in records if r.part == "method"})))


def _sorted(records: Records) -> list[Record]:
    nets, arms = _distinct(r.net for r in records), list(COLOURS)

    def place(record: Record) -> tuple[int, float, int]:
        return nets.index(record.net), record.amount, arms.index(record.arm)

    return sorted(records, key=place)


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


# -- plot -------------------------------------------------------------------------------------------------------------


def plot(records: Records, path: Path) -> None:
    """Accuracy against ratio, and against latency, a column a network; mean, and standard deviation over seeds."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    nets = _distinct(r.net for r in records)
    with mpl.rc_context(
        {"svg.hashsalt": "accuracy", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(1.2 + 3.4 * len(nets), 6.4), layout="constrained")
        grid: Any = figure.subplots(2, len(nets), squeeze=False, sharey="row")
        for column, net in enumerate(nets):
            mine = [r for r in records if r.net == net]
            _against_ratio(grid[0][column], mine)
            _against_latency(grid[1][column], mine)
            grid[0][column].set_title(net)
        for row in grid:
            row[0].set_ylabel("accuracy, %")
        handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _against_ratio(axes: Any, records: Records) -> None:
    axes.set_xlabel("share of channels dropped, %")
    for arm in ("constrained", "consecutive", "unconstrained"):
        mine = [r for r in records if r.part == "ratio" and r.arm == arm]
        _line(axes, [r for r in mine if not r.epochs], arm, "right after", "--")
        _line(axes, [r for r in mine if r.epochs], arm, "trained", "-")


def _line(axes: Any, records: Records, arm: str, when: str, style: str) -> None:
    amounts = sorted({r.amount for r in records})
    points = [_spread([r.accuracy for r in records if r.amount == amount]) for amount in amounts]
    if points:
        x, (y, deviation) = [100 * amount for amount in amounts], zip(*points, strict=True)
        axes.errorbar(
            x, y, deviation, color=COLOURS[arm], ls=style, marker="o", ms=3, capsize=2, label=f"{arm}, {when}"
        )


def _against_latency(axes: Any, records: Records) -> None:
    axes.set_xlabel("latency, % of the whole network's")
    trained = [r for r in records if r.epochs and r.latency]
    for arm in ("constrained", "consecutive", "unconstrained"):
        points = _points([r for r in trained if r.arm == arm])
        x, y = [point[0] for point in points], [point[1] for point in points]
        axes.plot(x, y, color=COLOURS[arm], marker="o", ms=3, label=f"{arm}, trained")
    for arm in ("one-shot", "agp", "smcp"):
        for x, y, dx, dy in _points([r for r in trained if r.arm == arm]):
            axes.errorbar([x], [y], [dy], [dx], color=COLOURS[arm], marker="s", ms=5, capsize=2, ls="", label=arm)
    dense = [r.accuracy for r in records if r.part == "dense"]
    if dense:
        axes.plot(
            [100], [100 * statistics.fmean(dense)], color=COLOURS["dense"], marker="*", ms=9, ls="", label="whole"
        )


def _points(records: Records) -> list[tuple[float, float, float, float]]:
    """Latency and accuracy of every setting in percent, and their deviations over seeds; by latency."""
    found: list[tuple[float, float, float, float]] = []
    for amount in _distinct(r.amount for r in records):
        alike = [r for r in records if r.amount == amount]
        x, dx = _spread([r.latency[1] for r in alike if r.latency])
        y, dy = _spread([r.accuracy for r in alike])
        found.append((x, y, dx, dy))
    return sorted(found)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    scaled = [100 * value for value in values]
    return statistics.fmean(scaled), statistics.stdev(scaled) if len(scaled) > 1 else 0.0
