"""The torch.compile backend: is it right, how often does it compile, and how fast is what it compiles.

    python -m benchmarks backend
    python -m benchmarks backend --models resnet18 shufflenet_v2_x0_5 --part right --small
    python -m benchmarks backend --models resnet18 --part speed --rounds 10

Part "right": every network with masks on inputs and outputs, called at four batch sizes through
``torch.compile(backend="chanopt")``, eager behind it; compared with the masked network.

Part "speed": CPU, batch 1, one thread, float32, input masks. ``backend="chanopt"`` (Inductor behind it) against
``backend="inductor"`` on UPSCALE's export of the same masks and on the masked network, all with frozen weights. The
arms are called in turn, as in `benchmarks.speed`; of UPSCALE's two ways of copying, the faster one on each network
counts.

Every network has a process of its own. Tables go to the name of OUT (JSON) with .md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from benchmarks import jobs, peers, zoo
from benchmarks.grid import table
from benchmarks.machine import machine
from benchmarks.masks import Setting, build_masked
from benchmarks.measure import MAX_ERROR32, describe, relative_error
from benchmarks.speed import COMPARED_HEADS, Arm, Compared, Spread, compared, ratio, time_arms

RIGHT: tuple[str, ...] = zoo.ALL
FAST: tuple[str, ...] = ("resnet50", "densenet121", "googlenet", "mobilenet_v2")
OUT = jobs.RESULTS / "backend.json"

BATCHES = (2, 3, 4, 1)
TO_UPSCALE = 0.8
TO_DENSE = 0.5
"""Most that the geometric means of the ratios may be."""


@dataclass(frozen=True, slots=True)
class Right:
    """One network through the backend.

    Attributes:
        error: greatest relative difference to the masked network's outputs, over all batch sizes.
        graphs: graphs that Dynamo made for the first batch size; `recompiled` those for all the others.
        breaks: places where Dynamo broke the graph.
        slim: graphs that chanopt optimised.
        macs, macs_dense: of one inference at the first batch size, over these graphs.
        exception: what went wrong, if anything.
    """

    model: str
    error: float = float("nan")
    graphs: int = 0
    recompiled: int = 0
    breaks: int = 0
    slim: int = 0
    macs_dense: int = 0
    macs: int = 0
    seconds: float = 0.0
    exception: str = ""

    @property
    def holds(self) -> bool:
        """Whether it ran, gave the masked network's outputs, and did less."""
        return self.error <= MAX_ERROR32 and self.macs < self.macs_dense and not self.exception


@dataclass(frozen=True, slots=True)
class Speed(Compared):
    """One network, all arms through Inductor.

    Attributes:
        checked: time with the backend's own default of comparing all weights at each call, over that without.
        from_python: time if Python calls the kernels, as in the other arms, over UPSCALE's.
    """

    checked: Spread
    from_python: Spread
    error: float

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Speed:
        """What `dataclasses.asdict` made a mapping of."""
        fields: dict[str, Any] = {k: Spread(**item) if isinstance(item, Mapping) else item for k, item in row.items()}
        return cls(**fields)


def right(name: str, *, amount: float, resolution: int | None) -> Right:
    """Run one network of the zoo through the backend; never raises, an error becomes a row."""
    started = time.perf_counter()
    try:
        found = _run(name, amount, resolution)
    # The question is whether anything raises, so everything that does is recorded.
    except Exception as error:  # noqa: BLE001
        return Right(name, exception=describe(error), seconds=time.perf_counter() - started)
    return Right(name, **found, seconds=time.perf_counter() - started)


def _run(name: str, amount: float, resolution: int | None) -> dict[str, Any]:
    import chanopt
    from chanopt.errors import ChanoptError

    _reset()
    model = build_masked(name, Setting("both", amount), resolution)
    fast = torch.compile(model, backend="chanopt", options={"compiler": "eager"})
    known: dict[str, Any] = {"error": 0.0}
    with torch.no_grad():
        for batch in BATCHES:
            inputs = zoo.example_inputs(name, batch, resolution, seed=batch)
            known["error"] = max(known["error"], relative_error(model, fast, inputs))
            if batch != BATCHES[0]:
                continue
            known |= {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
            try:
                report = chanopt.explain(fast)
            except ChanoptError:
                continue
            known |= {"slim": len(getattr(report, "graphs", [report]))}
            known |= {"macs_dense": report.macs_before, "macs": report.macs_after}
    return {**known, "recompiled": counters["stats"]["unique_graphs"] - known["graphs"]}


def speed(name: str, *, amount: float, rounds: int, resolution: int | None) -> Speed:
    """Time one network of the zoo under input masks of `amount`.

    Raises:
        benchmarks.peers.PeerError: UPSCALE could not export it.
    """
    _reset()
    model = build_masked(name, Setting("input", amount), resolution)
    inputs = zoo.example_inputs(name, 1, resolution)
    # Frozen weights are never looked at again: this is what the others do.
    fast = torch.compile(model, backend="chanopt", options={"check": "version"})
    with torch.inference_mode():
        arms: dict[str, Arm] = {"chanopt": fast, "dense": _inductor(model, inputs)}
        arms["checked"] = torch.compile(model, backend="chanopt")
        python: dict[str, Any] = {"check": "version", "inductor": {"cpp_wrapper": False}}
        arms["from_python"] = torch.compile(model, backend="chanopt", options=python)
        for mode in ("index", "runs"):
            arms[mode] = _inductor(peers.export(model, inputs, mode).module, inputs)
        expected = model(*inputs)
        taken = time_arms(arms, inputs, rounds)
        error = relative_error(lambda *_: expected, fast, inputs)
    row = compared(name, taken)
    from_python = ratio(taken["from_python"], taken[row["upscale_mode"]])
    return Speed(**row, checked=ratio(taken["checked"], taken["chanopt"]), from_python=from_python, error=error)


def _inductor(model: nn.Module, inputs: tuple[Any, ...]) -> Arm:
    """Inductor with frozen weights, compiled for these inputs under `torch.inference_mode`.

    As an option of `torch.compile` freezing does nothing: Dynamo looks at the global setting, and weights that it has
    made inputs of the graph are not frozen.
    """
    compiled = torch.compile(model, backend="inductor")
    with inductor_config.patch(freezing=True):
        compiled(*inputs)
    return compiled


def _reset() -> None:
    """Forget what was compiled: Dynamo stops compiling a function that it has compiled eight times."""
    importlib.import_module("chanopt.backend")  # registers the backend where the package is not installed
    torch.compiler.reset()
    counters.clear()


def right_page(rows: Sequence[Right]) -> list[str]:
    """The table of part "right"."""
    heads = ["network", "error", "graphs", "breaks", "compiled again", "slim graphs", "MACs, M", "left", "s"]
    body = [
        [
            row.model,
            f"{row.error:.0e}",
            str(row.graphs),
            str(row.breaks),
            str(row.recompiled),
            str(row.slim),
            f"{row.macs_dense / 1e6:.0f}",
            f"{row.macs / row.macs_dense:.0%}" if row.macs_dense else "-",
            f"{row.seconds:.0f}",
        ]
        for row in rows
    ]
    failed = [f"- {row.model}: {row.exception}" for row in rows if row.exception]
    within = sum(row.holds for row in rows)
    told = f"{within} of {len(rows)} give the masked network's outputs within {MAX_ERROR32:.0e} with fewer operations."
    return ["## Outputs, graphs, operations", _CALLED, table(heads, body), told, *failed]


_CALLED = (
    f"Called at the batch sizes {', '.join(map(str, BATCHES))}; graphs, breaks and multiply-accumulates (MACs) are "
    "those of the first call, graphs compiled again those of the others: one for any batch, one for a batch of one."
)


def speed_page(rows: Sequence[Speed]) -> list[str]:
    """The table of part "speed", and its geometric means."""
    heads = [*COMPARED_HEADS, "called from Python / UPSCALE", "all weights compared", "error"]
    body = [[*row.cells(), row.from_python.format(2), row.checked.format(2), f"{row.error:.0e}"] for row in rows]
    means = [
        f"Geometric mean against {what}: {mean:.3f}{bound}."
        for what, bound, mean in (
            ("UPSCALE", f" (bound {TO_UPSCALE})", _mean([row.to_upscale for row in rows])),
            ("UPSCALE, both called from Python", "", _mean([row.from_python for row in rows])),
            ("the masked network", f" (bound {TO_DENSE})", _mean([row.to_dense for row in rows])),
        )
    ]
    told = (
        "Medians, with quartiles in brackets; ratios within a round. All through Inductor with frozen weights, chanopt "
        'with `check="version"`; the last ratio is the time with the default, which compares all weights at each call. '
        "On a CPU chanopt has Inductor write in C++ what calls the kernels (`cpp_wrapper`); in the other arms, as by "
        "default, that is Python: the ratio before the last leaves it aside."
    )
    return ["## Speed", told, table(heads, body), *means]


def _mean(spreads: Sequence[Spread]) -> float:
    return statistics.geometric_mean([spread.median for spread in spreads])


def add_arguments(made: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    made.add_argument(
        "--models", nargs="+", type=zoo.network, metavar="NAME", help="networks (default: each part's own)"
    )
    made.add_argument("--part", choices=("right", "speed", "both"), default="both")
    made.add_argument("--amount", type=float, default=0.5, help="fraction of channels masked")
    made.add_argument("--rounds", type=int, default=40, help="timed calls of each arm, at least 2")
    made.add_argument("--small", action="store_true", help="part right at the least resolution each network accepts")
    made.add_argument("--resolution", type=int, help="image size in pixels (default: the network's own)")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def right_jobs(args: argparse.Namespace) -> list[jobs.Job]:
    """The processes of part "right", slow ones first, so that the last does not run alone."""
    return [_job("right", name, args) for name in reversed(args.models or RIGHT)] if args.part != "speed" else []


def speed_jobs(args: argparse.Namespace) -> list[jobs.Job]:
    """The processes of part "speed"."""
    return [_job("speed", name, args) for name in args.models or FAST] if args.part != "right" else []


def _job(part: str, name: str, args: argparse.Namespace) -> jobs.Job:
    words = ["--part", part, "--models", name, "--amount", str(args.amount), "--rounds", str(args.rounds)]
    words += ["--small"] if args.small and part == "right" else []
    words += ["--resolution", str(args.resolution)] if args.resolution else []
    return jobs.Job(" ".join(words), ("benchmarks", "backend", "--worker", *words))


def main(args: argparse.Namespace) -> int:
    """Run the command: 1 if an output differs or a network failed, 0 otherwise, whatever the times are."""
    if args.worker:
        return _work(args)
    checks, timings = right_jobs(args), speed_jobs(args)
    rows: list[jobs.Line] = []
    # Apart, because timings want the machine for themselves.
    for part, todo, parallel in (("right", checks, args.jobs), ("speed", timings, 1)):
        path = args.out.with_name(f"{args.out.stem}_{part}.jsonl")
        if todo:
            # The page is of one amount: what was found at another is no part of it.
            rows += jobs.run(
                todo, path, parallel=parallel, timeout=args.timeout, resume=args.resume, what=part, others=False
            )
    return finish(rows, args.out, args.amount)


def _work(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    for name in args.models:
        if args.part == "right":
            size = zoo.entry(name).small if args.small else args.resolution
            row: Right | Speed = right(name, amount=args.amount, resolution=size)
        else:
            row = speed(name, amount=args.amount, rounds=args.rounds, resolution=args.resolution)
        jobs.emit({"part": args.part, "row": asdict(row)})
    return 0


def finish(lines: Sequence[jobs.Line], out: Path, amount: float) -> int:
    """Write the record and its page, print the page and what is not right; returns the exit code."""
    order = {name: place for place, name in enumerate(zoo.ALL)}
    found = sorted(
        (line for line in lines if "row" in line), key=lambda line: order.get(line["row"]["model"], len(order))
    )
    checked = [Right(**line["row"]) for line in found if line["part"] == "right"]
    timed = [Speed.read(line["row"]) for line in found if line["part"] == "speed"]
    lost = [f"{line['job']}: {line['exception']}" for line in lines if "row" not in line]
    conditions = f"CPU, one thread, float32, {amount:.0%} of the channels of each layer masked."
    on = machine()
    parts = ["# The torch.compile backend", conditions, "\n".join(f"- {key}: {value}" for key, value in on.items())]
    parts += [*(right_page(checked) if checked else []), *(speed_page(timed) if timed else []), *lost]
    page = "\n\n".join(parts) + "\n"
    record = {"conditions": conditions, "machine": on, "right": [asdict(row) for row in checked]}
    record["speed"] = [asdict(row) for row in timed]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(page)
    print(page)
    wrong = [row.model for row in checked if not row.holds] + [t.model for t in timed if not t.error <= MAX_ERROR32]
    if wrong:
        print(f"not right: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong or lost else 0
