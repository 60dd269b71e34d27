"""Everything that docs/results.md shows, measured again: survey, speed, solver, scale, counts; then the pages.

python -m benchmarks                 # less than an hour on two cores
python -m benchmarks --smoke         # a cut of every part, within three minutes, to benchmarks/results/smoke
python -m benchmarks --resume        # go on after an interruption
python -m benchmarks --parts survey  # one part again; the pages are of what is there
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import cases, docs, gate, jobs, page, run, scale, solver, speed, survey, sweep, zoo
from benchmarks.arms import ARMS
from benchmarks.cases import Case, Mask

SMOKE = jobs.RESULTS / "smoke"

_SMOKE_MODELS = ("squeezenet1_1", "resnet18", "shufflenet_v2_x0_5")
_SMOKE_SIZES = ((64, 8),)
_TWO = ("resnet18", "mobilenet_v2")
_MORE_AMOUNTS = (0.3, 0.7)
_ROUNDS = 20

PARTS = ("speed", "solver", "scale", "survey", "gate")
"""In the order in which they run: what is timed comes first."""


def speed_jobs(*, smoke: bool) -> list[jobs.Job]:
    """What is timed: eight networks eagerly with every arm; two of them by Inductor as well, and at more amounts."""
    if smoke:
        return [run.job(Case("resnet18", resolution=zoo.entry("resnet18").small), ARMS, 3)]
    eager = [Case(name, Mask(), zoo.entry(name).resolution) for name in speed.MODELS]
    compiled = [Case(name, Mask(), zoo.entry(name).resolution, "inductor") for name in _TWO]
    curves = [Case(name, Mask(amount=share), zoo.entry(name).resolution) for name in _TWO for share in _MORE_AMOUNTS]
    return [run.job(case, ARMS, _ROUNDS) for case in (*eager, *compiled, *curves)]


def survey_jobs(*, smoke: bool) -> list[jobs.Job]:
    """What is counted: the whole zoo, or a few networks at a low resolution."""
    if smoke:
        return [survey.job(name, small=True, peer=True, amounts=[0.5]) for name in _SMOKE_MODELS]
    # Slow ones first, so that the last does not run alone.
    return [survey.job(name, small=False, peer=True) for name in reversed(zoo.ALL)]


def solver_jobs(*, smoke: bool) -> list[jobs.Job]:
    """What is ordered: every family, and the corpus."""
    if smoke:
        return [solver.job("independent", _SMOKE_SIZES, [0], 2.0), solver.job("chain", _SMOKE_SIZES, [0], 2.0)]
    return [solver.job(family, solver.SIZES, solver.SEEDS, 5.0) for family in solver.NAMES]


def scale_jobs(*, smoke: bool) -> list[jobs.Job]:
    """What is compiled at several sizes."""
    if smoke:
        return [scale.job("residual", 18), scale.job("residual", 34), scale.job("wide", 1024)]
    return [scale.job(family, size) for family, (_, sizes) in scale.FAMILIES.items() for size in sizes]


def add_arguments(made: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    made.add_argument("--smoke", action="store_true", help="a cut of every part")
    made.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    made.add_argument(
        "--results", type=cases.folder, help="folder for the JSON (default: benchmarks/results, or smoke in it)"
    )
    made.add_argument("--page", type=Path, help="where the HTML page goes (default: page.html among the JSON)")


Finish = Callable[[Sequence[jobs.Line]], int]


def main(args: argparse.Namespace) -> int:
    """Run the command; 1 if anything is not right."""
    folder: Path = args.results or (SMOKE if args.smoke else jobs.RESULTS)
    started = time.monotonic()
    steps: list[tuple[str, list[jobs.Job], int, Finish]] = [
        ("speed", speed_jobs(smoke=args.smoke), 1, lambda lines: run.finish(lines, folder / run.OUT.name)),
        ("solver", solver_jobs(smoke=args.smoke), 1, lambda lines: solver.finish(lines, folder / solver.OUT.name)),
        ("scale", scale_jobs(smoke=args.smoke), 1, lambda lines: scale.finish(lines, folder / scale.OUT.name)),
        (
            "survey",
            survey_jobs(smoke=args.smoke),
            args.jobs,
            lambda lines: survey.finish(lines, folder / survey.OUT.name),
        ),
        ("gate", gate_jobs(smoke=args.smoke), args.jobs, lambda lines: gate.finish(lines, gate.GOLDENS, update=False)),
    ]
    codes = [_step(*step, folder, args) for step in steps if step[0] in args.parts]
    # Only the committed results make the committed page.
    written = args.out or (docs.OUT if folder.resolve() == jobs.RESULTS else folder / "results.md")
    written.write_text(docs.markdown(folder))
    shown = args.page or folder / page.OUT.name
    shown.write_text(page.html(folder))
    print(f"{written}, {shown}; {(time.monotonic() - started) / 60:.1f} minutes")
    return max(codes)


def gate_jobs(*, smoke: bool) -> list[jobs.Job]:
    """Whose counts are compared with the committed ones."""
    return [gate.job(name) for name in (_SMOKE_MODELS if smoke else sweep.SMOKE_MODELS)]


def _step(
    name: str, todo: list[jobs.Job], parallel: int, finish: Finish, folder: Path, args: argparse.Namespace
) -> int:
    path = folder / f"{name}.jsonl"
    lines = jobs.run(todo, path, parallel=parallel, timeout=args.timeout, resume=args.resume, what=name)
    return finish(lines)
