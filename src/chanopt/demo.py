"""``chanopt demo``: masked torchvision models, optimised, compared and timed on this machine."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune
from tqdm import tqdm

from chanopt import api, clock
from chanopt.errors import ChanoptError
from chanopt.report import Report
from chanopt.report.text import render
from chanopt.torchvision_shim import ensure_torchvision

MODELS = ("resnet50", "densenet121")
RESOLUTION, ROUNDS = 224, 30
QUICK_RESOLUTION, QUICK_ROUNDS = 64, 3
_ROWS = 12
_WARMUPS = 3
_IMAGE_CHANNELS = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Two modules called in turn, one thread.

    Attributes:
        dense_ms: median time of the masked model, in milliseconds.
        slim_ms: median time of the optimised one.
        ratio: median of slim time by dense time, taken within a round; below 1 is faster.
    """

    dense_ms: float
    slim_ms: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one model.

    Attributes:
        name: the model's name in torchvision.
        report: what was done.
        error: greatest relative difference of outputs, computed in float64.
        timing: before and after, side by side.
        page: where the HTML report is.
    """

    name: str
    report: Report
    error: float
    timing: Timing
    page: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of ``chanopt demo``."""
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help="names in torchvision.models")
    parser.add_argument(
        "--amount", type=_fraction, default=0.5, help="fraction of input channels to mask (default 0.5)"
    )
    parser.add_argument("--out", type=Path, default=Path("chanopt-demo"), metavar="DIR", help="where HTML reports go")
    parser.add_argument("--rounds", type=_count, help=f"timed calls of each model (default {ROUNDS})")
    parser.add_argument("--resolution", type=_count, help=f"size of the images in pixels (default {RESOLUTION})")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_RESOLUTION} pixels and {QUICK_ROUNDS} rounds unless given",
    )


def _fraction(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a fraction of at least 0 and below 1, found {text!r}")


def _count(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")


def run(args: argparse.Namespace) -> None:
    """Run the demo on parsed arguments (:func:`add_arguments`).

    Raises:
        ChanoptError: torchvision or jinja2 is missing, there is no such model, or one cannot be optimised.
        VerifyError: outputs differ.
    """
    resolution = args.resolution or (QUICK_RESOLUTION if args.quick else RESOLUTION)
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    require_jinja2()
    models = _models()
    _require_known(models, args.models)
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    with _one_thread():
        for name in args.models:
            outcomes.append(_shown(models, name, args.amount, resolution, rounds, args.out))
            print(f"{render(outcomes[-1].report, rows=_ROWS)}\n")
    print(table(outcomes))
    print(f"\n{machine()}; one thread, batch 1, float32, {resolution} pixels, {rounds} rounds.")
    print(f"{args.amount:.0%} of the input channels of each layer were masked: those of least L2 norm.")
    for outcome in outcomes:
        print(f"report: {outcome.page.resolve()}")


def require_jinja2() -> None:
    """Refuse to begin what will end in an HTML page where none can be made.

    Raises:
        ChanoptError: jinja2 is not installed.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise ChanoptError(
            "expected jinja2 for the report as HTML, found that it is not installed; "
            "install it: pip install 'chanopt[report]'"
        )


def _models() -> ModuleType:
    try:
        ensure_torchvision()
        import torchvision.models
    except ImportError as error:
        raise ChanoptError(
            f"expected torchvision, whose models the demo masks, found that its import fails ({error}); "
            "install it: pip install 'chanopt[bench]', or torchvision alone by pip install --no-deps"
        ) from error
    return torchvision.models


def _require_known(models: ModuleType, names: Sequence[str]) -> None:
    known: list[str] = models.list_models(module=models)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
            raise ChanoptError(f"expected a classifier of torchvision, found {name!r}; nearest: {', '.join(near)}")


def _shown(models: ModuleType, name: str, amount: float, resolution: int, rounds: int, out: Path) -> Outcome:
    """Everything the demo does with one model, its progress shown on a terminal."""
    bar = tqdm(total=4 + rounds, desc=name, leave=False, bar_format="{desc} {bar} {elapsed}", disable=None)

    def begin(stage: str) -> None:
        bar.set_description_str(f"{name}: {stage:8}")
        bar.update()

    with bar:
        begin("mask")
        inputs = (torch.randn(1, _IMAGE_CHANNELS, resolution, resolution, generator=torch.Generator().manual_seed(1)),)
        model = masked(models.get_model, name, amount, resolution)
        begin("optimise")
        fast = api.optimize(model, inputs)
        report = replace(api.explain(fast), model=name)
        begin("compare")
        error = api.verify(model, fast, inputs, trials=1)
        begin("time")
        timing = timed(model, fast, inputs, rounds, after_round=bar.update)
        page = report.to_html(out / f"{name}.html")
    return Outcome(name, report, error, timing, page)


def masked(build: Callable[..., nn.Module], name: str, amount: float, resolution: int) -> nn.Module:
    """A model with random weights and masked input channels, in eval mode, that depends on its inputs.

    Every ungrouped convolution that does not read the image loses the input channels of least L2 norm, chosen
    for that layer alone (torch.nn.utils.prune.ln_structured). Then batch norms get random gains and the
    statistics of a batch of noise, as fine-tuning would leave them: without, an untrained model computes
    almost a constant.

    Args:
        build: makes the model from ``name`` and ``weights=None``, as torchvision.models.get_model does.
        name: the model's name.
        amount: fraction of the input channels, in [0, 1).
        resolution: height and width of the noise.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(name, weights=None)
        _mask(model, amount)
        _calibrate(model, resolution)
    return model.eval()


def _mask(model: nn.Module, amount: float) -> None:
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or module.groups > 1 or module.in_channels == _IMAGE_CHANNELS:
            continue
        prune.ln_structured(module, "weight", amount=amount, n=2, dim=1)
        prune.remove(module, "weight")  # the zeros stay; the multiplication by the mask would slow the masked model


@torch.no_grad()
def _calibrate(model: nn.Module, resolution: int) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0.0, 0.2)
        norm.momentum = None  # the running statistics become those of the one batch below
    model.eval()
    for norm in norms:
        norm.train()
    model(torch.randn(4, _IMAGE_CHANNELS, resolution, resolution))


def timed(
    dense: nn.Module,
    slim: nn.Module,
    inputs: tuple[Any, ...],
    rounds: int,
    after_round: Callable[[], object] = lambda: None,
) -> Timing:
    """Time two modules call by call in turn, so that whatever else the machine does falls on both alike.

    Args:
        dense: the masked model.
        slim: the optimised one.
        inputs: positional inputs of both.
        rounds: timed calls of each, at least 1; the one that goes first changes from round to round.
        after_round: called after every round, to show progress.
    """
    arms = (dense, slim)
    taken: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for arm in arms * _WARMUPS:
            arm(*inputs)
        for number in range(rounds):
            for which in (number % 2, 1 - number % 2):
                start = time.perf_counter()
                arms[which](*inputs)
                taken[which].append(1000 * (time.perf_counter() - start))
            after_round()
    ratios = [after / before for before, after in zip(*taken, strict=True)]
    return Timing(statistics.median(taken[0]), statistics.median(taken[1]), statistics.median(ratios))


@contextlib.contextmanager
def _one_thread() -> Generator[None]:
    """Timings on several threads of a shared machine are noise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def table(outcomes: Sequence[Outcome]) -> str:
    """Before and after, one line a model, columns aligned."""
    heads = ("model", "masked", "optimised", "ratio", "parameters", "MACs", "copies", "error", "optimised in")
    rows = [heads, *map(_row, outcomes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(lines)


def _row(outcome: Outcome) -> tuple[str, ...]:
    report, timing = outcome.report, outcome.timing
    return (
        outcome.name,
        f"{timing.dense_ms:.1f} ms",
        f"{timing.slim_ms:.1f} ms",
        f"{timing.ratio:.2f}",
        f"{report.parameters_before / 1e6:.1f} M -> {report.parameters_after / 1e6:.1f} M",
        f"{report.macs_before / 1e9:.2f} G -> {report.macs_after / 1e9:.2f} G",
        f"{report.copies}",
        f"{outcome.error:.0e}",
        f"{report.seconds['optimize']:.2f} s",
    )


def machine() -> str:
    """What the timings are taken on: processor, system, torch."""
    return f"{clock.processor()}, {platform.system()} {platform.machine()}, torch {torch.__version__}"
