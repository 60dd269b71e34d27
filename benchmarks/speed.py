"""Speed on this CPU: the masked network as it is, UPSCALE's export of it, and chanopt's, on the same masks.

    python -m benchmarks.speed
    python -m benchmarks.speed --models resnet18 densenet121 --rounds 20

Eager, batch 1, one thread, float32, 224 pixels, input masks. The arms are called in turn, round by round, so
that what else the machine does falls on all of them alike; ratios are taken within a round, and their median
is reported. UPSCALE has two ways of copying channels; both are timed, and the faster one on each network
stands for it. Tables and all figures go to OUT (JSON) and to the same name with .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import cases, peers, zoo
from benchmarks.grid import table
from benchmarks.machine import machine
from benchmarks.masks import Setting, build_masked
from benchmarks.measure import MAX_ERROR32, relative_error

MODELS: tuple[str, ...] = (
    *("resnet18", "resnet50", "densenet121", "googlenet"),
    *("mobilenet_v2", "efficientnet_b0", "efficientnet_v2_s", "mnasnet1_0"),
)

OUT = Path(__file__).resolve().parent / "results" / "speed.json"

_WARMUPS = 3

Arm = Callable[..., object]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of a sample."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        """The spread of at least two figures."""
        low, median, high = statistics.quantiles(sample, n=4, method="inclusive")
        return cls(low, median, high)

    def format(self, digits: int) -> str:
        """Median, with the quartiles in brackets."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True, slots=True)
class Compared:
    """One network. Times in milliseconds, ratios of times within a round; below 1 is faster than the other.

    Attributes:
        upscale_mode: the faster of UPSCALE's two ways of copying ("index" or "runs").
    """

    model: str
    dense_ms: Spread
    upscale_ms: Spread
    chanopt_ms: Spread
    upscale_mode: str
    to_upscale: Spread
    to_dense: Spread

    def cells(self) -> list[str]:
        """A line of a table, under :data:`COMPARED_HEADS`."""
        return [
            self.model,
            self.dense_ms.format(1),
            f"{self.upscale_ms.format(1)} {self.upscale_mode}",
            self.chanopt_ms.format(1),
            self.to_upscale.format(2),
            self.to_dense.format(2),
        ]


COMPARED_HEADS = ("network", "masked, ms", "UPSCALE, ms", "chanopt, ms", "chanopt / UPSCALE", "chanopt / masked")


def compared(model: str, taken: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The fields of :class:`Compared`, from the milliseconds of the arms "dense", "index", "runs" and "chanopt"."""
    best = min(("index", "runs"), key=lambda mode: statistics.median(taken[mode]))
    return {
        "model": model,
        "dense_ms": Spread.of(taken["dense"]),
        "upscale_ms": Spread.of(taken[best]),
        "chanopt_ms": Spread.of(taken["chanopt"]),
        "upscale_mode": best,
        "to_upscale": ratio(taken["chanopt"], taken[best]),
        "to_dense": ratio(taken["chanopt"], taken["dense"]),
    }


@dataclass(frozen=True, slots=True)
class Timing(Compared):
    """One network, and what compiling it took.

    Attributes:
        optimize_seconds, upscale_seconds: time to compile, capture of the graph excluded for chanopt and
            tracing included for UPSCALE, which has no separate capture.
        error: greatest relative difference between chanopt's outputs and the masked network's.
    """

    capture_seconds: float
    optimize_seconds: float
    upscale_seconds: float
    error: float


def time_arms(arms: dict[str, Arm], inputs: tuple[Any, ...], rounds: int) -> dict[str, list[float]]:
    """Call every arm once a round, each round starting with the next arm; returns milliseconds by arm."""
    names = list(arms)
    taken: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for _ in range(_WARMUPS):
            for arm in arms.values():
                arm(*inputs)
        for number in range(rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                start = time.perf_counter()
                arms[name](*inputs)
                taken[name].append(1000 * (time.perf_counter() - start))
    return taken


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of the ratios, round by round."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def measure(name: str, *, amount: float, rounds: int, resolution: int | None) -> Timing:
    """Time one network of the zoo under input masks of `amount`.

    Raises:
        chanopt.errors.ChanoptError: it could not be optimised.
        benchmarks.peers.PeerError: UPSCALE could not export it.
    """
    import chanopt

    model = build_masked(name, Setting("input", amount), resolution)
    inputs = zoo.example_inputs(name, 1, resolution)
    fast = chanopt.optimize(copy.deepcopy(model), inputs)
    seconds = chanopt.explain(fast).seconds
    index, runs = peers.export(model, inputs, "index"), peers.export(model, inputs, "runs")
    arms: dict[str, Arm] = {"dense": model, "index": index.module, "runs": runs.module, "chanopt": fast}
    taken = time_arms(arms, inputs, rounds)
    return Timing(
        **compared(name, taken),
        capture_seconds=seconds["capture"],
        optimize_seconds=seconds["optimize"],
        upscale_seconds=index.seconds,
        error=relative_error(model, fast, zoo.example_inputs(name, 1, resolution, seed=11)),
    )


def markdown(timings: Sequence[Timing], on: dict[str, str], conditions: str) -> str:
    """The page of results."""
    heads = [*COMPARED_HEADS, "optimise, s", "UPSCALE, s", "error"]
    body = [[*t.cells(), f"{t.optimize_seconds:.2f}", f"{t.upscale_seconds:.2f}", f"{t.error:.0e}"] for t in timings]
    parts = [
        "# Speed",
        conditions + " Medians, with quartiles in brackets; ratios within a round.",
        "\n".join(f"- {key}: {value}" for key, value in on.items()),
        table(heads, body),
        *verdicts(timings),
    ]
    return "\n\n".join(parts) + "\n"


def verdicts(timings: Sequence[Timing]) -> list[str]:
    """The geometric means, and the networks on which leaving the zeros in is faster."""
    slower = [t.model for t in timings if t.to_dense.median > 1]
    means = {
        what: statistics.geometric_mean([getattr(t, key).median for t in timings])
        for what, key in (("UPSCALE", "to_upscale"), ("the masked network", "to_dense"))
    }
    return [
        *(f"Geometric mean against {what}: {mean:.3f}." for what, mean in means.items()),
        f"Slower than the masked network on: {', '.join(slower) or 'none'}.",
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--models", nargs="+", type=zoo.network, metavar="NAME", default=MODELS)
    made.add_argument("--amount", type=float, default=0.5, help="fraction of input channels masked")
    made.add_argument("--rounds", type=cases.rounds, default=40, help="timed calls of each arm, at least 2")
    made.add_argument("--resolution", type=int, help="image size in pixels (default: the network's own)")
    made.add_argument("--out", type=Path, default=OUT)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if an output differs, 0 otherwise, whatever the times are."""
    args = parser().parse_args(arguments)
    torch.set_num_threads(1)
    timings = [
        measure(name, amount=args.amount, rounds=args.rounds, resolution=args.resolution)
        for name in tqdm(args.models, unit="network", disable=None)
    ]
    conditions = (
        f"CPU, eager, batch 1, float32, {args.amount:.0%} of the input channels of each layer masked, "
        f"{args.rounds} rounds."
    )
    on = machine()
    page = markdown(timings, on, conditions)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"conditions": conditions, "machine": on, "timings": [asdict(t) for t in timings]}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(page)
    print(page)
    wrong = [t.model for t in timings if not t.error <= MAX_ERROR32]
    if wrong:
        print(f"outputs differ by more than {MAX_ERROR32:.0e}: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
