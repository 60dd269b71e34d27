"""What is run: a network, a mask, an arm, and how it is run; and the one schema of what comes out."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks import zoo
from benchmarks.masks import Setting, Side, build_masked, mask, maskable

SCHEMA = 1
"""Version of `Record`; a reader refuses a newer one."""

Criterion = Literal["l1", "l2", "random"]
Scope = Literal["local", "global"]
Mode = Literal["eager", "inductor"]
Layout = Literal["contiguous", "channels_last"]

CRITERIA: tuple[Criterion, ...] = ("l1", "l2", "random")
SCOPES: tuple[Scope, ...] = ("local", "global")
MODES: tuple[Mode, ...] = ("eager", "inductor")
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last")
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Mask:
    """How channels are chosen.

    Attributes:
        criterion: channels of least norm ("l1", "l2"), or any ("random").
        amount: fraction of the channels.
        side: of each layer.
        scope: the fraction of every layer ("local"), or of all layers together ("global"); every layer keeps one.
        seed: of the random choice.
    """

    criterion: Criterion = "l2"
    amount: float = 0.5
    side: Side = "input"
    scope: Scope = "local"
    seed: int = 0

    def __str__(self) -> str:
        seed = f" seed {self.seed}" if self.criterion == "random" else ""
        return f"{self.side} {self.amount:.0%} {self.criterion} {self.scope}{seed}"


class CaseError(ValueError):
    """A case that nothing could be run by; a command line says so before anything starts."""


@dataclass(frozen=True, slots=True)
class Case:
    """A masked network and how it is run; the arms of one case are run together, call by call.

    Raises:
        CaseError: the resolution, the batch or the threads are fewer than one.
    """

    model: str
    mask: Mask = field(default_factory=Mask)
    resolution: int = 224
    mode: Mode = "eager"
    layout: Layout = "contiguous"
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        counts = {"resolution": self.resolution, "batch": self.batch, "threads": self.threads}
        for name, found in counts.items():
            if found < 1:
                raise CaseError(f"{name}: expected 1 or more, found {found}")

    def __str__(self) -> str:
        run = [self.mode, self.layout, f"batch {self.batch}", self.dtype, self.device, f"{self.threads} threads"]
        return f"{self.model} {self.resolution} px, {self.mask}, {', '.join(run)}"

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Case:
        """A case from what `dataclasses.asdict` made of it; other keys are left out."""
        known: dict[str, Any] = {f.name: table[f.name] for f in fields(cls)}
        known["mask"] = Mask(**known["mask"])
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Record:
    """One arm of one case: the one schema of all that is timed.

    None means not measured. Latencies are in milliseconds, as lower quartile, median, upper quartile over rounds; a
    ratio is of the times in one round (below 1: this arm is the faster one), its quartiles over the rounds. Bytes and
    multiplications are for one inference of the case's batch.

    Attributes:
        case: what was run.
        arm: how.
        machine: processor, versions, threads.
        status: "ok", or "error" and `exception` says what.
        same_function: whether the arm computes the masked network's outputs.
        latency_ms, ratios: see above; ratios by the name of the other arm.
        rounds: timed calls.
        planned: copies, channels and bytes by the arm's plan; `observed` by what the operators did.
        agree: whether the two are equal (eager runs only).
        profiled: the copies that torch's profiler saw, and those that convolutions make by themselves.
        relayouts, concats: other copies, in number and bytes.
        macs: multiplications in three conventions (see `benchmarks.observe.Macs`).
        parameters: entries of parameters that the module holds; `parameter_bytes` their memory.
        peak_bytes: most bytes alive at once, parameters and inputs apart (on CUDA: as the allocator tells).
        seconds: by stage: capture, and making the arm.
        figures: what else the arm's maker tells (objective, bound, segments proven, refusals).
        error: greatest difference to the masked network's outputs on fresh inputs, relative to their magnitude.
        accuracy: if it was given (see `benchmarks.page`).
    """

    case: Case
    arm: str
    machine: Mapping[str, str]
    schema: int = SCHEMA
    status: str = "ok"
    exception: str = ""
    same_function: bool = True
    latency_ms: tuple[float, float, float] | None = None
    ratios: Mapping[str, tuple[float, float, float]] = field(default_factory=dict[str, "tuple[float, float, float]"])
    rounds: int = 0
    planned: Mapping[str, int] | None = None
    observed: Mapping[str, int] | None = None
    agree: bool | None = None
    profiled: Mapping[str, int] | None = None
    relayouts: tuple[int, int] | None = None
    concats: tuple[int, int] | None = None
    macs: Mapping[str, int] | None = None
    parameters: int | None = None
    parameter_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    figures: Mapping[str, Any] = field(default_factory=dict[str, Any])
    error: float | None = None
    accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, one JSON object."""
        return asdict(self)

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Record:
        """A record from plain data.

        Raises:
            ValueError: it comes from a newer schema.
        """
        if table.get("schema", 0) > SCHEMA:
            raise ValueError(
                f"expected a record of schema {SCHEMA} or older, found {table['schema']}: update benchmarks"
            )
        known: dict[str, Any] = {f.name: table[f.name] for f in fields(cls) if f.name in table}
        known["case"] = Case.of(table["case"])
        return cls(**known)


def amount(text: str) -> float:
    """Parse a share of channels, for command lines.

    >>> amount("0.5")
    0.5
    """
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a share of the channels in [0, 1), found {text!r}")


def at_least(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from some number on, for command lines.

    >>> at_least(1)("20")
    20
    """

    def parse(text: str) -> int:
        if text.isdecimal() and int(text) >= least:
            return int(text)
        raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, found {text!r}")

    return parse


def seconds(text: str) -> float:
    """Parse a time, for command lines.

    >>> seconds("0.5")
    0.5
    """
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected seconds, more than 0, found {text!r}")


def folder(text: str) -> Path:
    """Parse the name of a folder to write into, for command lines; makes it, if it is not there."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


rounds = at_least(2)
"""Parse a number of timed calls, for command lines: quartiles need two."""


def networks(case: Case) -> tuple[nn.Module, nn.Module]:
    """The network of a case masked, and before masking; both as the case says they are run.

    Raises:
        KeyError: there is no such network.
        ValueError: the amount is outside [0, 1).
    """
    original = zoo.build(case.model, resolution=case.resolution)
    return placed(_masked(case), case), placed(original, case)


def inputs(case: Case, seed: int = 0) -> tuple[Any, ...]:
    """Example inputs of a case."""
    made = zoo.example_inputs(case.model, case.batch, case.resolution, seed=seed)
    return tree_map(lambda x: _placed_tensor(x, case) if isinstance(x, Tensor) else x, made)


def _masked(case: Case) -> nn.Module:
    chosen = case.mask
    if (chosen.criterion, chosen.scope) == ("l2", "local"):
        return build_masked(case.model, Setting(chosen.side, chosen.amount), case.resolution)
    model = zoo.build(case.model, resolution=case.resolution)
    apply(model, chosen)
    with zoo.seeded(0):
        zoo.settle(model, zoo.calibration_inputs(case.model, case.resolution, seed=1))
    return model


def placed(model: nn.Module, case: Case) -> nn.Module:
    """A network, or what an arm made of one, as the case says; weights in another layout cost copies at each call."""
    model = model.to(device=case.device, dtype=getattr(torch, case.dtype))
    # torch's stubs know no memory format without a type.
    return model.to(memory_format=torch.channels_last) if case.layout == "channels_last" else model  # type: ignore[call-overload]


def _placed_tensor(tensor: Tensor, case: Case) -> Tensor:
    tensor = tensor.to(device=case.device, dtype=getattr(torch, case.dtype))
    last = case.layout == "channels_last" and tensor.ndim == 4
    return tensor.contiguous(memory_format=torch.channels_last) if last else tensor


@torch.no_grad()
def apply(model: nn.Module, chosen: Mask) -> None:
    """Write a mask's zeros into a model, in place, layer by layer as `benchmarks.masks.mask` does.

    Raises:
        ValueError: the amount is outside [0, 1).
    """
    if not 0 <= chosen.amount < 1:
        raise ValueError(f"amount must be a fraction of the channels in [0, 1), got {chosen.amount}")
    if chosen.scope == "local" and chosen.criterion != "l1":
        mask(model, chosen.side, chosen.amount, criterion=chosen.criterion, seed=chosen.seed)
        return
    generator = torch.Generator().manual_seed(chosen.seed)
    views = ("input", "output") if chosen.side == "both" else (chosen.side,)
    dead = [found for view in views for found in _dead(list(_channels(model, view)), chosen, generator)]
    for layer, view, channels in dead:
        layer.weight.transpose(0, 1 if view == "input" else 0)[channels] = 0.0
        if view == "output" and layer.bias is not None:
            layer.bias[channels] = 0.0


Part = tuple[nn.Conv2d, str, Tensor]
"""A layer, its side, and per channel of that side its weights, or its score, or which channels."""


def _channels(model: nn.Module, view: str) -> Iterator[Part]:
    for _, layer in maskable(model):
        if view == "output":
            yield layer, view, layer.weight
        elif layer.in_channels != 3:
            yield layer, view, layer.weight.transpose(0, 1)


def _dead(parts: list[Part], chosen: Mask, generator: torch.Generator) -> Iterator[Part]:
    scores = [_scores(weight, chosen.criterion, generator) for _, _, weight in parts]
    counts = [int(chosen.amount * len(score)) for score in scores]
    if chosen.scope == "global" and scores:
        # Divided by their mean, since a norm grows with the number of a channel's weights.
        scores = [score / score.mean().clamp(min=1e-12) for score in scores]
        everything = torch.cat(scores).sort().values
        limit = everything[int(chosen.amount * len(everything))]
        counts = [min(int((score < limit).sum()), len(score) - 1) for score in scores]
    for (layer, view, _), score, count in zip(parts, scores, counts, strict=True):
        yield layer, view, score.argsort(stable=True)[:count]


def _scores(weight: Tensor, criterion: Criterion, generator: torch.Generator) -> Tensor:
    if criterion == "random":
        return torch.rand(len(weight), generator=generator)
    return weight.flatten(1).norm(p=1 if criterion == "l1" else 2, dim=1)
