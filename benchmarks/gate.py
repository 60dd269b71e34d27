"""Counts of the zoo against the committed ones: copies, bytes, multiplications, parameters, optimality.

    python -m benchmarks gate               # the networks of the smoke cut; the tests run three of them
    python -m benchmarks gate --all         # the whole zoo
    python -m benchmarks gate --all --update

Counts have no noise: any difference fails. If chanopt has become better, or the masks of the zoo have changed on
purpose, `--update` writes the new counts, and the difference is seen in review. Times are not gated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import jobs, sweep, zoo
from benchmarks.masks import Setting, build_masked
from benchmarks.measure import describe

GOLDENS = jobs.RESULTS / "goldens.json"
OUT = GOLDENS
SETTINGS = (Setting("input", 0.5), Setting("both", 0.5))
COUNTS = (
    *("copies", "gathered_channels", "copied_bytes", "macs", "macs_dense"),
    *("parameters", "parameters_dense", "segments", "segments_optimal", "refusals"),
)
"""What is gated, in the order of the file."""


def counts(name: str, setting: Setting) -> dict[str, Any]:
    """The counts of one network at the least resolution that it accepts, in float32."""
    import chanopt

    size = zoo.entry(name).small
    fast = chanopt.optimize(build_masked(name, setting, size), zoo.example_inputs(name, 1, size))
    report = chanopt.explain(fast)
    found = {
        "copies": report.copies,
        "gathered_channels": report.gathered_channels,
        "copied_bytes": report.copied_bytes,
        "macs": report.macs_after,
        "macs_dense": report.macs_before,
        "parameters": report.parameters_after,
        "parameters_dense": report.parameters_before,
        "segments": len(report.segments),
        "segments_optimal": sum(bool(segment.optimal) for segment in report.segments),
        "refusals": len(report.refusals),
    }
    return {name: found[name] for name in COUNTS}


def key(name: str, setting: Setting) -> str:
    """What the file calls a row."""
    return f"{name}, {setting}"


def goldens(path: Path = GOLDENS) -> dict[str, dict[str, Any]]:
    """The committed counts by key; none if there is no file."""
    return jobs.load(path) or {}


def differences(found: Mapping[str, Any], golden: Mapping[str, Any] | None) -> list[str]:
    """How counts differ from the committed ones, in words."""
    if golden is None:
        return ["no committed counts; add them with --update"]
    if "exception" in found:
        return [str(found["exception"])]
    return [
        f"{count} {golden.get(count)} -> {found[count]}{_told(count, golden.get(count), found[count])}"
        for count in COUNTS
        if golden.get(count) != found[count]
    ]


def _told(count: str, before: int | None, after: int) -> str:
    if before is None or count not in ("copies", "gathered_channels", "copied_bytes", "macs", "parameters", "refusals"):
        return ""
    return " (better)" if after < before else " (worse)"


def job(name: str) -> jobs.Job:
    """The process of one network."""
    return jobs.Job(name, ("benchmarks", "gate", "--worker", "--models", name))


def add_arguments(made: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    made.add_argument("--models", nargs="+", type=zoo.network, metavar="NAME", help="default: those of the smoke cut")
    made.add_argument("--all", action="store_true", help="the whole zoo")
    made.add_argument("--update", action="store_true", help="write the counts instead of comparing")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    """Run the command; 1 if any count differs."""
    models = zoo.ALL if args.all else args.models or sweep.SMOKE_MODELS
    if args.worker:
        torch.set_num_threads(1)
        for name in models:
            for setting in SETTINGS:
                jobs.emit({"key": key(name, setting), "counts": _counts(name, setting)})
        return 0
    goldens(args.out)  # that cannot be read is told before anything is measured
    # Named apart from the goldens, which --out may name: a run that is cut short must not touch them.
    path = jobs.RESULTS / "gate.jsonl"
    todo = [job(name) for name in models]
    # Only the counts that were asked for may be updated.
    lines = jobs.run(
        todo, path, parallel=args.jobs, timeout=args.timeout, resume=args.resume, what="gate", others=False
    )
    return finish(lines, args.out, update=args.update)


def _counts(name: str, setting: Setting) -> dict[str, Any]:
    try:
        return counts(name, setting)
    # A network that raises is a difference like any other.
    except Exception as error:  # noqa: BLE001
        return {"exception": describe(error)}


def finish(lines: Sequence[jobs.Line], path: Path, *, update: bool) -> int:
    """Compare with the committed counts, or write them; returns the exit code."""
    found = {line["key"]: line["counts"] for line in lines if "key" in line}
    lost = [f"{line['job']}: {line['exception']}" for line in lines if "key" not in line]
    committed = goldens(path)
    if update:
        good = {row: counts for row, counts in found.items() if "exception" not in counts}
        write({**committed, **good}, path)
        lost += [f"{row}: {counts['exception']}" for row, counts in found.items() if "exception" in counts]
        print("\n".join([*lost, f"{len(good)} rows written to {path}"]))
        return 1 if lost else 0
    wrong = [(row, told) for row, counts in found.items() if (told := differences(counts, committed.get(row)))]
    print("\n".join([*(f"{row}: {'; '.join(told)}" for row, told in wrong), *lost]))
    print(f"{len(found)} rows, {len(wrong)} differ, {len(lost)} lost; {path}")
    return 1 if wrong or lost else 0


def write(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write counts in the zoo's order, a line each."""
    place = {name: number for number, name in enumerate(zoo.ALL)}
    chosen = sorted(rows, key=lambda row: (place.get(row.partition(",")[0], len(place)), row))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(f"{json.dumps(row)}: {json.dumps(rows[row])}" for row in chosen) + "\n}\n")
