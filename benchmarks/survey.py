"""The survey of UPSCALE's exporter again, with chanopt beside it: counts only, on the same masks.

    python -m benchmarks survey                                # all networks, two sides, three amounts
    python -m benchmarks survey --models resnet18 --no-peer    # without running UPSCALE itself

Every row has the copies of the naive export, of the greedy order (our implementation, and UPSCALE itself where it
runs) and of chanopt, beside those that the committed survey of the exporter has (`benchmarks/data`). Counts depend
on the masks only, and the masks on the seeded weights only.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import chanopt
from benchmarks import cases, jobs, peers, zoo
from benchmarks.arms import Copies, plans
from benchmarks.masks import Side, mask
from benchmarks.measure import describe, one_by_one
from chanopt.analysis.figures import figures

SIDES: tuple[Side, ...] = ("input", "output")
AMOUNTS = (0.3, 0.5, 0.7)
DATA = Path(__file__).resolve().parent / "data" / "upscale_survey.csv"
OUT = jobs.MINE / "survey.json"


@dataclass(frozen=True, slots=True)
class Published:
    """What the committed survey has for one network under one mask; None where UPSCALE raised."""

    naive: Copies | None
    greedy: Copies | None
    parameters: int | None
    exception: str


@cache
def published() -> Mapping[tuple[str, str, float], Published]:
    """The committed survey, by network, side and amount."""
    with DATA.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["model"], row["side"], float(row["amount"])): _published(row) for row in rows}


def _published(row: Mapping[str, str]) -> Published:
    if row["status"] != "ok":
        return Published(None, None, None, row["exception"])
    naive = Copies(int(row["base_n"]), int(row["base_channels"]), int(row["base_bytes"]))
    greedy = Copies(int(row["n_copies"]), int(row["channels_copied"]), int(row["bytes_copied"]))
    return Published(naive, greedy, int(row["params_pruned"]), "")


def survey(name: str, sides: Iterable[Side], amounts: Iterable[float], *, small: bool, peer: bool) -> Iterable[Any]:
    """The rows of one network, one a mask; what raises is named in the row."""
    chosen = zoo.entry(name)
    size = chosen.small if small else chosen.resolution
    model, inputs = zoo.build(name, resolution=size), zoo.example_inputs(name, 1, size)
    state = copy.deepcopy(model.state_dict())
    captured: Any = None
    failed = ""
    try:
        captured = chanopt.capture(model, inputs)
    except chanopt.errors.CaptureError as error:
        failed = describe(error, limit=160)
    for side in sides:
        raised = ""
        for amount in amounts:
            model.load_state_dict(state)
            mask(model, side, amount)
            row: dict[str, Any] = {"model": name, "side": side, "amount": amount, "resolution": size}
            row |= _plans(captured, failed) | _chanopt(captured, model, inputs)
            if peer:
                row |= _upscale(model, inputs, raised)
                raised = raised or row.get("upscale_exception", "")
            yield row


def _plans(captured: Any, failed: str) -> dict[str, Any]:
    if captured is None:
        return {"naive": None, "greedy": None, "plans_exception": failed}
    flow = plans.Flow(chanopt.lower(captured))
    program, greedy = plans.greedy_copies(flow)
    return {
        "naive": asdict(plans.naive_copies(flow)),
        "greedy": asdict(greedy),
        "plans_cut": figures(program).parameters < figures(flow.program).parameters,
    }


def _chanopt(captured: Any, model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    try:
        fast = chanopt.optimize(captured or model, () if captured else inputs, pipeline=one_by_one())
    # The question of the survey is what runs, so whatever raises is recorded.
    except Exception as error:  # noqa: BLE001
        return {"chanopt": None, "exception": describe(error, limit=160)}
    report = chanopt.explain(fast)
    return {
        "chanopt": asdict(Copies(report.copies, report.gathered_channels, report.copied_bytes)),
        "parameters": report.parameters_after,
        "parameters_dense": sum(parameter.numel() for parameter in model.parameters()),
        "macs": report.macs_after,
        "macs_dense": report.macs_before,
        "segments": len(report.segments),
        "segments_optimal": sum(bool(segment.optimal) for segment in report.segments),
        "refusals": len(report.refusals),
        "optimize_seconds": report.seconds.get("optimize"),
    }


def _upscale(model: nn.Module, inputs: tuple[Any, ...], raised: str) -> dict[str, Any]:
    """UPSCALE's counts; where it raised at one amount it is not tried at the next, which takes as long."""
    if raised:
        return {"upscale": None, "upscale_exception": f"not tried again after {raised}"}
    try:
        exported = peers.export(model, inputs)
    except (peers.PeerError, ImportError) as error:
        return {"upscale": None, "upscale_exception": describe(error, limit=160)}
    counts = exported.counts
    return {
        "upscale": asdict(Copies(counts.n_copies, counts.channels_copied, counts.bytes_copied)),
        "upscale_parameters": exported.parameters_used,
        "upscale_seconds": exported.seconds,
    }


def differences(row: Mapping[str, Any]) -> list[str]:
    """Where a row is not as the committed survey, and where chanopt copies more than another; in words.

    Only rows at the survey's own resolution can be compared with it: bytes depend on it. Arms that cut nothing (the
    naive and the greedy one where outputs are masked, which they do not see) copy nothing and are not compared.
    """
    found: list[str] = []
    known = published().get((row["model"], row["side"], row["amount"]))
    if known is not None and known.naive is not None and row["resolution"] == zoo.entry(row["model"]).resolution:
        theirs = {"naive": known.naive, "greedy": known.greedy, "upscale": known.greedy}
        for arm, copies in theirs.items():
            if arm in row and (row[arm] is None or Copies(**row[arm]) != copies):
                found.append(f"{arm}: {_told(row[arm])}, in the survey {_told(asdict(copies) if copies else None)}")
    if row.get("chanopt") is None:
        return [*found, f"chanopt: {row.get('exception', 'not run')}"]
    ours = row["chanopt"]["bytes"]
    arms = ("naive", "greedy", "upscale") if row.get("plans_cut") else ("upscale",)
    rivals = {arm: row[arm]["bytes"] for arm in arms if row.get(arm)}
    found += [f"chanopt copies {ours:,} bytes, {arm} {theirs:,}" for arm, theirs in rivals.items() if ours > theirs]
    if row["segments_optimal"] < row["segments"]:
        found.append(f"only {row['segments_optimal']} of {row['segments']} segments proven optimal")
    return found


def _told(copies: Mapping[str, int] | None) -> str:
    return "none" if copies is None else f"{copies['copies']} copies, {copies['channels']:,} channels"


def job(
    name: str, *, small: bool, peer: bool, sides: Sequence[str] = SIDES, amounts: Sequence[float] = AMOUNTS
) -> jobs.Job:
    """The process that surveys one network."""
    flags = [*(["--small"] if small else []), *([] if peer else ["--no-peer"])]
    words = ["--sides", *sides, "--amounts", *map(str, amounts), *flags]
    return jobs.Job(f"{name} {' '.join(words)}", ("benchmarks", "survey", "--worker", "--models", name, *words))


def add_arguments(made: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    made.add_argument("--models", nargs="+", type=zoo.network, metavar="NAME", default=zoo.ALL)
    made.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    made.add_argument("--amounts", nargs="+", type=cases.amount, default=AMOUNTS, metavar="SHARE")
    made.add_argument("--small", action="store_true", help="the least resolution each network accepts")
    made.add_argument("--no-peer", dest="peer", action="store_false", help="do not run UPSCALE itself")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    """Run the command; 1 if a row differs from the committed survey or chanopt copies more than another."""
    if args.worker:
        torch.set_num_threads(1)
        for name in args.models:
            for row in survey(name, args.sides, args.amounts, small=args.small, peer=args.peer):
                jobs.emit(row)
        return 0
    todo = [job(name, small=args.small, peer=args.peer, sides=args.sides, amounts=args.amounts) for name in args.models]
    path = args.out.with_suffix(".jsonl")
    rows = jobs.run(todo, path, parallel=args.jobs, timeout=args.timeout, resume=args.resume, what="survey")
    return finish(rows, args.out)


def finish(rows: Sequence[jobs.Line], out: Path) -> int:
    """Write the rows and print those that are not right; returns the exit code."""
    order = {name: place for place, name in enumerate(zoo.ALL)}
    done = sorted(
        (row for row in rows if "model" in row),
        key=lambda row: (row["side"], order.get(row["model"], len(order)), row["amount"]),
    )
    jobs.write(out, done)
    wrong = [(row, found) for row in done if (found := differences(row))]
    for row, found in wrong:
        print(f"{row['model']}, {row['side']} {row['amount']:.0%}: {'; '.join(found)}")
    lost = [row for row in rows if "model" not in row]
    for row in lost:
        print(f"{row['job']}: {row['exception']}")
    print(f"{len(done)} rows, {len(wrong)} to look at, {len(lost)} lost; {out}")
    return 1 if wrong or lost else 0
