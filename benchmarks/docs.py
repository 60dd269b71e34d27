"""Write docs/results.md from the committed JSON, and nothing else: the page says what was measured, bad rows too.

    python -m benchmarks docs
    python -m benchmarks docs --results FOLDER --out FILE

Parts that were not measured say by which command they are.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gate, jobs, run, scale, solver, survey, zoo
from benchmarks.cases import Record
from benchmarks.grid import table
from benchmarks.machine import told

OUT = jobs.ROOT / "docs" / "results.md"

Row = Mapping[str, Any]
Rows = Sequence[Row]

HEADING = """# Results

Written by `python -m benchmarks docs` from the JSON in [benchmarks/results](../benchmarks/results); do not edit.
`python -m benchmarks` measures everything on this page again, but for the last two parts, and writes it;
`python -m benchmarks page` makes one HTML page with plots of the same figures. The masks are written into seeded random
weights (no pretrained weights): every ungrouped convolution loses the share of its input channels (but those of an
image) or of its output channels (with their biases) that has the least Euclidean norm, whatever its neighbours lose."""

ARMS = """Arms that compute the masked network: *dense*, as it is; *naive*, cut, with a copy in front of every masked
layer; *greedy*, UPSCALE's order as we implement it; *upscale*, the exporter itself, which copies by index, and
*upscale_runs*, which copies by concatenation, its default; *chanopt*. Others, to compare with: *unmasked*,
`chanopt.optimize` of the network without masks; *constrained*, the largest share of channels, the same in all layers
that have to agree, that costs no more multiplications than chanopt's result, made by chanopt; *torch_pruning*,
Torch-Pruning's group pruner at the largest ratio that costs no more (it may cost some percent less: *MMACs dense*)."""


def load(folder: Path, name: str) -> Any:
    """What a command left in a folder; None if it was not run."""
    found = jobs.load(folder / name)
    if isinstance(found, list) and not all(isinstance(row, dict) for row in found):
        raise jobs.UnreadableError(
            f"expected rows in {folder / name} as `python -m benchmarks` writes them, found others"
        )
    return found


def markdown(folder: Path) -> str:
    """The whole page."""
    parts: list[tuple[str, str, Callable[[Any], list[str]], str]] = [
        ("Copies, against UPSCALE", survey.OUT.name, copies_part, "--parts survey"),
        ("Speed on a CPU", run.OUT.name, speed_part, "--parts speed"),
        ("Orders of channels", solver.OUT.name, solver_part, "--parts solver"),
        ("Compile time and memory", scale.OUT.name, scale_part, "--parts scale"),
        ("Counts that are gated", gate.GOLDENS.name, gate_part, "gate --all --update"),
    ]
    found = {heading: load(folder, name) for heading, name, _, _ in parts}
    page = [HEADING, *measured_on({heading: rows for heading, rows in found.items() if isinstance(rows, list)})]
    for heading, _, write, command in parts:
        page.append(f"## {heading}")
        page += write(found[heading]) if found[heading] else [f"Not measured yet: `python -m benchmarks {command}`."]
    page.append("## Correctness")
    page += sweep_part(folder / "sweep.csv")
    return "\n\n".join(page).replace("\n\n- ", "\n- ") + "\n"


# -- copies -----------------------------------------------------------------------------------------------------------


def copies_part(rows: Rows) -> list[str]:
    """The survey: totals, every network at half of its input channels, and the rows that are not right."""
    own = all(row["resolution"] == zoo.entry(row["model"]).resolution for row in rows)
    told = "at each network's own resolution" if own else "at the least resolution of each network"
    wrong = [(row, found) for row in rows if (found := survey.differences(row))]
    half = [row for row in rows if row["side"] == "input" and row["amount"] == 0.5]
    return [
        f"One image in float32, {told}. *naive* gathers in front of every masked layer; *greedy* is UPSCALE's order as "
        "we implement it, *UPSCALE* the exporter itself (a dash: it raises). Both plans cut what no layer reads; they "
        "see no masked outputs, so they are not compared there, and copy where the model shuffles channels. The sums "
        "of *naive*, *greedy* and *chanopt* are over the networks that UPSCALE runs, *chanopt, all* over all that "
        "chanopt runs, in megabytes; *fewer*, *as many* and *more* compare chanopt's bytes with the greedy order's, on "
        "every network that has both, whether UPSCALE runs or not. *optimise* does without torch.export, which comes "
        "before it; *UPSCALE* traces by itself, and that is in its time. Both were timed while "
        "another network was surveyed.",
        table(_COPY_HEADS, [_copy_totals(rows, *setting) for setting in _settings(rows)]),
        "*proven* is of the copies that depend on the order: segments whose order is proven to cost the least. The "
        "bytes copied differ from that cost, the objective, where a reader gathers in every order (parts of several "
        "blocks), or finds a range that the order did not promise it.",
        _more_copies(rows),
        *_output_copies(rows),
        "Every network with half of the input channels of each layer masked:",
        table(NETWORK_HEADS, map(network_line, half)),
        "Rows that differ from the survey of UPSCALE's exporter, or in which chanopt copies more than another that "
        "cuts anything:",
        *([f"- {_setting(row)}: {'; '.join(found)}" for row, found in wrong] or ["None."]),
    ]


_COPY_HEADS = (
    *("masks", "networks", "chanopt runs", "UPSCALE runs", "naive", "greedy", "chanopt", "of greedy", "chanopt, all"),
    *("fewer", "as many", "more", "proven"),
)
NETWORK_HEADS = (
    *("network", "copies naive", "greedy", "UPSCALE", "chanopt"),
    *("MB naive", "greedy", "chanopt", "optimise, s", "UPSCALE, s"),
)
"""The columns of `network_line`."""
DOING_HEADS = (
    *("network", "arm", "copies", "MB copied", "re-laid out", "inside convs", "MMACs dense", "exact", "Flux"),
    *("parameters, M", "peak MB", "make, s", "error"),
)
"""The columns of `doing`."""


def _settings(rows: Rows) -> list[tuple[str, float]]:
    return sorted({(row["side"], row["amount"]) for row in rows})


def _setting(row: Row) -> str:
    return f"{row['model']}, {row['side']} {row['amount']:.0%}"


def upscale_runs(row: Row) -> bool:
    """Whether UPSCALE runs, as seen here, or else as its survey says."""
    if "upscale" in row:
        return row["upscale"] is not None
    known = survey.published().get((row["model"], row["side"], row["amount"]))
    return known is not None and known.greedy is not None


def _compared(rows: Rows) -> list[Row]:
    """The rows in which chanopt and the greedy order can be compared: the plans do not see masked outputs."""
    return [row for row in rows if row["side"] == "input" and row.get("chanopt") and row.get("greedy")]


def _copy_totals(rows: Rows, side: str, amount: float) -> list[str]:
    part = [row for row in rows if (row["side"], row["amount"]) == (side, amount)]
    runs = [row for row in part if row.get("chanopt")]
    compared = _compared(part)
    both = [row for row in compared if upscale_runs(row)]
    sums = {arm: sum(row[arm]["bytes"] for row in both) if both else None for arm in ("naive", "greedy", "chanopt")}
    signs = [_sign(row["chanopt"]["bytes"] - row["greedy"]["bytes"]) for row in compared]
    proven = [sum(row.get(name, 0) for row in part) for name in ("segments_optimal", "segments")]
    return [
        f"{side} {amount:.0%}",
        str(len(part)),
        str(len(runs)),
        str(sum(map(upscale_runs, part))),
        *(_mega(sums[arm]) for arm in ("naive", "greedy", "chanopt")),
        f"{sums['chanopt'] / sums['greedy']:.2f}" if sums["chanopt"] is not None and sums["greedy"] else "-",
        _mega(sum(row["chanopt"]["bytes"] for row in runs) if runs else None),
        *(str(signs.count(sign)) if signs else "-" for sign in (-1, 0, 1)),
        f"{proven[0]:,} / {proven[1]:,}",
    ]


def _more_copies(rows: Rows) -> str:
    """In how many rows chanopt makes more copies of fewer bytes, and on which networks."""
    compared = _compared(rows)
    found = [
        row
        for row in compared
        if row["chanopt"]["copies"] > row["greedy"]["copies"] and row["chanopt"]["bytes"] < row["greedy"]["bytes"]
    ]
    told = f"In {len(found)} of {len(compared)} rows with input masks chanopt makes more copies than the greedy order"
    names = f" ({', '.join(_models(found))})" if found else ""
    return (
        f"{told}, of fewer bytes{names}: where it gathers the pieces of a concat one by one, each is a copy of its own."
    )


def _models(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(str(row["model"]) for row in rows))


def _output_copies(rows: Rows) -> list[str]:
    """What chanopt copies with half of the output channels masked, network by network, on one line."""
    half = [row for row in rows if (row["side"], row["amount"]) == ("output", 0.5) and row.get("chanopt")]
    told = [
        f"{row['model']} {row['chanopt']['copies']:,} ({_mega(row['chanopt']['bytes'])} MB)"
        for row in half
        if row["chanopt"]["copies"]
    ]
    line = f"Copies of chanopt with half of the output channels masked: {', '.join(told) or 'none'}"
    return [f"{line}; none on the other {len(half) - len(told)} of {len(half)} networks."] if half else []


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


def network_line(row: Row) -> list[str]:
    """A row of the survey as cells."""

    def of(arm: str, what: str) -> Any:
        return row[arm][what] if row.get(arm) else None

    return [
        str(row["model"]),
        *(_count(of(arm, "copies")) for arm in ("naive", "greedy", "upscale", "chanopt")),
        *(_mega(of(arm, "bytes")) for arm in ("naive", "greedy", "chanopt")),
        _number(row.get("optimize_seconds")),
        _number(row.get("upscale_seconds")),
    ]


# -- speed ------------------------------------------------------------------------------------------------------------


def speed_part(rows: Rows) -> list[str]:
    """Latencies, ratios, and whether the copies seen are those planned."""
    records = [Record.of(row) for row in rows]
    parts: list[str] = [ARMS]
    for conditions, part in by_conditions(records).items():
        parts += [f"### {conditions}", *_cautions(part), _latencies(part), *_verdicts(part)]
        parts += ["What the arms do:", _doings(part)]
    return [*parts, *_objectives(records), "### Copies, planned and seen", *_agreement(records)]


def _cautions(records: Sequence[Record]) -> list[str]:
    """What to know before the figures of some conditions are compared."""
    case = records[0].case
    found: list[str] = []
    if case.mask.side != "input" and {"naive", "greedy"} & {record.arm for record in records}:
        found.append(
            "*naive* and *greedy* ignore masked outputs, and cut only what no layer reads: they do more work here "
            "than an exporter that sees those masks would."
        )
    if case.mode != "eager":
        eager = any(map(_is_of_eager_module, records))
        found.append(
            "A compiler fuses what the arms plan, so copies and multiplications are not counted here; "
            + (
                "peak memory and error were not measured."
                if eager
                else "peak memory, with the buffers inside operators, and error are of compiled modules."
            )
        )
    return found


def _is_of_eager_module(record: Record) -> bool:
    """Whether the figures of a compiled run are of the module before it was compiled, as older records have it."""
    return record.case.mode != "eager" and record.observed is not None


def _objectives(records: Sequence[Record]) -> list[str]:
    """What the orders of chanopt cost, and the least that they could; nothing where no record tells."""
    found: dict[str, list[str]] = {}
    for record in records:
        told, planned, case = record.figures, record.planned or {}, record.case
        if record.arm != "chanopt" or "objective" not in told:
            continue
        which = f"{name_of(record)}, {case.mask}" + (f", batch {case.batch}" if case.batch > 1 else "")
        found.setdefault(
            which,
            [
                which,
                *(_mega(told.get(name)) for name in ("objective", "bound")),
                _mega(planned.get("bytes")),
                _count(planned.get("channels")),
                f"{told.get('segments_optimal', 0):,} / {told.get('segments', 0):,}",
            ],
        )
    heads = ("network and masks", "objective, MB", "bound, MB", "copied, MB", "gathered channels", "proven")
    told = (
        "What the orders of channels cost (the objective), the least that it is proven to be (the bound), and the plan:"
    )
    return ["### Orders of these networks", told, table(heads, found.values())] if found else []


def by_conditions(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by how they were run."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(conditions_of(record), []).append(record)
    return found


_UNKNOWN = "a machine that the rows do not name"


def measured_on(parts: Mapping[str, Rows]) -> list[str]:
    """On what machines the rows of each part were taken; one line if that was the same everywhere."""
    found: dict[str, list[str]] = {}
    for heading, rows in parts.items():
        for on in dict.fromkeys(told(row["machine"]) if "machine" in row else _UNKNOWN for row in rows):
            found.setdefault(on, []).append(heading)
    if len(found) == 1:
        return [f"Measured on {on}." for on in found]
    return [f"- {', '.join(headings)}: measured on {on}." for on, headings in found.items()]


def conditions_of(record: Record) -> str:
    """How a record was run, but for the network, in words."""
    case = record.case
    threads = f", {case.threads} threads" if case.threads > 1 else ""
    return f"{case.mode}, batch {case.batch}, {case.layout}, {case.dtype}, {case.device}{threads}, masks: {case.mask}"


def name_of(record: Record) -> str:
    """The network of a record, with its resolution if that is not its own."""
    case = record.case
    own = case.resolution == zoo.entry(case.model).resolution
    return case.model if own else f"{case.model} at {case.resolution}"


def _latencies(records: Sequence[Record]) -> str:
    arms = list(dict.fromkeys(record.arm for record in records))
    by_model: dict[str, dict[str, Record]] = {}
    for record in records:
        by_model.setdefault(name_of(record), {})[record.arm] = record
    heads = ["network", *(f"{arm}, ms" for arm in arms), *(f"chanopt / {arm}" for arm in arms if arm != "chanopt")]
    return table(heads, (_latency_line(model, found, arms) for model, found in by_model.items()))


def _latency_line(model: str, found: Mapping[str, Record], arms: Sequence[str]) -> list[str]:
    ours = found["chanopt"].ratios if "chanopt" in found else {}
    times = [_spread(found[arm].latency_ms if arm in found else None, 1) for arm in arms]
    return [model, *times, *(_spread(ours.get(arm), 2) for arm in arms if arm != "chanopt")]


def _spread(quartiles: Sequence[float] | None, digits: int) -> str:
    if quartiles is None:
        return "-"
    low, median, high = (f"{value:.{digits}f}" for value in quartiles)
    return f"{median} [{low}, {high}]"


def _verdicts(records: Sequence[Record]) -> list[str]:
    ours = [record for record in records if record.arm == "chanopt" and record.ratios]
    lines: list[str] = []
    for arm in dict.fromkeys(other for record in ours for other in record.ratios):
        medians = {name_of(record): record.ratios[arm][1] for record in ours if arm in record.ratios}
        slower = [model for model, median in medians.items() if median > 1]
        mean = statistics.geometric_mean(medians.values())
        lines.append(f"- against {arm}: geometric mean {mean:.3f}; slower on {', '.join(slower) or 'none'}")
    lost = [f"- {name_of(r)}, {r.arm}: {r.exception}" for r in records if r.status != "ok"]
    told = "Medians with quartiles in brackets; ratios within a round, below 1: chanopt is faster."
    return [told, *lines, *_without_masks(records), *lost]


def _without_masks(records: Sequence[Record]) -> list[str]:
    """What of the ratios needs no masks: the unmasked arm against the dense one, by their medians."""
    medians = {(name_of(r), r.arm): r.latency_ms[1] for r in records if r.latency_ms is not None}
    ratios = {
        model: medians[model, "unmasked"] / medians[model, "dense"]
        for model, arm in medians
        if arm == "unmasked" and (model, "dense") in medians
    }
    if not ratios:
        return []
    mean, least = statistics.geometric_mean(ratios.values()), min(ratios, key=ratios.__getitem__)
    return [
        f"- without masks: `chanopt.optimize` of the networks before masking takes {mean:.3f} of "
        f"the dense time (least {ratios[least]:.2f}, {least}). That much comes of folding and memory formats, which "
        "need no masks. The constrained arm has it too; naive, greedy, UPSCALE and Torch-Pruning have not, so that the "
        "ratios to these are not of orders alone."
    ]


def _doings(records: Sequence[Record]) -> str:
    return table(DOING_HEADS, (doing(record) for record in records if record.status == "ok"))


def doing(record: Record) -> list[str]:
    """What an arm does, as cells; of a compiled module, only what was measured on it."""
    counted = record.case.mode == "eager"
    planned, macs = (record.planned or {}, record.macs or {}) if counted else ({}, {})
    old = _is_of_eager_module(record)
    return [
        name_of(record),
        record.arm,
        _count(planned.get("copies")),
        _mega(planned.get("bytes")),
        _mega(record.relayouts[1] if record.relayouts and counted else None),
        _mega((record.profiled or {}).get("hidden_bytes") if counted else None),
        *(_number(macs.get(name), 1, 1e-6) for name in ("dense", "exact", "flux")),
        _number(record.parameters, 2, 1e-6),
        _mega(None if old else record.peak_bytes),
        _number(record.seconds.get("make")),
        "-" if record.error is None or old else f"{record.error:.0e}",
    ]


def _agreement(records: Sequence[Record]) -> list[str]:
    seen = [record for record in records if run.watched(record)]
    agree = sum(bool(record.agree) for record in seen)
    by_profiler = [told for record in seen if (told := run.profile_agrees(record)) is not None]
    wrong = [f"- {record.case}, {record.arm}: {told}" for record in seen if (told := run.differences(record))]
    ran = [record for record in records if record.status == "ok"]
    left = [record for record in ran if not run.watched(record)]
    why = [
        f"{len(part)} {told}"
        for part, told in (
            ([record for record in left if record.case.mode != "eager"], "compiled"),
            ([record for record in left if record.case.mode == "eager"], "of an arm that was not compared then"),
        )
        if part
    ]
    unseen = f" ({', '.join(why)})" if why else ""
    return [
        "*copies* are selections of channels; *re-laid out* and *inside convs* are megabytes moved besides, by changes "
        "of memory format (a pool that is faster over channels last, say) and by convs that make their operands "
        f"contiguous. Of {len(ran)} runs, {len(seen)} were compared with their plan by a dispatch mode in one eager "
        f"run: {agree} selected what was planned, in copies, channels and bytes. Of these {len(seen)}, "
        f"{len(by_profiler)} were compared with torch's profiler too, which saw the same in {sum(by_profiler)}. "
        f"Not compared with anything: {len(left)}{unseen}.",
        *wrong,
    ]


# -- solver, scale, gate, sweep ---------------------------------------------------------------------------------------


def solver_part(rows: Rows) -> list[str]:
    """The objective of the three orders by family and size."""
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        named = row["family"] == "corpus"
        key = (row["family"], 0 if named else row["channels"], 0 if named else row["readers"])
        groups.setdefault(key, []).append(row)
    heads = ["family", "channels x readers", "instances", "proven", "worst gap", "greedy / ours", "natural / ours"]
    wrong = [told for row in rows if (told := solver.differences(row))]
    return [
        "What the permutation program pays (bytes gathered) in our order, the greedy one and the natural one: sums "
        "over the instances where all three are orders. The corpus ([benchmarks/corpus](../benchmarks/corpus)) is "
        f"of random instances and of the segments with more than one reader in {len(solver.NETWORKS)} networks of the "
        f"zoo ({', '.join(solver.NETWORKS)}), at their least resolution with half of the input channels masked; other "
        "segments of the zoo are not in it. Random families are described in "
        "[solver.py](../benchmarks/solver.py).",
        table([*heads, "median s", "worst s"], (_solver_line(key, part) for key, part in groups.items())),
        *([f"- {told}" for told in wrong] or ["No other order was better, and every stored optimum was met."]),
    ]


def _solver_line(key: tuple[str, int, int], rows: Rows) -> list[str]:
    family, channels, readers = key
    seconds = [row["seconds"] for row in rows]
    return [
        family,
        f"{channels} x {readers}" if channels else "all",
        str(len(rows)),
        str(sum(row["optimal"] for row in rows)),
        f"{max(row['gap'] for row in rows):.1%}",
        *(_times([row for row in rows if row["greedy"] and row["natural"]], name) for name in ("greedy", "natural")),
        f"{statistics.median(seconds):.3f}",
        f"{max(seconds):.3f}",
    ]


def _times(rows: Rows, other: str) -> str:
    ours = sum(row["objective"] for row in rows)
    return f"{sum(row[other] for row in rows) / ours:.2f}" if ours else "-"


def scale_part(rows: Rows) -> list[str]:
    """Seconds and memory by size, and the slopes."""
    heads = ["network", "ops", "operands", "parameters, M", "segments", "proven", "capture, s", "solver, s"]
    heads += ["everything else, s", "optimise, s", "MB"]
    lines = [
        [
            f"{row['family']} {row['size']}",
            _count(row["ops"]),
            _count(row["operands"]),
            _number(row["parameters"], 2, 1e-6),
            _count(row["segments"]),
            _count(row["segments_optimal"]),
            *(_number(row[stage]) for stage in ("capture", "solver", "rest", "optimize")),
            _mega(row["memory"]),
        ]
        for row in rows
    ]
    kinds = {
        "ops, all sizes": scale.slopes(rows, "ops"),
        "operands, all sizes": scale.slopes(rows),
        "operands, the two largest": scale.slopes(rows, last=2),
    }
    stages = dict.fromkeys(stage for found in kinds.values() for slopes in found.values() for stage in slopes)
    slopes = [
        [family, "channels" + against.removeprefix("operands") if family == "wide" else against]
        + [_number(found[family].get(stage)) for stage in stages]
        for family in dict.fromkeys(row["family"] for row in rows)
        for against, found in kinds.items()
        if (family, against) != ("wide", "ops, all sizes")
    ]
    return [
        table(heads, lines),
        "*solver* and *everything else* are of segments solved one after another, *optimise* of the default, side by "
        "side in processes once three seconds have gone by. Slopes of log time against log size; 1 is linear. A layer "
        "of a dense net reads all before it: its operands, and with them whatever looks at each of them, grow with "
        "the square of its ops. *rest* is all that compiling does outside the solver, the report with it; capture is "
        "torch.export's.",
        table(["network", "against", *stages], slopes),
    ]


def gate_part(rows: Mapping[str, Row]) -> list[str]:
    """How many rows are gated, and their totals."""
    totals = {count: sum(row[count] for row in rows.values()) for count in gate.COUNTS}
    return [
        f"{len(rows)} rows, at the least resolution of each network: {totals['segments_optimal']:,} of "
        f"{totals['segments']:,} segments proven optimal, {totals['copies']:,} copies of "
        f"{_mega(totals['copied_bytes'])} MB, {_number(totals['macs'], 1, 1e-9)} of "
        f"{_number(totals['macs_dense'], 1, 1e-9)} GMACs and {_number(totals['parameters'], 1, 1e-6)} of "
        f"{_number(totals['parameters_dense'], 1, 1e-6)} M parameters stay. `python -m benchmarks gate` fails if "
        "a count differs; the tests ask it of three networks."
    ]


def sweep_part(path: Path) -> list[str]:
    """How many rows of the correctness sweep are in bounds."""
    if not path.exists():
        return ["Not measured yet: `python -m benchmarks sweep`."]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    broken = [row for row in rows if row["violations"]]
    return [
        f"{len(rows) - len(broken)} of {len(rows)} rows in bounds ({len({row['model'] for row in rows})} networks; "
        "[sweep.md](../benchmarks/results/sweep.md) has them all). Out of bounds:",
        *(
            [f"- {row['model']}, {row['side']} {float(row['amount']):.0%}: {row['violations']}" for row in broken]
            or ["None."]
        ),
        *_age_of(rows, load(path.parent, survey.OUT.name) or []),
    ]


def _age_of(swept: Rows, surveyed: Rows) -> list[str]:
    """Whether the sweep is of other code than the survey: how many of the rows they share have other counts."""

    def key(row: Row) -> tuple[str, str, float, int]:
        return row["model"], row["side"], float(row["amount"]), int(row.get("resolution") or 0)

    now = {key(row): row for row in surveyed if row.get("chanopt")}
    common = [(row, now[key(row)]) for row in swept if key(row) in now and row.get("copied_bytes")]
    names = {"copies": "copies", "gathered_channels": "channels", "copied_bytes": "bytes"}
    other = [
        old
        for old, new in common
        if any(int(old[name]) != new["chanopt"][ours] for name, ours in names.items())
        or int(old["segments"]) != new["segments"]
    ]
    if not common:
        return []
    if not other:
        return [f"All {len(common)} rows that the survey above has too have the same counts there."]
    return [
        f"The sweep is of earlier code than the survey above: of the {len(common)} rows that both have, {len(other)} "
        f"have other counts of copies, channels, bytes or segments in the survey ({', '.join(_models(other))}). "
        "What it says of errors holds for that earlier code."
    ]


# -- figures ----------------------------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _mega(value: float | None) -> str:
    return _number(value, 2, 1e-6)


def add_arguments(made: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    made.add_argument("--results", type=Path, default=jobs.RESULTS, help="where the JSON is")


def main(args: argparse.Namespace) -> int:
    """Write the page; returns 0."""
    if not args.results.is_dir():
        raise SystemExit(f"expected a folder with results, found none at {args.results}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(markdown(args.results))
    print(args.out)
    return 0
