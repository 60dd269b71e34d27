"""The sweep: every network of the zoo x masks, against the masked network and UPSCALE on the same masks.

    python -m benchmarks.sweep                                    # everything; hours of one core
    python -m benchmarks.sweep --models resnet18 densenet121
    python -m benchmarks.sweep --resume                           # go on after an interruption
    python -m benchmarks.sweep --smoke                            # a few networks at a low resolution;
    minutes

Rows go to OUT with the ending .jsonl as they are measured, and at the end to OUT (CSV) and to the same name
with .md. Each network has a process of its own: one that crashes or hangs becomes rows that say so. The exit
code is 1 if any row is out of bounds (see `benchmarks.measure.violations`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import tables, zoo
from benchmarks.masks import Setting
from benchmarks.measure import Row, measure

SETTINGS: tuple[Setting, ...] = (
    Setting("input", 0.3),
    Setting("input", 0.5),
    Setting("input", 0.7),
    Setting("output", 0.5),
    Setting("both", 0.5),
)

SMOKE_SETTINGS: tuple[Setting, ...] = (Setting("input", 0.5), Setting("both", 0.5))

# One network of each kind: residual, dense, branching, inverted residual, gated, shuffled, grouped, layer
# norm, ghost.
SMOKE_MODELS: tuple[str, ...] = (
    *("resnet18", "densenet121", "googlenet", "mobilenet_v2", "mobilenet_v3_small"),
    *("shufflenet_v2_x0_5", "regnet_x_400mf", "convnextv2_atto", "ghostnet_100", "squeezenet1_1"),
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, slots=True)
class Task:
    """One network and the settings that are still to be measured on it, for one process."""

    model: str
    settings: tuple[Setting, ...]
    small: bool

    @property
    def resolution(self) -> int:
        """Image size in pixels."""
        chosen = zoo.entry(self.model)
        return chosen.small if self.small else chosen.resolution


@dataclass(slots=True)
class Log:
    """Rows as they come, from several threads, each at once appended to a JSON-lines file."""

    path: Path
    rows: list[Row]
    progress: tqdm[Any]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, row: Row) -> None:
        """Keep a row, write it, and advance the progress bar; a row out of bounds is printed."""
        with self.lock:
            self.rows.append(row)
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            if row.violations:
                label = f"{row.model}, {Setting(row.side, row.amount)}"  # pyright: ignore[reportArgumentType]
                self.progress.write(f"{label}: {'; '.join(row.violations)}", file=sys.stderr)
            self.progress.update()


def run_task(task: Task, log: Log, timeout: float) -> None:
    """Measure a task in a process of its own; settings it did not come back with become rows that say why."""
    left = list(task.settings)
    errors: list[str] = []
    late = threading.Event()
    pipe = subprocess.PIPE
    with subprocess.Popen(command(task), cwd=ROOT, text=True, stdout=pipe, stderr=pipe) as process:
        timer = threading.Timer(timeout, lambda: (late.set(), process.kill()))
        # Read beside the rows: a process that nobody reads blocks once a pipe is full.
        reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
        timer.start()
        reader.start()
        for line in filter(lambda line: line.startswith("{"), process.stdout or ()):
            row = Row(**json.loads(line))
            left = [s for s in left if (s.side, s.amount) != (row.side, row.amount)]
            log.add(row)
        code = process.wait()
        timer.cancel()
        reader.join()
    last = " ".join("".join(errors[-3:]).split())[-300:]
    why = f"no answer within {timeout:g} s" if late.is_set() else f"process ended with code {code}: {last}"
    for lost in left:
        row = Row(task.model, lost.side, lost.amount, task.resolution, status="error", exception=why)
        log.add(replace(row, violations=[why]))


def command(task: Task) -> list[str]:
    """The command line of a task's process."""
    settings = [f"{s.side}:{s.amount}" for s in task.settings]
    start = [sys.executable, "-m", "benchmarks.sweep", "--worker", "--models", task.model]
    return [*start, "--settings", *settings, *(["--small"] if task.small else [])]


def work(task: Task) -> None:
    """What the process of a task does: one JSON line per setting on standard output."""
    torch.set_num_threads(1)
    for setting in task.settings:
        print(json.dumps(asdict(measure(task.model, setting, task.resolution))), flush=True)


def plan(models: Iterable[str], settings: Sequence[Setting], done: Iterable[Row], *, small: bool) -> list[Task]:
    """The tasks left after the rows already measured without a crash at the same resolution."""
    have = {(row.model, row.side, row.amount, row.resolution) for row in done if row.status == "ok"}
    tasks: list[Task] = []
    for model in models:
        whole = Task(model, tuple(settings), small)
        left = tuple(s for s in settings if (model, s.side, s.amount, whole.resolution) not in have)
        if left:
            tasks.append(Task(model, left, small))
    return tasks


def setting(text: str) -> Setting:
    """Parse SIDE:AMOUNT.

    >>> setting("input:0.5")
    Setting(side='input', amount=0.5)
    """
    side, _, amount = text.partition(":")
    if side not in ("input", "output", "both"):
        raise argparse.ArgumentTypeError(f"expected input, output or both before the colon, found {text!r}")
    try:
        return Setting(side, float(amount))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected SIDE:AMOUNT, as in input:0.5, found {text!r}") from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--models", nargs="+", type=zoo.network, metavar="NAME", help="default: all of the zoo")
    made.add_argument("--settings", nargs="+", type=setting, metavar="SIDE:AMOUNT", help="default: all five")
    made.add_argument("--small", action="store_true", help="the least resolution each network accepts")
    made.add_argument("--smoke", action="store_true", help="a few networks, small, two settings")
    made.add_argument("--jobs", type=int, default=2, help="networks at a time (default: 2)")
    made.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="for one network")
    made.add_argument("--out", type=Path, help="default: benchmarks/results/sweep.csv (smoke.csv with --smoke)")
    made.add_argument("--resume", action="store_true", help="keep the rows already measured without a crash")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    models = args.models or (SMOKE_MODELS if args.smoke else zoo.ALL)
    settings = tuple(args.settings or (SMOKE_SETTINGS if args.smoke else SETTINGS))
    small: bool = args.small or args.smoke
    if args.worker:
        for model in models:
            work(Task(model, settings, small))
        return 0
    out: Path = args.out or RESULTS / ("smoke.csv" if args.smoke else "sweep.csv")
    rows = sweep(models, settings, out, small=small, jobs=args.jobs, timeout=args.timeout, resume=args.resume)
    broken = [row for row in rows if row.violations]
    print(f"{len(rows)} rows, {len(broken)} out of bounds; {out} and {out.with_suffix('.md')}")
    return 1 if broken else 0


def sweep(
    models: Sequence[str],
    settings: Sequence[Setting],
    out: Path,
    *,
    small: bool,
    jobs: int,
    timeout: float,
    resume: bool,
) -> list[Row]:
    """Measure, with a progress bar on standard error, and write the tables; returns all rows."""
    path = out.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [row for row in tables.read_rows(path) if row.status == "ok"] if resume else []
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in kept))
    tasks = plan(models, settings, kept, small=small)
    total = sum(len(task.settings) for task in tasks)
    progress: tqdm[Any] = tqdm(total=total, unit="row", disable=None)
    with progress, ThreadPoolExecutor(jobs) as pool:
        log = Log(path, kept, progress)
        for finished in [pool.submit(run_task, task, log, timeout) for task in tasks]:
            finished.result()
    tables.write(log.rows, out, "chanopt on the zoo" + (", small images" if small else ""))
    return log.rows


if __name__ == "__main__":
    sys.exit(main())
