"""Models x masks x arms: latency, memory, copies by plan and as observed, multiplications, error.

    python -m benchmarks run                                              # eight networks, every arm
    python -m benchmarks run --models resnet50 --amounts 0.3 0.5 0.7 --modes eager inductor
    python -m benchmarks run --batches 1 8 --layouts contiguous channels_last --devices cuda --dtypes float16

The arms of a case are called in turn, round by round, so that what else the machine does falls on all of them
alike; ratios are taken within a round. Each case has a process of its own. One JSON object an arm, all of one
schema (`benchmarks.cases.Record`). An arm that raises is a record that says so; the others go on.

The arms naive and greedy ignore masked outputs: with --sides output or both they cut less than chanopt does.
Under --modes inductor error and peak memory are of the compiled module; its operators are not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from benchmarks import cases, jobs, observe, speed, zoo
from benchmarks.arms import ARMS, SAME_MASKS, Arm, ArmError, Subject, build
from benchmarks.cases import Case, Mask, Record
from benchmarks.machine import machine
from benchmarks.measure import MAX_ERROR32, describe, relative_error

OUT = jobs.MINE / "run.json"


def run(case: Case, arms: Sequence[str], rounds: int) -> Iterator[Record]:
    """The records of one case, one an arm, in the order of `arms`; an arm that cannot be made says why.

    Raises:
        KeyError: there is no such network or arm.
        ValueError: the mask's amount is outside [0, 1).
    """
    torch.set_num_threads(case.threads)
    on = machine(case.device)
    masked, original = cases.networks(case)
    inputs = cases.inputs(case)
    subject = Subject(masked, inputs, original)
    known: dict[str, Record] = {}
    runnable: dict[str, Any] = {}
    torch.compiler.reset()
    for name in arms:
        record = Record(case, name, on)
        try:
            arm = build(name, subject)
            arm = replace(arm, module=cases.placed(arm.module, case))
            compiled = _compiled(arm.module, case)
            known[name] = _looked_at(record, arm, compiled, subject, case)
            runnable[name] = compiled
        # What one arm raises, whatever it is, is its own result and not that of the others.
        except Exception as error:  # noqa: BLE001
            known[name] = _failed(record, error)
    taken, broken = _times(runnable, inputs, rounds, case.device)
    for name in arms:
        if name in broken:
            yield _failed(known[name], broken[name])
        else:
            yield _timed(known[name], name, taken, rounds) if name in taken else known[name]


def _failed(record: Record, error: Exception) -> Record:
    return replace(record, status="error", exception=str(error) if isinstance(error, ArmError) else describe(error))


def _times(
    runnable: Mapping[str, Any], inputs: tuple[Any, ...], rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """The milliseconds of all arms that go through; an arm that raises is left out and the others are timed anew."""
    broken: dict[str, Exception] = {}
    while left := {name: arm for name, arm in runnable.items() if name not in broken}:
        try:
            return time_arms(left, inputs, rounds, device), broken
        except _TimingError as failed:  # noqa: PERF203
            broken[failed.arm] = failed.reason
    return {}, broken


class _TimingError(Exception):
    """An arm raised while it was timed."""

    def __init__(self, arm: str, reason: Exception) -> None:
        super().__init__(f"{arm}: {reason}")
        self.arm = arm
        self.reason = reason


def _looked_at(record: Record, arm: Arm, compiled: Any, subject: Subject, case: Case) -> Record:
    """A record with all that runs of an arm tell: of the compiled module, error and peak memory alone."""
    seconds = {"capture": subject.capture_seconds, "make": arm.seconds}
    error = None
    if arm.name in SAME_MASKS:
        fresh = cases.inputs(case, seed=11)  # made outside: torch compiles anew for tensors made in inference mode
        with _as_timed(case):
            error = relative_error(subject.model, compiled, fresh)
    parameters = {id(p): p for p in arm.module.parameters()}.values()
    record = replace(
        record,
        same_function=arm.same_function,
        planned=asdict(arm.planned),
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        seconds={stage: spent for stage, spent in seconds.items() if spent is not None},
        figures=dict(arm.figures),
        error=error,
    )
    if case.mode != "eager":
        return replace(record, peak_bytes=_peak(compiled, subject.inputs, case))
    record = _observed(record, arm, subject, case)
    return replace(record, peak_bytes=_peak(arm.module, subject.inputs, case)) if case.device == "cuda" else record


def _observed(record: Record, arm: Arm, subject: Subject, case: Case) -> Record:
    """A record with what the operators of eager runs did."""
    seen = observe.observe(arm.module, subject.inputs, subject.model)
    itemsize = getattr(torch, case.dtype).itemsize
    return replace(
        record,
        observed=asdict(seen.copies),
        agree=seen.copies == arm.planned,
        profiled=asdict(observe.profiled(arm.module, subject.inputs, itemsize, subject.model)),
        relayouts=(seen.relayouts, seen.relayout_bytes),
        concats=(seen.concats, seen.concat_bytes),
        macs=asdict(seen.macs),
        peak_bytes=seen.peak_bytes,
    )


def _peak(call: Any, inputs: tuple[Any, ...], case: Case) -> int:
    """Most bytes allocated at once by a call after the first, which may compile."""
    with torch.no_grad(), _as_timed(case):
        call(*inputs)
        return _cuda_peak(call, inputs) if case.device == "cuda" else observe.peak_allocated(call, inputs)


def _as_timed(case: Case) -> AbstractContextManager[object]:
    """What compiled modules are called in, as when they are timed: in another mode torch compiles them again."""
    return torch.inference_mode() if case.mode != "eager" else nullcontext()


def _cuda_peak(call: Callable[..., object], inputs: tuple[Any, ...]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(*inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _compiled(module: nn.Module, case: Case) -> Any:
    if case.mode == "eager":
        return module
    return torch.compile(module, dynamic=False)


def time_arms(arms: Mapping[str, Any], inputs: tuple[Any, ...], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds by arm, round by round (`benchmarks.speed.time_arms`); on CUDA a call ends with its result.

    Raises:
        _TimingError: an arm raised; it says which.
    """

    def named(name: str, arm: Any) -> Any:
        def call(*args: Any) -> object:
            try:
                result = arm(*args)
                if device == "cuda":
                    torch.cuda.synchronize()
            # Told with the arm's name: the caller goes on with the others.
            except Exception as error:
                raise _TimingError(name, error) from error
            return result

        return call

    return speed.time_arms({name: named(name, arm) for name, arm in arms.items()}, inputs, rounds)


def _timed(record: Record, name: str, taken: Mapping[str, list[float]], rounds: int) -> Record:
    spread = speed.Spread.of(taken[name])
    ratios = {other: speed.ratio(taken[name], times) for other, times in taken.items() if other != name}
    return replace(
        record,
        latency_ms=(spread.low, spread.median, spread.high),
        ratios={other: (s.low, s.median, s.high) for other, s in ratios.items()},
        rounds=rounds,
    )


def plan(args: argparse.Namespace) -> list[Case]:
    """Every case that the arguments ask for."""
    masks = itertools.product(args.criteria, args.amounts, args.sides, args.scopes, args.seeds)
    # Only a random choice has a seed: two seeds of a norm are one mask.
    chosen = dict.fromkeys(Mask(*words) if words[0] == "random" else Mask(*words[:-1]) for words in masks)
    ways = list(itertools.product(args.modes, args.layouts, args.batches, args.dtypes, args.devices, args.threads))
    return [
        Case(name, mask, args.resolution or _resolution(name, args.small), *way)
        for name in args.models
        for mask in chosen
        for way in ways
    ]


def _resolution(name: str, small: bool) -> int:
    return zoo.entry(name).small if small else zoo.entry(name).resolution


def job(case: Case, arms: Sequence[str], rounds: int) -> jobs.Job:
    """The process of one case."""
    words = ["--worker", json.dumps(asdict(case)), "--arms", *arms, "--rounds", str(rounds)]
    return jobs.Job(f"{case}; {' '.join(arms)}; {rounds} rounds", ("benchmarks", "run", *words))


def add_arguments(made: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    made.add_argument("--models", nargs="+", type=zoo.network, metavar="NAME", default=speed.MODELS)
    told = "naive and greedy ignore masked outputs (default: all)"
    made.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help=told)
    made.add_argument("--criteria", nargs="+", choices=cases.CRITERIA, default=["l2"])
    made.add_argument("--amounts", nargs="+", type=cases.amount, default=[0.5], metavar="SHARE")
    made.add_argument("--sides", nargs="+", choices=["input", "output", "both"], default=["input"])
    made.add_argument("--scopes", nargs="+", choices=cases.SCOPES, default=["local"])
    made.add_argument("--seeds", nargs="+", type=int, default=[0])
    made.add_argument("--modes", nargs="+", choices=cases.MODES, default=["eager"])
    made.add_argument("--layouts", nargs="+", choices=cases.LAYOUTS, default=["contiguous"])
    made.add_argument("--batches", nargs="+", type=int, default=[1])
    made.add_argument("--dtypes", nargs="+", choices=cases.DTYPES, default=["float32"])
    made.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], default=["cpu"])
    made.add_argument("--threads", nargs="+", type=int, default=[1])
    made.add_argument("--resolution", type=cases.at_least(1), help="image size in pixels (default: each network's own)")
    made.add_argument("--small", action="store_true", help="the least resolution each network accepts")
    made.add_argument("--rounds", type=cases.rounds, default=20, help="timed calls of each arm, at least 2")
    made.add_argument("--worker", metavar="CASE", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    """Run the command; 1 if plan and observation disagree or something was lost."""
    if args.worker:
        for record in run(Case.of(json.loads(args.worker)), args.arms, args.rounds):
            jobs.emit(record.to_dict())
        return 0
    todo = [job(case, args.arms, args.rounds) for case in plan(args)]
    if "cuda" in args.devices and not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device for --devices cuda, found none")
    # One at a time, whatever --jobs says: these are timed.
    lines = jobs.run(todo, args.out.with_suffix(".jsonl"), timeout=args.timeout, resume=args.resume, what="run")
    return finish(lines, args.out)


def finish(lines: Sequence[jobs.Line], out: Any) -> int:
    """Write the records and print what is not right; returns the exit code."""
    records = [Record.of(line) for line in lines if "case" in line]
    jobs.write(out, [record.to_dict() for record in records])
    wrong = [(record, told) for record in records if (told := differences(record))]
    for record, told in wrong:
        print(f"{record.case}, {record.arm}: {told}")
    lost = [line for line in lines if "case" not in line]
    for line in lost:
        print(f"{line['job']}: {line['exception']}")
    print(f"{len(records)} records, {len(wrong)} to look at, {len(lost)} lost; {out}")
    return 1 if wrong or lost else 0


def differences(record: Record) -> str:
    """What is wrong with a record, in words; "" if nothing is. A peer that cannot be run is not; chanopt is."""
    if record.status != "ok":
        return record.exception if record.arm in ("dense", "chanopt") else ""
    if record.case.device != "cpu":
        return ""
    exact = record.same_function and record.case.dtype in ("float32", "float64")
    if exact and record.error is not None and not record.error <= MAX_ERROR32:
        return f"outputs differ by {record.error:.1e} from the masked network's, over {MAX_ERROR32:.0e}"
    if record.agree is False and watched(record):
        return f"planned {record.planned}, observed {record.observed}"
    if profile_agrees(record) is False:
        return f"observed {record.observed}, the profiler saw {record.profiled}"
    return ""


def watched(record: Record) -> bool:
    """Whether the copies of a run were compared with the plan by the dispatch mode: not in a compiled module."""
    return record.agree is not None and record.case.mode == "eager"


def profile_agrees(record: Record) -> bool | None:
    """Whether torch's profiler saw the same selections as the dispatch mode.

    Returns:
        None if it could not: the arm selects by concatenation, of which the profiler does not tell the parts; or the
        record is of a time when it counted no `x[:, indices]`, which is how UPSCALE selects, and told no channels.
    """
    if not watched(record) or record.profiled is None or record.arm == "upscale_runs":
        return None
    seen, observed = record.profiled, record.observed or {}
    if "channels" in seen:
        names = (("selections", "copies"), ("channels", "channels"), ("selected_bytes", "bytes"))
    elif record.arm == "upscale":
        return None
    else:
        names = (("selections", "copies"), ("selected_bytes", "bytes"))
    return all(seen.get(name) == observed.get(other) for name, other in names)
